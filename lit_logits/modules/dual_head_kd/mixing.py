"""Mixup and CutMix of batches, on the device, with draws that a resumed run repeats.

Letters: B batch, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_logits.functional.checks import check_not_negative
from lit_logits.functional.mixing import cut_box, cutmix_images, mix_labels, mixup_images, soft_labels

__all__ = ["BatchMixer"]


class _Draws(NamedTuple):
    cuts: bool
    share: float
    order: list[int]
    centre: tuple[float, float]


class BatchMixer:
    """Mixes every image of a batch with another: all of it (mixup), or a box of it (CutMix), and the labels alike.

    The share that an image keeps is drawn from Beta(α, α), one a batch. If both are asked for, each batch gets one of
    them, by a coin. Draws are functions of the seed and of what tells the batch: there is no state, and a resumed run
    repeats them.

    Args:
        mixup_alpha: α of mixup; 0 is none.
        cutmix_alpha: α of CutMix; 0 is none.
        seed: of the draws.

    Raises:
        ValueError: If an α or the seed is negative.

    Example:
        >>> mixer = BatchMixer(mixup_alpha=0.2)
        >>> batch = {"pixel_values": torch.rand(2, 3, 4, 4), "labels": torch.tensor([0, 2])}
        >>> mixer(batch, 3, place=(0, 0, 0))["labels"].shape
        torch.Size([2, 3])
    """

    def __init__(self, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0, seed: int = 0) -> None:
        check_not_negative(mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha, mix_seed=seed)
        self.mixup_alpha, self.cutmix_alpha, self.seed = mixup_alpha, cutmix_alpha, seed

    @property
    def is_active(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def __call__(
        self, batch: Mapping[str, Tensor], num_classes: int, *, place: Sequence[int], multi_label: bool = False
    ) -> dict[str, Tensor]:
        """Return the batch with its floating inputs mixed, and soft labels (B, C); a batch without labels has none.

        Args:
            batch: inputs and `labels`, as for `check_targets`.
            num_classes: C.
            place: what tells the batch from all others of a run: its epoch, number and rank.
            multi_label: whether a row may have several classes or none.

        Raises:
            ValueError: If no input can be mixed, or, for CutMix, one is no image.
        """
        images = {name: value for name, value in batch.items() if name != "labels" and _can_be_mixed(value)}
        if not images:
            found = {name: str(value.dtype) for name, value in batch.items() if isinstance(value, Tensor)}
            raise ValueError(
                f"Expected images of floats to mix, but got {found}. Set `mixup_alpha` and `cutmix_alpha` to 0 for"
                " texts, or let the images be floats."
            )
        first = next(iter(images.values()))
        draws = self._draw(len(first), place)
        order, share, mixed = torch.tensor(draws.order, device=first.device), draws.share, dict(batch)
        for name, value in images.items():
            if draws.cuts:
                mixed[name], share = _cut(value, name, order, draws)
            else:
                mixed[name] = mixup_images(value, order, share)
        if "labels" in batch:
            labels = batch["labels"].float() if multi_label else soft_labels(batch["labels"], num_classes)
            mixed["labels"] = mix_labels(labels, order, share, multi_label=multi_label)
        return mixed

    def _draw(self, size: int, place: Sequence[int]) -> _Draws:
        rng = np.random.default_rng([self.seed, *place])
        cuts = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or bool(rng.random() < 0.5))
        alpha = self.cutmix_alpha if cuts else self.mixup_alpha
        top, left = rng.random(2).tolist()
        return _Draws(cuts, float(rng.beta(alpha, alpha)), rng.permutation(size).tolist(), (top, left))


def _can_be_mixed(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def _cut(images: Tensor, name: str, order: Tensor, draws: _Draws) -> tuple[Tensor, float]:
    if images.dim() != 4:
        raise ValueError(
            f"Expected {name!r} to be images (B, channels, H, W) for `cutmix_alpha`, but got {tuple(images.shape)}. Use"
            " `mixup_alpha` alone."
        )
    height, width = images.shape[-2:]
    return cutmix_images(images, order, cut_box(height, width, draws.share, draws.centre))
