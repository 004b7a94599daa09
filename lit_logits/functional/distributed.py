"""Collectives that do nothing in a single process. Every rank must call them."""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather_rows", "all_reduce_sum_", "broadcast_", "is_distributed"]


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


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Return the rows of all ranks, one rank's after another's; ranks may have different numbers of rows."""
    if not is_distributed():
        return tensor
    sizes = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(tensor)], device=tensor.device))
    # Collectives want equal shapes, so every rank sends as many rows as the longest has.
    padded = tensor.new_zeros(int(max(sizes)), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
