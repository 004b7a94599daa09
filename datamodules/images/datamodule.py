"""Images for classifiers: embedded digits, the field's data sets, any other on the hub, or a folder of one's own.

B is `batch_size`, H = W is `image_size`. A batch is transformers' dict `pixel_values` (B, 3, H, W), float32 and
normalised, and `labels` (B,), int64. On its way to the device it is uint8; it is augmented and normalised there.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_logits.datamodules.caching import default_cache_dir, digest
from lit_logits.datamodules.checks import as_part, check_at_least
from lit_logits.datamodules.images.library import FORMAT_VERSION, ImageLibrary, is_small
from lit_logits.datamodules.images.presets import find_preset
from lit_logits.datamodules.images.sources import ImageSource, ImageSplits
from lit_logits.datamodules.images.storage import Augmentation, ImageItems, collate_images
from lit_logits.datamodules.images.transforms import normalize, shift_and_flip
from lit_logits.datamodules.loaders import block_loader
from lit_logits.datamodules.resuming import ResumePoint, Resumes
from lit_logits.datamodules.sampling import Ints, add_label_noise, pick_balanced, plan_splits
from lit_logits.datamodules.splitting import check_fractions

__all__ = ["ImageDataModule"]

RESIZE_RATIO = 256 / 224
"""ImageNet's evaluation: resize the shorter side to this times `image_size` and crop the centre."""


