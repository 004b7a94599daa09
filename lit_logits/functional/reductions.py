"""Reductions over the tokens that count, and the precision that they are made in.

Letters: N tokens of which some are ignored.
"""

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Reduction", "at_least_float32", "reduce_tokens"]

Reduction = Literal["mean", "sum", "none"]


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32 if it has fewer bits, else as it is: sums in half precision would lose their small terms.

    Example:
        >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32

    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def reduce_tokens(values: Tensor, mask: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Reduce per-token `values` over the tokens where `mask` is true.

    The mean divides by the number of tokens that count, so it is the same under padding and, weighted by that number,
    under any split of the batch. With no token that counts it is a zero that still has a graph.

    Args:
        values: one number a token, any shape; values at masked-out tokens must be finite.
        mask: boolean, of the shape of `values`.
        reduction: `mean` over the tokens that count, their `sum`, or `none` (masked-out tokens become 0).

    Raises:
        ValueError: for another `reduction`.

    Example:
        >>> reduce_tokens(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]))
        tensor(1.5000)

    """
    values = values * mask
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        return values.sum() / mask.sum().clamp(min=1)
    raise ValueError(f"Expected `reduction` to be 'mean', 'sum' or 'none', but got {reduction!r}.")
