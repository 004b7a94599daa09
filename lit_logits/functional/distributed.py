"""Collectives that do nothing in a single process. Every rank must call them."""

import torch.distributed as dist
from torch import Tensor

__all__ = ["all_reduce_sum_", "broadcast_", "is_distributed"]


def is_distributed() -> bool:
    """Return whether there are other ranks to talk to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its sum over all ranks, in place, and return it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def broadcast_(*tensors: Tensor) -> None:
    """Overwrite `tensors` with those of rank 0, in place."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
