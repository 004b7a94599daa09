"""`LastCheckpoint`: a run that was stopped can always go on."""

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

__all__ = ["LastCheckpoint"]


class LastCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt` of the run folder up to date, whatever makes training stop.

    Saves after every validation and epoch, at the end, and when an exception, Ctrl-C or SIGTERM ends training; with
    several processes, where one that failed cannot save together with the others, not after an exception. A run that
    has taken no step leaves no checkpoint. Lightning's `save_last` comes only with a top-k checkpoint, and stays behind
    once the metric is past its best.

    Example:
        >>> LastCheckpoint().state_dict()
        {}
    """

    def __init__(self) -> None:
        super().__init__(save_top_k=0, save_last=True)  # of the parent only its choice of the folder is used
        self.saved_step: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a run that goes on has a folder of its own."""
        return {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was restored is in a file already."""
        super().on_train_start(trainer, pl_module)
        self.saved_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves, unless the epoch is about to end: its own hook saves with the epoch counted as complete."""
        if not trainer.is_last_batch:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves and tells how to go on."""
        together = trainer.world_size == 1 or isinstance(exception, SIGTERMException)
        try:
            saved = together and self._save(trainer)
        except Exception as error:  # such as a full disk: the first exception is the one to be seen
            rank_zero_warn(f"No checkpoint was saved: {error}")
            return
        if saved:
            rank_zero_info(f"Stopped at step {self.saved_step}; go on with `--ckpt_path {self.dirpath}/last.ckpt`.")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves."""
        self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> bool:
        """Write the checkpoint if there are steps that it lacks; whether it is up to date."""
        if self.saved_step is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return False
        if self.saved_step != trainer.global_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(str(self.dirpath), "last.ckpt"), weights_only=False)
            self.saved_step = trainer.global_step
        return Path(str(self.dirpath), "last.ckpt").is_file()
