"""Tiny ImageNet as its authors pack it, in `tiny-imagenet-200.zip`.

Training images lie in `train/CLASS/images/`, validation images in `val/images/` with their classes in
`val/val_annotations.txt`. Test images have no labels, and are left out.
"""

from pathlib import Path

import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image

__all__ = ["is_tiny_imagenet", "read_tiny_imagenet"]


def is_tiny_imagenet(path: str) -> bool:
    """Return whether a folder has this layout."""
    folder = Path(path).expanduser()
    return bool(path) and (folder / "val" / "val_annotations.txt").is_file() and (folder / "train").is_dir()


def read_tiny_imagenet(path: str) -> dict[str, Dataset]:
    """Return the splits `train` and `validation`; classes are numbered in the order of their WordNet ids.

    Raises:
        ValueError: If a validation image is of a class that has no folder in `train`.
    """
    folder = Path(path).expanduser().absolute()
    images = {found.name: _images(found / "images") for found in sorted((folder / "train").iterdir()) if found.is_dir()}
    names = [name for name, files in images.items() if files]
    train = [(file, name) for name in names for file in images[name]]
    lines = (folder / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
    held = [line.split("\t")[:2] for line in lines if line.strip()]
    if unknown := sorted({name for _, name in held} - set(names)):
        raise ValueError(
            f"Expected the classes of {folder / 'val'} to have images in {folder / 'train'}, but {unknown[:5]} have"
            " none. Unpack the archive again."
        )
    val = [(str(folder / "val" / "images" / file), name) for file, name in held]
    return {split: _data_set(rows, names) for split, rows in {"train": train, "validation": val}.items()}


def _images(folder: Path) -> list[str]:
    suffixes = PIL.Image.registered_extensions()
    return sorted(str(file) for file in folder.glob("*") if file.suffix.lower() in suffixes)


def _data_set(rows: list[tuple[str, str]], names: list[str]) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": [file for file, _ in rows], "label": [name for _, name in rows]}, features)
