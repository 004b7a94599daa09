"""Images and their classes: which columns hold them, and which of a data set's own splits can be used.

A validation or test split without labels, as test splits on the hub often are, counts as absent.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray

from lit_logits.datamodules.caching import digest
from lit_logits.datamodules.images.reading import fingerprint_images, read_features, read_splits
from lit_logits.datamodules.sources import SPLIT_NAMES

__all__ = ["ImageSource", "ImageSplits"]


@dataclass(frozen=True)
class ImageSource:
    """Where images and their classes come from.

    Args:
        path: `"digits"` (1,797 images of 8 × 8, embedded), `"cifar10"`, `"cifar100"`, `"tiny-imagenet"`,
            `"imagenet"`, any other image data set on the Hugging Face hub, or a folder with images as `class/*.png` or
            `train|validation|test/class/*.png`, with parquet files, as `Dataset.save_to_disk` wrote it, or as Tiny
            ImageNet is packed (`tiny-imagenet-200`).
        subset: configuration of a Hugging Face data set.
        image_column: name of the images; None finds the only column of type `datasets.Image`.
        label_column: name of the classes, a column of `ClassLabel`, integers or strings; None finds the only
            `ClassLabel`.
    """

    path: str
    subset: str | None = None
    image_column: str | None = None
    label_column: str | None = None


class ImageSplits:
    """The images and classes of a source, by its own splits. Nothing is read before it is asked for.

    Args:
        source: where they come from; its path is one of `lit_logits.datamodules.images.reading`.
    """

    def __init__(self, source: ImageSource) -> None:
        self.path = str(Path(source.path).expanduser()) if source.path.startswith("~") else source.path
        self.subset = source.subset
        self._given = source.image_column, source.label_column

    @cached_property
    def key(self) -> str:
        """Digest of the content and the choice of columns."""
        return digest(fingerprint_images(self.path, self.subset), self._given)

    @cached_property
    def splits(self) -> dict[str, Dataset]:
        """The source's own splits that are not empty, under `"train"`, `"val"` and `"test"`."""
        found = read_splits(self.path, self.subset)
        own = {split: name for split, known in SPLIT_NAMES.items() for name in reversed(known) if found.get(name)}
        if "train" not in own:
            raise ValueError(
                f"Expected {self.path!r} to have images in a split named 'train', but its splits are {[*found]}."
            )
        return {split: found[name] for split, name in own.items()}

    @cached_property
    def image_column(self) -> str:
        """Name of the column of images."""
        return _find_column("image", Image, self._features, self._given[0])

    @cached_property
    def label_column(self) -> str:
        """Name of the column of classes."""
        return _find_column("label", ClassLabel, self._features, self._given[1])

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        feature = self._features[self.label_column]
        return list(feature.names) if isinstance(feature, ClassLabel) else [str(value) for value in self._values]

    @cached_property
    def labels(self) -> dict[str, NDArray[np.int64]]:
        """Class of each row, by split, without the splits that have no labels.

        Raises:
            ValueError: If labels are missing in the training split, or in a part of another split.
        """
        labels = {name: self._encode(rows) for name, rows in self.splits.items()}
        for name, classes in list(labels.items()):
            missing = int((classes < 0).sum())
            if missing == len(classes) and name != "train":
                rank_zero_warn(
                    f"Expected the {name} split of {self.path!r} to have labels, but all of them are -1 or null. It is "
                    f"taken for absent; see `{name}_fraction`."
                )
                del labels[name]
            elif missing:
                raise ValueError(
                    f"Expected every label in the column {self.label_column!r} to be a class, but {missing} of "
                    f"{len(classes)} in the {name} split are -1 or null. Remove these rows, or give another "
                    "`label_column`."
                )
        return labels

    @cached_property
    def _features(self) -> Features:
        """The columns' types; a data set on the hub need not be downloaded for them."""
        return read_features(self.path, self.subset) or self.splits["train"].features

    @cached_property
    def _values(self) -> list[Any]:
        """Distinct values of a label column that is not a `ClassLabel`, sorted."""
        kind = str(getattr(self._features[self.label_column], "dtype", "a list"))
        if not kind.startswith(("int", "uint", "string", "large_string")):
            raise ValueError(f"Expected `label_column` to hold classes, integers or strings, but got {kind}.")
        return sorted(set(self._column(self.splits["train"]).to_pylist()) - {None, -1})

    def _encode(self, rows: Dataset) -> NDArray[np.int64]:
        """Return the rows' classes, −1 where one is missing."""
        column = self._column(rows)
        if isinstance(self._features[self.label_column], ClassLabel):
            return column.fill_null(-1).to_numpy().astype(np.int64)
        numbers = {**{value: number for number, value in enumerate(self._values)}, None: -1, -1: -1}
        values = column.to_pylist()
        if unknown := set(values) - set(numbers):
            raise ValueError(
                f"Expected all labels to be among the {len(self._values)} of the training split, but got "
                f"{sorted(unknown)[:5]}."
            )
        return np.array([numbers[value] for value in values], np.int64)

    def _column(self, rows: Dataset) -> Any:
        """Return the labels as an Arrow column, without reading images."""
        return rows.select_columns([self.label_column]).with_format("arrow")[:].column(self.label_column)


def _find_column(kind: str, feature: type, features: Features, given: str | None) -> str:
    """Return the given column if it can be used, else the only one of a type, or say what there is to choose from."""
    found = [name for name, other in features.items() if isinstance(other, feature)]
    if given is not None:
        allowed = found if feature is Image else list(features)
        if given not in allowed:
            raise ValueError(f"Expected `{kind}_column` to be one of {allowed}, but got {given!r}.")
        return given
    if len(found) != 1:
        advice = f"Give one as `{kind}_column`." if found or kind == "label" else "See `source` for what can be read."
        folder = (
            " A folder has labels if its images lie in folder/class/, and of two classes at least."
            if kind == "label" and not found
            else ""
        )
        raise ValueError(
            f"Expected one column of type {feature.__name__} among {list(features)}, but got {found}. {advice}{folder}"
        )
    return found[0]
