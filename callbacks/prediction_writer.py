"""`PredictionWriter`: the predictions, a file a batch."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_logits.storage.folders import replace_file

__all__ = ["PredictionWriter"]


class PredictionWriter(BasePredictionWriter):
    """Write the prediction of each batch as it is made, with the numbers of its rows in the data set.

    A file `predictions/BATCH-RANK.pt` of the run folder holds `{"predictions": ..., "rows": [...]}` for `torch.load`;
    `rows` is None if the loader's sampler gives no numbers. Nothing is kept in memory, and a killed run keeps the files
    that it has written.

    Example:
        >>> PredictionWriter().interval.value
        'batch'
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the run folder, which ranks do together: later one may have fewer batches than another, or none."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir, "predictions")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one file, which appears whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        prefix = f"{dataloader_idx}-" if dataloader_idx else ""
        file = self._folder / f"{prefix}{batch_idx:06d}-{trainer.global_rank}.pt"
        saved = {"predictions": prediction, "rows": list(batch_indices) if batch_indices else None}
        replace_file(file, partial(torch.save, saved))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the files are."""
        rank_zero_info(f"Predictions: {self._folder}")
