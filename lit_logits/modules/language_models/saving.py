"""Writing of models: a folder, or a file of weights."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lit_logits.contracts import HasTokenizer, offers
from lit_logits.storage.folders import check_model_folder, replace_file, replace_folder

__all__ = ["save_model_file", "save_model_folder"]


def save_model_folder(
    folder: str | Path, save: Callable[[Path], object], *, tokenizer: Any = None, trainer: Any = None
) -> Path:
    """Write a folder for `from_pretrained`, as a whole or not at all; rank zero writes and the others wait.

    Args:
        folder: new, empty, or a saved model, which is replaced.
        save: writes config and weights into the folder that it is given.
        tokenizer: saved with it; default the data module's, if a trainer is attached and has one.
        trainer: of Lightning, or None.

    Returns:
        The folder's full path.

    Raises:
        ValueError: If the folder holds anything but a saved model; nothing is written then.
    """
    path = Path(folder).expanduser().resolve()
    check_model_folder(path)
    if tokenizer is None and trainer is not None:
        tokenizer = trainer.datamodule.tokenizer if offers(trainer.datamodule, HasTokenizer) else None

    def write(target: Path) -> None:
        save(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)

    _on_rank_zero(trainer, path, partial(replace_folder, path, write))
    return path


def save_model_file(path: str | Path, save: Callable[[Path], object], *, trainer: Any = None) -> Path:
    """Write a file, as a whole or not at all; rank zero writes and the others wait.

    Args:
        path: the file, which is replaced if it is there.
        save: writes the file that it is given.
        trainer: of Lightning, or None.

    Returns:
        The file's full path.
    """
    path = Path(path).expanduser().resolve()
    _on_rank_zero(trainer, path, partial(replace_file, path, save))
    return path


def _on_rank_zero(trainer: Any, path: Path, write: Callable[[], None]) -> None:
    if trainer is None or trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    if trainer is not None:  # other ranks may read the files as soon as they return
        trainer.strategy.barrier()
