"""Splits on disk, as data modules of text prepare them: an Arrow file each, and `sizes.json`, which is written last."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_info

__all__ = ["open_splits", "read_sizes", "write_sizes"]

Size = TypeVar("Size")


def write_sizes(directory: Path, sizes: Mapping[str, Any]) -> None:
    """Write `sizes.json`.

    Args:
        directory: existing folder of the splits.
        sizes: named tuple of each split.
    """
    (directory / "sizes.json").write_text(json.dumps({name: size._asdict() for name, size in sizes.items()}, indent=1))


def read_sizes(directory: Path, size: Callable[..., Size]) -> dict[str, Size]:
    """Read `sizes.json`.

    Args:
        directory: folder of the splits.
        size: named tuple that was written.
    """
    return {name: size(**fields) for name, fields in json.loads((directory / "sizes.json").read_text()).items()}


def open_splits(directory: Path, size: Callable[..., Any]) -> dict[str, Dataset]:
    """Memory-map the Arrow file of each split, and log the sizes.

    Args:
        directory: folder that `prepare_data` wrote.
        size: named tuple of a split's size.

    Raises:
        RuntimeError: If the folder is missing.
    """
    if not directory.is_dir():
        raise RuntimeError(f"Expected `prepare_data` to have written {directory}, but it is not there.")
    sizes = read_sizes(directory, size)
    rank_zero_info("; ".join(f"{name}: {size}" for name, size in sizes.items()))
    return {name: Dataset.from_file(str(directory / f"{name}.arrow")) for name in sizes}
