"""Where runs are kept: the folder of a new one, and the checkpoints of earlier ones."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["best_checkpoint", "claim_version", "last_checkpoint", "runs_folder"]


def runs_folder(logger: Namespace) -> Path:
    """Return where a parsed logger keeps its runs; that of Weights & Biases calls the name a project."""
    return Path(logger.save_dir, logger.get("project") or logger.get("name") or "")


def claim_version(logger: Any) -> None:
    """Make the folder of the next version of a logger that counts them, which no other run then takes.

    Lightning takes the first number without a folder when it first logs: two runs that start together share one, and
    overwrite each other's checkpoints. A version that is given is left alone.
    """
    counts = isinstance(logger, TensorBoardLogger | CSVLogger) and logger._version is None
    if not counts or "://" in str(logger.root_dir):  # a bucket, where folders cannot be claimed
        return
    while True:
        folder = Path(logger.root_dir, f"version_{logger.version}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
            return
        except FileExistsError:
            logger._version = None  # so that it is found anew


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest `last.ckpt` of the runs in a folder that is whole; tell of newer ones that are not."""
    found = [*folder.glob("*/checkpoints/last*.ckpt"), *folder.glob("checkpoints/last*.ckpt")]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        # A file of torch is a zip archive, whose table of contents is its end. Sharded checkpoints are folders.
        if path.is_dir() or zipfile.is_zipfile(path):
            return path
        rank_zero_warn(f"`ckpt_path: last` skips {path}: it is cut off or no checkpoint ({path.stat().st_size} bytes).")
    return None


def best_checkpoint(folder: Path) -> Path | None:
    """Return the best checkpoint of the newest run in a folder, as the `ModelCheckpoint` of that run has it; or None.

    It is looked for beside `last.ckpt`, so that folders can be moved.
    """
    last = last_checkpoint(folder)
    if last is None or last.is_dir():
        return None
    states = torch.load(last, map_location="meta", weights_only=True).get("callbacks", {}).values()
    names = [Path(state["best_model_path"]).name for state in states if state.get("best_model_path")]
    return next((path for path in (last.with_name(name) for name in names) if path.exists()), None)
