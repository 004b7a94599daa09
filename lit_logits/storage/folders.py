"""Files, and folders of saved models, that are replaced as a whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

__all__ = ["check_model_folder", "replace_file", "replace_folder", "restore_replaced"]


def check_model_folder(path: Path) -> None:
    """Raise for a folder that holds anything but a saved model.

    Raises:
        ValueError: If it is a file, or a folder that is neither empty nor has a config.json.
    """
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if (names and "config.json" not in names) or path.is_file():
        holds = f"holds {names[0]!r}" if names else "is a file"
        raise ValueError(f"Expected `folder` to be new, empty or a saved model, but {path} {holds}.")


def replace_file(target: Path, write: Callable[[Path], object], *, partial: Path | None = None) -> None:
    """Let `write` make a file beside `target` and move it into place once it is on disk; if it fails, nothing changes.

    Args:
        target: the file; its folder must be there.
        write: writes the file that it is given.
        partial: that file, on the same file system; default `target` with `.partial` after its name.
    """
    partial = partial or _beside(target, "partial")
    try:
        write(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    # The order in which a crash loses nothing: the file is on disk, then it moves, then the move is on disk.
    _sync(partial)
    os.replace(partial, target)
    _sync(target.parent)


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `path`, then swap the two; if it fails, `path` is as it was."""
    restore_replaced(path)
    partial, replaced = _beside(path, "partial"), _beside(path, "replaced")
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        write(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(path: Path) -> None:
    """Undo a swap that a kill cut off between its two renames."""
    replaced = _beside(path, "replaced")
    if replaced.is_dir():
        shutil.rmtree(replaced) if path.exists() else replaced.rename(path)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
