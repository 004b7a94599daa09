"""`AtomicCheckpointIO`: checkpoints that are whole or not there, whatever kills the process that writes them."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_logits.storage.folders import replace_file

__all__ = ["AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, wait until it is on disk, and move it there.

    Lightning writes it into the folder for temporary files. From another file system the move is a copy: a process that
    is killed meanwhile, or a full disk, leaves a part of the new checkpoint in the place of the old one. Paths of other
    protocols, such as s3, are Lightning's own.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: what Lightning saves.
            path: of the file.
            storage_options: refused, as in `TorchCheckpointIO`.

        Raises:
            OSError: If the disk is full or cannot be written; the file in this place is as it was.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, partial(_write, checkpoint))


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a file with torch, which has a RuntimeError about positions in place of what the system says."""
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
