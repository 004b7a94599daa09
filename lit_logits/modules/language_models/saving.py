"""Writing a model's folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_logits.contracts import HasTokenizer, offers
from lit_logits.storage.folders import check_model_folder, replace_folder

__all__ = ["save_model_folder"]


def save_model_folder(
    folder: str | Path, save: Callable[[Path], object], *, tokenizer: Any = None, trainer: Any = None
) -> Path:
    """Write a folder for `from_pretrained`, as a whole or not at all; rank zero writes and the others wait.

    Args:
        folder: new, empty, or a saved model, which is replaced.
        save: writes config and weights into the folder that it is given.
        tokenizer: saved with it; default the data module's, where a trainer is attached and has one.
        trainer: of Lightning, or None.

    Returns:
        The folder's full path.

    Raises:
        ValueError: for a folder that holds anything else; nothing is written then.
    """
    path = Path(folder).expanduser().resolve()
    check_model_folder(path)
    if tokenizer is None and trainer is not None:
        tokenizer = trainer.datamodule.tokenizer if offers(trainer.datamodule, HasTokenizer) else None

    def write(target: Path) -> None:
        save(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)

    if trainer is None or trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_folder(path, write)
    if trainer is not None:
        trainer.strategy.barrier()
    return path
