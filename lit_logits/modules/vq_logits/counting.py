"""Running counts of the tokens that a head is trained on.

Letters: V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_logits.functional.distributed import all_reduce_sum_

__all__ = ["CountsTokens", "running_dtype"]


def running_dtype() -> torch.dtype:
    """Return the dtype of running counts and sums: at least float32, whatever the dtype of the weights."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class CountsTokens(nn.Module):
    """A head with `token_counts` (V,), running counts of the targets of all ranks, at least float32 in any module."""

    usage_decay: float
    token_counts: Tensor

    def running_buffers(self) -> list[str]:
        """Return the names of running counts, sums and masses."""
        return [name for name in ("token_counts", "ema_sums", "ema_mass") if name in self._buffers]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move all tensors, but keep running counts and sums at least float32: in bfloat16 they would stop at 256."""
        kept = {name: getattr(self, name) for name in self.running_buffers()}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            moved = getattr(self, name)
            if moved.dtype != before.dtype:
                setattr(self, name, before.to(moved.device, torch.promote_types(moved.dtype, torch.float32)))
        return self

    @torch.no_grad()
    def _count(self, labels: Tensor, ignore_index: int) -> None:
        # Of fixed shape, without `labels[mask]`, for which the host would wait for the device in every step. DDP copies
        # the buffers of rank 0 to all: counts must be sums over ranks before.
        mask = (labels != ignore_index).flatten()
        tokens = labels.flatten().masked_fill(~mask, 0)
        counts = torch.zeros_like(self.token_counts).index_add_(0, tokens, mask.to(self.token_counts))
        self.token_counts.mul_(self.usage_decay).add_(all_reduce_sum_(counts))
