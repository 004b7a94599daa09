"""Opens what holds images: scikit-learn's digits, a local folder, or a Hugging Face data set.

A path is empty for the digits, which scikit-learn carries; a local folder with images as `folder/class/*.png` or
`folder/train|validation|test/class/*.png`, with parquet files, as `Dataset.save_to_disk` wrote it, or as Tiny ImageNet
is packed; or a name on the hub.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image, load_dataset, load_dataset_builder, load_from_disk
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_logits.datamodules.caching import digest
from lit_logits.datamodules.images.tiny_imagenet import is_tiny_imagenet, read_tiny_imagenet
from lit_logits.datamodules.sources import SPLIT_NAMES

__all__ = ["fingerprint_images", "folder_kind", "read_features", "read_splits"]

FolderKind = Literal["saved", "tiny-imagenet", "images", "parquet", "empty", "none"]


def folder_kind(path: str) -> FolderKind:
    """Tell what a folder holds: a saved data set, Tiny ImageNet, images, parquet files, none of these; or no folder."""
    if not path or not Path(path).is_dir():
        return "none"
    if any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return "saved"
    if is_tiny_imagenet(path):
        return "tiny-imagenet"
    suffixes = PIL.Image.registered_extensions()
    kind: FolderKind = "empty"
    for file in _walk(path):
        suffix = Path(file).suffix.lower()
        if suffix in suffixes:
            return "images"
        kind = "parquet" if suffix == ".parquet" else kind
    return kind


def fingerprint_images(path: str, subset: str | None) -> str:
    """Return a digest of the content.

    Name, size and time of change stand for a folder's files. A data set on the hub is identified by its name, subset
    and revision.

    Raises:
        ValueError: If there is nothing at the path.
    """
    if folder_kind(path) in ("saved", "tiny-imagenet", "images", "parquet"):
        stats = [(os.path.relpath(file, path), os.stat(file)) for file in _walk(path)]
        return digest("folder", sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats), subset)
    return digest("dataset", path, subset, _builder(path, subset).hash) if path else digest("digits")


def read_features(path: str, subset: str | None) -> Features | None:
    """Return the columns and their types, or None where only `read_splits` can tell them.

    Raises:
        ValueError: If there is nothing at the path.
    """
    known = not path or folder_kind(path) in ("saved", "tiny-imagenet", "images")
    return None if known else _builder(path, subset).info.features


def read_splits(path: str, subset: str | None) -> dict[str, Dataset]:
    """Return the data set's own splits under its own names.

    Raises:
        ValueError: If there is nothing at the path, or a `subset` of what has none.
    """
    kind = folder_kind(path)
    if subset is not None and (not path or kind in ("saved", "tiny-imagenet", "images")):
        raise ValueError(f"Expected `subset` to be None for {path or 'digits'!r}, but got {subset!r}.")
    if not path:
        return {"train": _read_digits()}
    if kind == "saved":
        saved: Any = load_from_disk(path)
        return {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    if kind == "tiny-imagenet":
        return read_tiny_imagenet(path)
    if kind == "images":
        _tell_empty_classes(path)
        return dict(load_dataset("imagefolder", data_dir=path))
    _builder(path, subset)  # its errors are the helpful ones
    return dict(load_dataset(path, subset))


def _read_digits() -> Dataset:
    """Return scikit-learn's digits, their values 0..16 stretched to 0..255."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    return Dataset.from_dict({"image": list(images), "label": digits.target}, features=features)


def _builder(path: str, subset: str | None) -> Any:
    """Return the `datasets` builder of a hub name or of a folder with parquet files.

    Raises:
        ValueError: If there is nothing to build from; it says why.
    """
    kind = folder_kind(path)
    try:
        if kind == "none" and path.startswith(("/", "./", "../")):
            raise FileNotFoundError("that is not the name of a data set")
        if kind == "empty":
            raise FileNotFoundError("it holds neither images nor parquet files")
        return load_dataset_builder(path, subset)
    except (OSError, ValueError, RuntimeError) as error:
        missing = "there is none" if Path(path).is_absolute() else f"it is not in {Path.cwd()}"
        folder = missing if kind == "none" else "it is there"
        raise ValueError(
            "Expected `source` to be 'digits', 'cifar10', 'cifar100', 'tiny-imagenet', 'imagenet', a folder of images "
            f"or a Hugging Face data set, but got {path!r}. As a folder: {folder}. As a data set (subset {subset!r}): "
            f"{error}"
        ) from error


def _tell_empty_classes(path: str) -> None:
    """Warn of folders among those of the classes that hold no image: they are no classes."""
    found = [folder for folder in Path(path).iterdir() if folder.is_dir()]
    known = {name for names in SPLIT_NAMES.values() for name in names}
    splits = [folder for folder in found if folder.name in known]
    folders = [folder for split in splits for folder in split.iterdir() if folder.is_dir()] if splits else found
    classes: dict[str, bool] = {}
    for folder in folders:
        if not folder.name.startswith((".", "_")):
            classes[folder.name] = classes.get(folder.name, False) or folder_kind(str(folder)) == "images"
    if empty := sorted(name for name, has_images in classes.items() if not has_images):
        rank_zero_warn(
            f"Expected images in every class folder of {path!r}, but {empty[:5]} ({len(empty)}) have none. They are no"
            " classes: a model has that many outputs fewer, and the classes behind them have other numbers."
        )


def _walk(path: str) -> Iterator[str]:
    """Yield all files in a folder and the folders in it, also through links."""
    for folder, _, names in os.walk(path, followlinks=True):
        yield from (os.path.join(folder, name) for name in names)
