"""Images where they lie, and a split of them as the batches that go to the device.

On the wire a batch is uint8, with what was drawn for its augmentation beside it. All draws are functions of the seed,
the epoch and the item's index: ranks, workers and a resumed run draw what one process in one run would have drawn.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from lit_logits.datamodules.caching import hide_progress
from lit_logits.datamodules.images.transforms import CROP_DRAWS, centre_box, crop_to_array, random_box, to_rgb
from lit_logits.datamodules.sampling import hash_uniform

__all__ = [
    "Augmentation",
    "DecodedImages",
    "ImageItems",
    "ImageStore",
    "MappedImages",
    "collate_images",
    "write_images",
]

Ints = NDArray[np.int64]
IMAGES_A_CHUNK = 256


class ImageStore(Protocol):
    """Reads images by their rows, and where asked to, a random crop of each."""

    def read(self, rows: Ints, draws: NDArray[np.float64] | None = None) -> NDArray[np.uint8]:
        """Return (B, 3, H, W) for B rows and, to crop, (B, 22) numbers in [0, 1) of `random_box`."""
        ...


class MappedImages:
    """Images of one size in a memory-mapped file, which the processes of a machine share.

    Args:
        file: as `write_images` wrote it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._images: NDArray[np.uint8] | None = None

    def read(self, rows: Ints, draws: NDArray[np.float64] | None = None) -> NDArray[np.uint8]:
        """Return (B, 3, H, W)."""
        if self._images is None:
            self._images = np.load(self.file, mmap_mode="r")
        return self._images[rows]

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "_images": None}  # a pickled memory map is a copy of the file


class DecodedImages:
    """Images that are decoded whenever they are read.

    Args:
        rows: a split of the data set.
        column: name of the images.
        image_size: side of the result.
        ratio: without a random crop, the central square of 1 / ratio of the shorter side is read.
    """

    def __init__(self, rows: datasets.Dataset, column: str, image_size: int, ratio: float = 1.0) -> None:
        self.rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column, self.image_size, self.ratio = column, image_size, ratio
        self.decoder = datasets.Image()

    def read(self, rows: Ints, draws: NDArray[np.float64] | None = None) -> NDArray[np.uint8]:
        """Return (B, 3, H, W).

        Raises:
            ValueError: If one cannot be read as an image; it names the file or the row.
        """
        images = np.empty((len(rows), 3, self.image_size, self.image_size), np.uint8)
        for i, value in enumerate(self.rows[rows.tolist()][self.column]):
            try:
                image = to_rgb(self.decoder.decode_example(value))
            except (OSError, SyntaxError, TypeError, ValueError, AttributeError) as error:
                name = (value or {}).get("path") or f"row {rows[i]} of {self.column!r}"
                raise ValueError(f"Expected {name} to be an image, but it cannot be read: {error}") from error
            box = centre_box(*image.size, self.ratio) if draws is None else random_box(*image.size, draws[i])
            images[i] = crop_to_array(image, box, self.image_size)
        return images


def write_images(file: Path, store: ImageStore, num_images: int, image_size: int) -> None:
    """Write all images of a store into one file for `MappedImages`, a chunk at a time."""
    shape = (num_images, 3, image_size, image_size)
    images = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    with tqdm(total=num_images, desc=f"Decoding {file.stem}", unit="img", disable=hide_progress(), leave=False) as bar:
        for start in range(0, num_images, IMAGES_A_CHUNK):
            stop = min(start + IMAGES_A_CHUNK, num_images)
            images[start:stop] = store.read(np.arange(start, stop))
            bar.update(stop - start)
    images.flush()


class Augmentation(NamedTuple):
    """How each training image is augmented.

    Attributes:
        padding: largest shift up, down, left and right, in pixels; None crops and resizes at random instead.
        flip: mirror half of the images left to right.
    """

    padding: int | None
    flip: bool


class ImageItems(Dataset):
    """The items of a split, read a batch at a time.

    Args:
        store: of the images.
        rows: (N,) of the store.
        labels: (N,) classes.
        augmentation: what to draw for training; None for evaluation.
        seed: of the draws.
        num_views: the draws of an epoch are those of its number modulo this, and batches have `sample_ids`; None draws
            anew in each epoch.
    """

    def __init__(
        self,
        store: ImageStore,
        rows: Ints,
        labels: Ints,
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        num_views: int | None = None,
    ) -> None:
        self.store, self.rows, self.labels = store, rows, labels
        self.augmentation, self.seed, self.num_views, self.epoch = augmentation, seed, num_views, 0

    def set_epoch(self, epoch: int) -> None:
        """Let the draws be those of an epoch."""
        self.epoch = epoch if self.num_views is None else epoch % self.num_views

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one item of `__getitems__`."""
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a batch; `DataLoader` asks for its items by this name.

        Returns:
            `pixel_values` (B, 3, H, W), uint8, and `labels` (B,), int64. With augmentation also `flips` (B,), bool, and
            for shifts `shifts` (B, 2), int64, down and right: see `shift_and_flip`. With `num_views` also `sample_ids`
            (B,), int64, a number for each view of each item.
        """
        items = np.asarray(indices, np.int64)
        rows, labels = self.rows[items], torch.from_numpy(self.labels[items])
        numbers = {}
        if self.num_views is not None:
            numbers["sample_ids"] = torch.from_numpy(items * self.num_views + self.epoch)
        if self.augmentation is None:
            return {"pixel_values": torch.from_numpy(self.store.read(rows)), "labels": labels, **numbers}
        padding, flip = self.augmentation
        count = 1 + (CROP_DRAWS if padding is None else 2)
        draws = hash_uniform(items, count, "augment", self.seed, self.epoch)
        pixels = self.store.read(rows, draws[:, 1:] if padding is None else None)
        batch = {"pixel_values": torch.from_numpy(pixels), "labels": labels, **numbers}
        batch["flips"] = torch.from_numpy(flip & (draws[:, 0] < 0.5))
        if padding is not None:
            batch["shifts"] = torch.from_numpy((draws[:, 1:] * (2 * padding + 1)).astype(np.int64) - padding)
        return batch


def collate_images(items: Any) -> dict[str, Tensor]:
    """Return a batch of `__getitems__` as it is, and a list of items as a batch."""
    return items if isinstance(items, dict) else default_collate(items)
