"""Reductions over the tokens that count, and the precision that they are made in.

Letters: N tokens of which some are ignored; B samples of T positions.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["Reduction", "at_least_float32", "chunked_sum", "reduce_tokens", "sample_mean"]

Reduction = Literal["mean", "sum", "none"]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32 if its dtype is narrower, else unchanged.

    Sums in half precision would lose their small terms.

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
        ValueError: If `reduction` is another word.

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


def sample_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean over samples of the mean over the positions that count in each.

    Each sample weighs the same, and one where no position counts enters as 0. A mean over all tokens of a batch is not
    the mean of its parts, which differ in their number of tokens. This one is, for parts of equally many samples,
    without communication between ranks or micro-batches.

    Args:
        values: (B, T); values at masked-out positions must be finite.
        mask: boolean (B, T).

    Example:
        >>> values, mask = torch.tensor([[1.0, 3.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]])
        >>> sample_mean(values, mask)  # of 2 and 6
        tensor(4.)
    """
    return (reduce_tokens(values, mask, "none").sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def chunked_sum(function: Callable[..., Tensor], *tensors: Tensor, chunk_size: int) -> Tensor:
    """Sum `function(*chunk)` over chunks, holding the intermediates of one chunk at a time.

    They are freed after each chunk and computed again in backward. So peak memory is that of one chunk, at the price of
    one more evaluation of `function`: a token loss never holds (N, V) logits.

    Args:
        function: takes a slice of every tensor and returns a scalar sum; without randomness.
        *tensors: (N, ...), cut along the first dimension; N may be 0.
        chunk_size: rows a chunk.

    Raises:
        ValueError: If `chunk_size` is below 1.

    Example:
        >>> chunked_sum(lambda x: x.exp().sum(), torch.zeros(5), chunk_size=2)
        tensor(5.)
    """
    if chunk_size < 1:
        raise ValueError(f"Expected `chunk_size` to be at least 1, but got {chunk_size}.")
    chunks = zip(*(tensor.split(chunk_size) for tensor in tensors), strict=True)
    # The non-reentrant kind works without inputs that require gradients, as where only the head inside `function` is
    # trained. Random states are not kept, as `function` draws nothing.
    sums = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(sums).sum()
