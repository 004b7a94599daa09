"""A source's images at one size: small ones decoded once into the cache, larger ones whenever they are read."""

import json
from functools import cached_property
from pathlib import Path

import numpy as np

from lit_logits.datamodules.caching import build_once, digest
from lit_logits.datamodules.images.sources import ImageSplits
from lit_logits.datamodules.images.storage import DecodedImages, ImageStore, MappedImages, write_images
from lit_logits.datamodules.sampling import Ints

__all__ = ["ImageLibrary", "is_small"]

FORMAT_VERSION = 2
"""Part of every cache entry's name: raise it when the same arguments are to give other images."""

MAX_CACHED_SIZE = 64


def is_small(image_size: int) -> bool:
    """Tell whether images of this side are decoded once into the cache."""
    return image_size <= MAX_CACHED_SIZE


class ImageLibrary:
    """Images and classes of a source's own splits, whole and in their order.

    A cache entry is named by a digest of the source's content and the size. What is chosen or drawn from a split, such
    as held-out rows, is not part of it.

    Args:
        images: the source's images.
        image_size: side of the images.
        cache_dir: folder of the cache.
        ratio: images are the central square of 1 / ratio of the shorter side.
    """

    def __init__(self, images: ImageSplits, image_size: int, cache_dir: Path, ratio: float = 1.0) -> None:
        self.images, self.image_size, self.cache_dir, self.ratio = images, image_size, cache_dir, ratio

    @cached_property
    def directory(self) -> Path:
        """The cache entry of small images."""
        return self.cache_dir / f"images-{digest(FORMAT_VERSION, self.images.key, self.image_size, self.ratio)}"

    def prepare(self) -> None:
        """Download the source if need be, check its columns and labels, and decode small images into the cache."""
        if is_small(self.image_size):
            build_once(self.directory, self._write)
        else:
            _ = self.images.image_column, self.images.labels

    @cached_property
    def labels(self) -> dict[str, Ints]:
        """Classes of the source's own splits.

        Raises:
            RuntimeError: If small images were not prepared.
        """
        if not is_small(self.image_size):
            return self.images.labels
        if not self.directory.is_dir():
            raise RuntimeError(f"Expected `prepare_data` to have written {self.directory}, but it is not there.")
        names = json.loads((self.directory / "splits.json").read_text())
        return {name: np.load(self.directory / f"{name}-labels.npy") for name in names}

    def store(self, split: str) -> ImageStore:
        """Return the images of one of the source's own splits."""
        return MappedImages(self.directory / f"{split}.npy") if is_small(self.image_size) else self._decoded(split)

    def _decoded(self, split: str) -> DecodedImages:
        return DecodedImages(self.images.splits[split], self.images.image_column, self.image_size, self.ratio)

    def _write(self, directory: Path) -> None:
        for name, labels in self.images.labels.items():
            write_images(directory / f"{name}.npy", self._decoded(name), len(labels), self.image_size)
            np.save(directory / f"{name}-labels.npy", labels)
        (directory / "splits.json").write_text(json.dumps([*self.images.labels]))
