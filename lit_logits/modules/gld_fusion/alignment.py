"""Which positions of a pivot and of a source belong together.

Letters: B batch, T positions of the pivot, U positions of the source.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lit_logits.functional.alignment import align_positions, common_span
from lit_logits.functional.top_k_logits import SourceLogits

__all__ = ["SourceAlignment", "align_source", "read_ends"]


class SourceAlignment(NamedTuple):
    """Result of `align_source`.

    Attributes:
        partner: (B, T) position of the source that has read the same text, −1 where there is none.
        student_mask: (B, T) positions that count and lie where the source reaches.
        source_mask: (B, U) positions that count and lie where the pivot reaches.
        aligned: scalar, share of all positions of the pivot that count at which the source has read the same text.
    """

    partner: Tensor
    student_mask: Tensor
    source_mask: Tensor
    aligned: Tensor


def align_source(source: SourceLogits, mask: Tensor, ends: Tensor | None = None) -> SourceAlignment:
    """Find the positions of a source that belong to those of the pivot.

    Args:
        source: (B, U).
        mask: (B, T) positions of the pivot that predict a label.
        ends: (B, T) how much of the response the pivot has read, in the unit of the source's ends, −1 where there is
            none; None if both read the same tokens, whose n-th positions belong together, wherever they end.
    """
    if ends is None:
        student_mask, source_mask = mask, source.mask
        partner = (mask.cumsum(-1) - 1).masked_fill(~mask, -1)
        partner = partner.masked_fill(partner >= source_mask.sum(-1, keepdim=True), -1)
    else:
        own, other = ends.masked_fill(~mask, -1), source.ends.masked_fill(~source.mask, -1)
        student_mask, source_mask = common_span(own, other)
        student_mask, source_mask = student_mask & mask, source_mask & source.mask
        partner = align_positions(own.masked_fill(~student_mask, -1), other.masked_fill(~source_mask, -1))
    share = (partner >= 0).sum() / mask.sum().clamp(min=1)
    return SourceAlignment(partner, student_mask, source_mask, share)


def read_ends(view: Mapping[str, Any]) -> Tensor | None:
    """Return how much of the response each position has read: in bytes, or as the batch has it; None if it does not."""
    return view.get("response_bytes", view.get("response_ends"))
