"""Labels of language models: the one that is ignored, and the shift from a token to the position that predicts it.

Letters: B samples, T positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["IGNORE_INDEX", "NextTokenLabels", "next_token_labels"]

IGNORE_INDEX = -100  # that of transformers and of `torch.nn.functional.cross_entropy`


class NextTokenLabels(NamedTuple):
    """Result of `next_token_labels`.

    Attributes:
        labels: (B, T), what each position predicts, or the ignored label; the last position predicts nothing.
        mask: boolean (B, T), the positions whose label counts.
    """

    labels: Tensor
    mask: Tensor


def next_token_labels(
    labels: Tensor, *, keep: Tensor | None = None, ignore_index: int = IGNORE_INDEX
) -> NextTokenLabels:
    """Shift `labels` left by one, so that each stands at the position that predicts it.

    As the result is as long as the input, hidden states and logits need no slice: `hidden[mask]` and `labels[mask]`
    belong together.

    Args:
        labels: (B, T) integers, unshifted: label t is token t or `ignore_index`.
        keep: (B,) samples or (B, T) predicting positions that count, boolean or 0 and 1, such as an attention mask;
            the others are ignored. None keeps all.
        ignore_index: label that marks positions to leave out.

    Returns:
        Labels in the dtype of `labels` and the mask; labels that do not count are `ignore_index`.

    Raises:
        ValueError: If `labels` has no dimension of tokens, or `keep` the shape of neither the samples nor the
            positions.

    Example:
        >>> shifted = next_token_labels(torch.tensor([[-100, 7, 8], [4, 5, 6]]), keep=torch.tensor([1, 0]))
        >>> shifted.labels
        tensor([[   7,    8, -100],
                [-100, -100, -100]])
        >>> shifted.mask
        tensor([[ True,  True, False],
                [False, False, False]])
    """
    if labels.ndim < 2:
        raise ValueError(
            f"Expected `labels` of shape (B, T), one for each token, but got {tuple(labels.shape)}. Classes of"
            " sequences or images are for `DualHeadKD`."
        )
    shifted = torch.full_like(labels, ignore_index)
    shifted[..., :-1] = labels[..., 1:]
    if keep is not None:
        if keep.shape not in (labels.shape, labels.shape[:-1]):
            raise ValueError(
                f"Expected `keep` of shape {tuple(labels.shape[:-1])} or {tuple(labels.shape)}, as `labels` has, but"
                f" got {tuple(keep.shape)}."
            )
        keep = keep.to(device=labels.device, dtype=torch.bool)
        shifted = shifted.masked_fill(~(keep if keep.ndim == labels.ndim else keep.unsqueeze(-1)), ignore_index)
    return NextTokenLabels(shifted, shifted != ignore_index)
