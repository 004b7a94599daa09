"""`LineProgress`: progress for output that goes to a file."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

__all__ = ["LineProgress"]


class LineProgress(ProgressBar):
    """Print a line every `log_every_n_steps` steps, one a validation and about twenty a prediction, on rank zero.

    Example:
        >>> LineProgress().printed_step
        0
    """

    printed_step = 0

    def disable(self) -> None:
        """Do nothing: Lightning disables the bars of ranks other than zero, which do not print here."""

    def enable(self) -> None:
        """Do nothing, as for `disable`."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Print once for each step that is due, however many batches are accumulated into it."""
        due = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due and trainer.global_step != self.printed_step:
            self.printed_step = trainer.global_step
            self._print(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of the validation."""
        self._print(trainer, pl_module)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print how many batches of rank zero are done."""
        done, total = batch_idx + 1, trainer.num_predict_batches[dataloader_idx]
        every = 1 if total == float("inf") else max(1, int(total) // 20)
        if trainer.is_global_zero and (done % every == 0 or done == total):
            print(f"batch {done} of {total}", flush=True)

    def _print(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            metrics = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k != "v_num"}
            values = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
            print(f"epoch {trainer.current_epoch}  step {trainer.global_step}  {values}", flush=True)
