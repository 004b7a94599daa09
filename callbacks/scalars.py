"""Scalars that callbacks measure now and then, logged at that step only."""

from collections.abc import Mapping

import torch
from lightning import Trainer

__all__ = ["log_scalars"]


def log_scalars(trainer: Trainer, values: Mapping[str, float], step: int | None = None) -> None:
    """Write `values` to every logger at `step`, by default the optimizer step that has just been taken.

    They also go to `callback_metrics`. `LightningModule.log` would repeat the last value at each step until the next
    measurement, and drop a measurement that is not at a multiple of `log_every_n_steps`.
    """
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
    if step is None:
        step = max(0, trainer.global_step - 1)  # Lightning's first step is 0
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
