"""`LastCheckpoint`: a checkpoint from which a stopped run can always resume."""

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

__all__ = ["LastCheckpoint"]


class LastCheckpoint(ModelCheckpoint):
    """Keep `checkpoints/last.ckpt` of the run folder up to date, whatever makes training stop.

    It is saved after every validation and epoch, at the end, and when an exception, Ctrl-C or SIGTERM ends training.
    With several processes it is not saved after an exception, as a rank that has failed cannot save together with the
    others. A run that has taken no step leaves no checkpoint. Lightning's own `save_last` follows a top-k checkpoint,
    and stays at the best step once the metric gets worse.

    Example:
        >>> LastCheckpoint().state_dict()
        {}
    """

    def __init__(self) -> None:
        super().__init__(save_top_k=0, save_last=True)  # the parent only chooses the folder
        self.saved_step: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a resumed run has its own folder."""
        return {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step that was restored, which a file already holds."""
        super().on_train_start(trainer, pl_module)
        self.saved_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless the epoch is about to end: its own hook saves with the epoch counted as complete."""
        if not trainer.is_last_batch:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, and say how to resume."""
        # Saving needs all ranks, and SIGTERM stops them all.
        together = trainer.world_size == 1 or isinstance(exception, SIGTERMException)
        try:
            saved = together and self._save(trainer)
        except Exception as error:  # such as a full disk; it must not hide the first exception
            rank_zero_warn(f"No checkpoint was saved: {error}")
            return
        if saved:
            rank_zero_info(f"Stopped at step {self.saved_step}; go on with `--ckpt_path {self.dirpath}/last.ckpt`.")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless training is about to end: what others write at its end is not lost if it is killed before."""
        if not _is_ending(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> bool:
        """Write the checkpoint if steps were taken since the last, and return whether it is up to date."""
        if self.saved_step is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return False
        if self.saved_step != trainer.global_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(str(self.dirpath), "last.ckpt"), weights_only=False)
            self.saved_step = trainer.global_step
        return Path(str(self.dirpath), "last.ckpt").is_file()


def _is_ending(trainer: Trainer) -> bool:
    """Return whether no epoch follows the one that ends."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    is_last_epoch = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
    return trainer.should_stop or is_last_epoch or 0 <= steps <= trainer.global_step
