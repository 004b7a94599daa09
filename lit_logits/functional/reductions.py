"""Reductions over the tokens that count, and the precision that they are made in.

Letters: N tokens of which some are ignored; B samples of T positions.
"""

from typing import Literal

import torch
from torch import Tensor

from lit_logits.functional.checks import may_read

__all__ = [
    "Reduction",
    "at_least_float32",
    "reduce_tokens",
    "sample_mean",
    "sample_means",
    "soft_cap",
    "sums_by_id",
    "true_places",
]

Reduction = Literal["mean", "sum", "none"]


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Return c · tanh(z / c), which keeps logits z in (−c, c), for c = `cap`; z itself for None.

    Example:
        >>> soft_cap(torch.tensor([0.01, 100.0]), 2.0)
        tensor([0.0100, 2.0000])
    """
    return logits if cap is None else torch.tanh(logits / cap) * cap


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
    return sample_means(values, mask).mean()


def sample_means(values: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean over the positions that count in each sample: (B,), 0 for a sample where none counts.

    Args:
        values: (B, T); values at masked-out positions must be finite.
        mask: boolean (B, T).

    Example:
        >>> sample_means(torch.tensor([[1.0, 3.0], [6.0, 9.0]]), torch.tensor([[True, True], [True, False]]))
        tensor([2., 6.])
    """
    return reduce_tokens(values, mask, "none").sum(-1) / mask.sum(-1).clamp(min=1)


def sums_by_id(values: Tensor, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the values of each id, in the order of the ids.

    Ids that are sorted are numbered by counting the places where they change. `unique` would make the host wait for how
    many there are, and give each sample another shape; here all samples have room for M.

    Args:
        values: (..., M), or with further dimensions in front.
        ids: (..., M).
        counts: boolean (..., M), which of them count.

    Returns:
        Sums of the shape of the values, with zeros after those of the last id, and (...) how many ids there are.

    Example:
        >>> values, ids = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([9, 3, 9, 5])
        >>> sums_by_id(values, ids, ids != 5)
        (tensor([2., 5., 0., 0.]), tensor(2))
    """
    last = torch.iinfo(ids.dtype).max
    ids, order = ids.masked_fill(~counts, last).sort(dim=-1, stable=True)
    is_new = torch.ones_like(ids, dtype=torch.bool)
    is_new[..., 1:] = ids[..., 1:] != ids[..., :-1]
    is_new = is_new & (ids != last)
    place = (is_new.cumsum(-1) - 1).clamp(min=0)
    values = values.gather(-1, order.expand_as(values)).masked_fill(ids == last, 0.0)
    return torch.zeros_like(values).scatter_add(-1, place.expand_as(values), values), is_new.sum(-1)


def true_places(mask: Tensor, count: int | None = None) -> Tensor:
    """Return where a mask is true, as places (N,) in its flat order.

    Indexing by a mask finds them each time anew, and each time the host waits for an accelerator to learn how many they
    are. With their number it does not wait.

    Args:
        mask: boolean, any shape.
        count: N, where it is known.

    Example:
        >>> true_places(torch.tensor([[False, True], [True, False]]))
        tensor([1, 2])
    """
    flat = mask.flatten()
    if count is None or may_read(flat):
        return flat.nonzero().squeeze(1)
    return flat.int().argsort(descending=True, stable=True)[:count]
