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
    result = torch.full_like(ends1, -1)
    stride = int(max(ends1.max(), ends2.max()).item()) + 1 if ends1.numel() and ends2.numel() else 0
    if stride <= 0:
        return result
    # Sample and end as one number: then one sorted search serves the whole batch, however ragged.
    keys1, keys2 = (_keys(ends, stride) for ends in (ends1, ends2))
    place1, place2 = (ends.flatten().ge(0).nonzero().squeeze(1) for ends in (ends1, ends2))
    if not len(keys1) or not len(keys2):
        return result
    partner = (torch.searchsorted(keys2, keys1, right=True) - 1).clamp(min=0)  # the last of those that end there
    is_last = torch.ones_like(keys1, dtype=torch.bool)
    is_last[:-1] = keys1[1:] != keys1[:-1]
    is_there = is_last & (keys2[partner] == keys1)
    found = place2[partner] % ends2.shape[1]
    result.view(-1)[place1] = torch.where(is_there, found, -1)
    return result


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


def _keys(ends: Tensor, stride: int) -> Tensor:
    """Encode sample and end of each position that counts as one number, sample · stride + end, ascending."""
    row = torch.arange(len(ends), device=ends.device).unsqueeze(1) * stride
    return (row + ends)[ends >= 0]
