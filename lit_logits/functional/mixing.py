"""Images that are mixed with others of their batch, and the labels that belong to them.

Letters: B images, C classes; the share λ in [0, 1] is what an image keeps of itself.

References:
    [0]: mixup, 2018, arXiv 1710.09412, Eq. 1.
    [1]: CutMix, 2019, arXiv 1905.04899, Eq. 1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_logits.functional.labels import IGNORE_INDEX

__all__ = ["CutBox", "cut_box", "cutmix_images", "mix_labels", "mixup_images", "soft_labels"]


class CutBox(NamedTuple):
    """Result of `cut_box`, in pixels, without the last row and column."""

    top: int
    left: int
    bottom: int
    right: int


def mixup_images(images: Tensor, order: Tensor, share: float) -> Tensor:
    """Return λ x_b + (1 − λ) x_order(b) for each image [0].

    Args:
        images: (B, ...) floats.
        order: (B,) which image each is mixed with.
        share: λ.

    Example:
        >>> mixup_images(torch.tensor([[0.0], [1.0]]), torch.tensor([1, 0]), 0.75)
        tensor([[0.2500],
                [0.7500]])
    """
    return torch.lerp(images[order], images, share)


def cut_box(height: int, width: int, share: float, centre: tuple[float, float]) -> CutBox:
    """Return the box of about 1 − λ of an image that is pasted from another [1]; at an edge it is cut off.

    Args:
        height: of the image.
        width: of the image.
        share: λ.
        centre: of the box, down and right, in units of the sides.

    Example:
        >>> cut_box(8, 8, 0.75, (0.5, 0.0))
        CutBox(top=2, left=0, bottom=6, right=2)
    """
    rows, columns = (int(side * (1 - share) ** 0.5) for side in (height, width))
    top, left = (
        int(place * side) - cut // 2 for place, side, cut in zip(centre, (height, width), (rows, columns), strict=True)
    )
    return CutBox(max(0, top), max(0, left), min(height, top + rows), min(width, left + columns))


def cutmix_images(images: Tensor, order: Tensor, box: CutBox) -> tuple[Tensor, float]:
    """Return images with a box of another image each, and the share λ of its own pixels that an image keeps [1].

    Args:
        images: (B, channels, H, W).
        order: (B,) whose box each image gets.
        box: where.

    Example:
        >>> mixed, share = cutmix_images(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 2, 2),
        ...     torch.tensor([1, 0]), CutBox(0, 0, 1, 1))
        >>> mixed[0, 0].tolist(), share
        ([[1.0, 0.0], [0.0, 0.0]], 0.75)
    """
    mixed = images.clone()
    rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
    mixed[..., rows, columns] = images[order][..., rows, columns]
    height, width = images.shape[-2:]
    return mixed, 1 - (box.bottom - box.top) * (box.right - box.left) / (height * width)


def soft_labels(labels: Tensor, num_classes: int) -> Tensor:
    """Return integer labels (B,) as probabilities (B, C), and rows of −100 as zeros; floats are returned as they are.

    Example:
        >>> soft_labels(torch.tensor([1, -100]), 3)
        tensor([[0., 1., 0.],
                [0., 0., 0.]])
    """
    if labels.is_floating_point():
        return labels
    known = labels != IGNORE_INDEX
    return F.one_hot(labels.long().masked_fill(~known, 0), num_classes) * known.unsqueeze(-1).float()


def mix_labels(labels: Tensor, order: Tensor, share: float, *, multi_label: bool = False) -> Tensor:
    """Return the labels λ y_b + (1 − λ) y_order(b) of mixed images; what is not known of both stays not known.

    Args:
        labels: (B, C) probabilities, of which rows of zeros are not known; with `multi_label` entries of −100 are not.
        order: (B,) which image each is mixed with.
        share: λ.
        multi_label: whether a row may have several classes or none.

    Example:
        >>> mix_labels(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 0]), 0.75)
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """
    unknown = labels == IGNORE_INDEX if multi_label else (labels == 0).all(-1, keepdim=True)
    mixed = torch.lerp(labels[order], labels, share)
    return mixed.masked_fill(unknown | unknown[order], IGNORE_INDEX if multi_label else 0)