class ImageDataModule(Resumes, LightningDataModule):
    r"""Images and their classes, split, augmented and normalised as the field does with each data set.

    Splits: the data set's own validation and test splits where they exist and have labels. A missing one is held out of
    the training split, class by class, if its fraction is above 0. If it is 0, the other one stands in: with
    `val_fraction=0` CIFAR is validated on its test split, as in the field's tables, and ImageNet and Tiny ImageNet are
    tested on their validation split. Where there is neither, both are switched off.

    Augmentation, while training: digits, CIFAR and whatever is at most 64 pixels wide are shifted by up to
    `image_size // 8` pixels (1 at 8, 4 at 32), as by a random crop from the padded image; larger images are cropped at
    random and resized, and evaluated on the central crop of ImageNet's 256 : 224. All but digits are mirrored. Draws
    depend on the seed, the epoch and the image, so W ranks get together what one process with batches of W · B gets.

    Images of at most 64 pixels are decoded once into the cache, under a digest of the data and the size: a changed file
    or argument never meets a stale entry. Training resumes in the middle of an epoch with the next unseen batch.

    Args:
        source: where the images come from: an `ImageSource` (in a recipe, a mapping `{path: ..., label_column: ...}`),
            or its `path` alone, such as `"cifar10"`, `"my/folder"` or the name of a data set.
        image_size: H and W, at least 4; None is 8 for digits, 32 for CIFAR, 64 for Tiny ImageNet, else 224.
        batch_size: B, images a batch on each rank.
        eval_batch_size: the same for validation, test and predict; None is `batch_size`.
        val_fraction: share of the training split that is held out for validation, in [0, 1); None is 0.2 for digits,
            else 0.1. Unused where the data set has a validation split of its own.
        test_fraction: the same for test and predict; None is 0.2 for digits, 0 for ImageNet and Tiny ImageNet, else
            0.1.
        max_train_samples: train on this many images only, equally many of each class.
        label_noise: share of the training labels that are replaced by another class, in [0, 1).
        augment: False trains on the images as they are evaluated.
        num_views: how many augmentations an image has, one an epoch in turn; training batches then have `sample_ids`, a
            number for each, by which `DualHeadKD` keeps the logits of a teacher. None draws anew in each epoch.
        padding_mode: what is shifted in: `"zeros"` (black), or the image mirrored at its edge.
        mean: of the three channels, of values in [0, 1]; None is the data set's, or ImageNet's.
        std: of the three channels.
        num_workers: processes that load batches.
        seed: of splits, subset, label noise, training order and augmentation.
        cache_dir: folder of the cache; None is `$XDG_CACHE_HOME/lit_logits` or `~/.cache/lit_logits`.

    Raises:
        ValueError: If an argument is out of range; from `num_classes` or `prepare_data`, if the source cannot be read
            or labels are missing.
    """

    def __init__(
        self,
        # With `Path`, jsonargparse does not read a file of that name as part of a recipe. It is last for the dumps.
        source: str | ImageSource | Path = "digits",
        image_size: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        val_fraction: float | None = None,
        test_fraction: float | None = None,
        max_train_samples: int | None = None,
        label_noise: float = 0.0,
        augment: bool = True,
        num_views: int | None = None,
        padding_mode: Literal["zeros", "reflect"] = "zeros",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        num_workers: int = 0,
        seed: int = 42,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        images = as_part("source", source, ImageSource)
        self.preset = find_preset(images.path)
        self.image_size = image_size if image_size is not None else self.preset.image_size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size if eval_batch_size is not None else batch_size
        self.fractions = {
            "val": val_fraction if val_fraction is not None else self.preset.val_fraction,
            "test": test_fraction if test_fraction is not None else self.preset.test_fraction,
        }
        self.max_train_samples, self.label_noise = max_train_samples, label_noise
        self.augment, self.padding_mode = augment, padding_mode
        self.num_views = num_views if augment or num_views is None else 1
        mean, std = list(mean or self.preset.mean), list(std or self.preset.std)
        self.num_workers, self.seed = num_workers, seed
        check_at_least(4, image_size=self.image_size)
        check_at_least(1, batch_size=batch_size, eval_batch_size=self.eval_batch_size)
        check_at_least(1, max_train_samples=1 if max_train_samples is None else max_train_samples)
        check_at_least(1, num_views=1 if num_views is None else num_views)
        check_at_least(0, num_workers=num_workers)
        check_fractions(self.fractions)
        _check_options(label_noise, padding_mode, mean, std)
        label_column = images.label_column or self.preset.label_column
        self.images = ImageSplits(replace(images, path=self.preset.path, label_column=label_column))
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self._resized_crop = self.preset.crop == "resized" and not is_small(self.image_size)
        ratio = RESIZE_RATIO if self._resized_crop else 1.0
        self.library = ImageLibrary(self.images, self.image_size, self.cache_dir, ratio)
        self._moments = torch.tensor([mean, std])
        self._items: dict[str, ImageItems] = {}
        self._resume = ResumePoint("images")

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers; known before anything is prepared."""
        return self.images.class_names

    @property
    def num_classes(self) -> int:
        """C, the number of classes; known before anything is prepared."""
        return len(self.class_names)

    def prepare_data(self) -> None:
        """Download the source if need be, check its labels, and decode small images into the cache."""
        self.library.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Open what `prepare_data` made ready, and draw splits, subset and label noise.

        Raises:
            RuntimeError: If small images were not decoded.
            ValueError: If `label_noise` is to replace labels and there is one class only.
        """
        if self._items:
            return
        labels = self.library.labels
        plan = plan_splits(labels, self.fractions, self.seed)
        for name, (own, rows) in plan.items():
            classes = labels[own][rows]
            if name == "train":
                picked = pick_balanced(classes, self.max_train_samples or len(rows), self.seed)
                rows, classes = rows[picked], self._add_noise(classes[picked])
            drawn: dict[str, Any] = {}
            if name == "train":
                drawn = {"augmentation": self._augmentation, "num_views": self.num_views}
            self._items[name] = ImageItems(self.library.store(own), rows, classes, seed=self.seed, **drawn)
        sizes = [f"{name}: {len(items):,} images" for name, items in self._items.items()]
        same = ["val and test are the same images"] if "val" in plan and plan["val"] is plan["test"] else []
        rank_zero_info("; ".join(sizes + same))

    def train_dataloader(self) -> Any:
        """Return the shuffled training batches, from the checkpoint's position on if one is restored."""
        return self._resume.apply(self._loader("train", self.batch_size), self.trainer)

    def val_dataloader(self) -> Any:
        """Return all validation batches in order; an empty list if validation is switched off."""
        return self._loader("val", self.eval_batch_size) if "val" in self._items else []

    def test_dataloader(self) -> Any:
        """Return all test batches in order; an empty list if the test split is switched off."""
        return self._loader("test", self.eval_batch_size) if "test" in self._items else []

    def predict_dataloader(self) -> Any:
        """Return the test batches; no rank repeats an image."""
        return self._loader("test", self.eval_batch_size, fill=False) if "test" in self._items else []

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Augment a training batch, on the device, by what was drawn for it, and normalise any batch.

        Returns:
            `pixel_values` (B, 3, H, W), float32 or what the trainer's precision wants of its inputs, and `labels` (B,).
        """
        images = batch["pixel_values"]
        if "shifts" in batch:
            images = shift_and_flip(images, batch["shifts"], flips=batch["flips"], padding_mode=self.padding_mode)
        elif "flips" in batch:
            images = torch.where(batch["flips"][:, None, None, None], images.flip(-1), images)
        self._moments = self._moments.to(images.device)
        result = {"pixel_values": normalize(images, *self._moments)}
        result |= {name: batch[name] for name in ("labels", "sample_ids") if name in batch}
        # The trainer converts inputs before they are transferred, when these were uint8.
        return self.trainer.precision_plugin.convert_input(result) if self.trainer else result

    @property
    def views_fingerprint(self) -> str | None:
        """Digest of what the `sample_ids` of training batches stand for; None if each epoch draws anew."""
        if self.num_views is None:
            return None
        look = self.image_size, self.padding_mode, self._augmentation, self._moments.tolist(), self.num_views
        picked = self.max_train_samples, sorted(self.fractions.items()), self.seed
        return digest(self.images.key, look, picked, FORMAT_VERSION)

    @property
    def _augmentation(self) -> Augmentation | None:
        padding = None if self._resized_crop else self.image_size // 8 or 1
        return Augmentation(padding, self.preset.flip) if self.augment else None

    def _add_noise(self, labels: Ints) -> Ints:
        if self.label_noise and self.num_classes < 2:
            raise ValueError(f"Expected `label_noise` to be 0 for data of one class, but got {self.label_noise}.")
        return add_label_noise(labels, self.label_noise, self.num_classes, self.seed) if self.label_noise else labels

    def _loader(self, split: str, batch_size: int, *, fill: bool = True) -> Any:
        return block_loader(
            self._items[split],
            batch_size,
            self.trainer,
            self.seed,
            train=split == "train",
            fill=fill,
            collate_fn=collate_images,
            items="images",
            advice="Lower `batch_size`, the fractions that are held out, or raise `max_train_samples`.",
            **self._loading,
        )

    def _order(self) -> dict[str, Any]:
        size = len(self._items["train"]) if self._items else 0
        data = digest(self.images.path, self.images.subset, size, sorted(self.fractions.items()), self.seed)
        return {"data": data, "batch_size": self.batch_size, "world_size": self._world_size}


def _check_options(label_noise: float, padding_mode: str, mean: list[float], std: list[float]) -> None:
    if not 0 <= label_noise < 1:
        raise ValueError(f"Expected `label_noise` to be in [0, 1), but got {label_noise}.")
    if padding_mode not in ("zeros", "reflect"):
        raise ValueError(f"Expected `padding_mode` to be 'zeros' or 'reflect', but got {padding_mode!r}.")
    for name, values in {"mean": mean, "std": std}.items():
        if len(values) != 3:
            raise ValueError(f"Expected `{name}` to have a value for each of 3 channels, but got {values}.")
    if min(std) <= 0:
        raise ValueError(f"Expected `std` to be positive, but got {std}.")
