"""A data module's part in resuming in mid-epoch: it takes the loader's position to the checkpoint and back."""

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

__all__ = ["ResumePoint", "Resumes"]


class ResumePoint:
    """Carries the training loader's position between a data module's checkpoints and its loaders.

    Lightning restores its own copy of the loader's state too late if `configure_optimizers` has read
    `trainer.estimated_stepping_batches`, and not at all at an epoch's end; a data module's state comes in time.

    Args:
        items: what a warning calls the rows of a batch.
    """

    def __init__(self, items: str) -> None:
        self.items = items
        self._saved: dict[str, Any] | None = None

    def apply(self, loader: Any, trainer: Trainer | None) -> Any:
        """Return a new training loader, moved to the restored position, or to that of the loader that it replaces."""
        previous = _fit_loader(trainer)
        if state := self._saved or (previous and previous.state_dict()):  # the latter when Lightning reloads
            loader.load_state_dict(state)
        self._saved = None
        return loader

    def state_dict(self, trainer: Trainer | None, order: dict[str, Any]) -> dict[str, Any]:
        """Return the training loader's position and `order`, which gives it a meaning; nothing outside of a fit."""
        loader = _fit_loader(trainer)
        return {} if loader is None else {"train": loader.state_dict(), "order": order}

    def load_state_dict(self, state_dict: dict[str, Any], trainer: Trainer | None, order: dict[str, Any]) -> None:
        """Keep a saved position for the training loader, and warn if it was one in another order of batches."""
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or not state_dict:
            return
        changed = {name: value for name, value in order.items() if value != state_dict["order"].get(name)}
        if changed:
            rank_zero_warn(
                f"Expected the checkpoint's {sorted(changed)} to be unchanged, but got {changed}. Training goes on at "
                f"the same batch index, but some {self.items} of this epoch are seen twice or never."
            )
        if (loader := _fit_loader(trainer)) is not None:
            loader.load_state_dict(state_dict["train"])
        else:
            self._saved = state_dict["train"]


class Resumes:
    """Give a data module its state in a checkpoint, and its loaders their common arguments.

    This is not a data module itself, so that the command line does not offer it as one.

    Attributes:
        trainer: as Lightning sets it; None outside of a run.
        num_workers: processes that load batches.
    """

    trainer: Any
    num_workers: int
    _resume: ResumePoint

    def state_dict(self) -> dict[str, Any]:
        """Return the training loader's position and what gives it a meaning."""
        return self._resume.state_dict(self.trainer, self._order())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved position for the training loader."""
        self._resume.load_state_dict(state_dict, self.trainer, self._order())

    @abstractmethod
    def _order(self) -> dict[str, Any]:
        """Return what, besides the position, decides which batch comes next."""

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _loading(self) -> dict[str, Any]:
        """Arguments of every loader; torch's draws a seed for its workers, from a generator that training shares."""
        generator = torch.Generator()
        return {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available(), "generator": generator}


def _fit_loader(trainer: Trainer | None) -> Any:
    """Return the training loader of the running fit, or None before Lightning asked for it."""
    if trainer is None or trainer.state.fn != TrainerFn.FITTING:
        return None
    return trainer.train_dataloader
