"""Alignment of two tokenisations of one text, by the bytes that a position has read.

A position's end is the number of bytes of the response, in UTF-8, that a model has read there: 0 after the prompt, the
length of the response after its last token. Two models that have read the same text each predict what comes next, in
tokens of their own; only there can their predictions be compared. Bytes, unlike characters, tell the tokens within a
character apart; any other measure that both share would do.

Letters: B samples, T and U positions.
"""

import torch
from torch import Tensor

__all__ = ["align_positions", "common_span"]


def align_positions(ends1: Tensor, ends2: Tensor) -> Tensor:
    """Find for each position of the first tokenisation the position of the second that has read the same text.

    Of several tokens with one end (white space before the response) the last one counts.

    Args:
        ends1: (B, T) bytes of the response read, not decreasing along T; −1 where a position has no end.
        ends2: (B, U) of the second, in the same unit.

    Returns:
        (B, T) indices along U; −1 where no position of the second has read the same.

    Example:
        >>> align_positions(torch.tensor([[-1, 0, 3, 7, 9]]), torch.tensor([[0, 5, 7, 8, 9]]))
        tensor([[-1,  0, -1,  2,  4]])
    """
    if not ends1.numel() or not ends2.numel():
        return torch.full_like(ends1, -1)
    has_end, ends1, ends2 = ends1 >= 0, ends1.long(), ends2.long()
    # A position without an end takes the place of the last one before it that has one, so that ends only rise.
    places = torch.arange(ends2.shape[1], device=ends2.device).masked_fill(ends2 < 0, -1).cummax(-1).values
    found = torch.searchsorted(ends2.cummax(-1).values, ends1.contiguous(), right=True) - 1  # the last that ends there
    partner = places.gather(1, found.clamp(min=0))
    is_there = (found >= 0) & (partner >= 0) & (ends2.gather(1, partner.clamp(min=0)) == ends1)
    # The last one of its own, too: the next end is another.
    last = torch.iinfo(ends1.dtype).max
    following = ends1.masked_fill(~has_end, last).flip(-1).cummin(-1).values.flip(-1)
    is_last = torch.ones_like(has_end)
    is_last[:, :-1] = following[:, 1:] != ends1[:, :-1]
    return torch.where(has_end & is_last & is_there, partner, -1)


def common_span(ends1: Tensor, ends2: Tensor) -> tuple[Tensor, Tensor]:
    """Return masks of the positions that lie in the span of the response that both tokenisations reach.

    Either may have been truncated, the response with it. A position without an end lies there if one after it does and
    one before it has an end: it is within a character.

    Args:
        ends1: (B, T) as in `align_positions`.
        ends2: (B, U).

    Returns:
        Boolean (B, T) and (B, U).

    Example:
        >>> common_span(torch.tensor([[-1, 0, 4, 6]]), torch.tensor([[0, -1, 5, -1]]))
        (tensor([[False,  True,  True, False]]), tensor([[ True,  True,  True, False]]))
    """
    limit = torch.minimum(ends1.amax(-1), ends2.amax(-1)).unsqueeze(-1)
    return _reached(ends1, limit), _reached(ends2, limit)


def _reached(ends: Tensor, limit: Tensor) -> Tensor:
    has_end = ends >= 0
    last = torch.iinfo(ends.dtype).max
    following = ends.masked_fill(~has_end, last).flip(-1).cummin(-1).values.flip(-1)
    return (following <= limit) & (has_end.cumsum(-1) > 0)
