"""The one place that sends pictures, texts and histograms to whatever loggers a trainer has."""

from typing import Any
from weakref import WeakSet

from lightning import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

__all__ = ["picture_writers"]

_TOLD: WeakSet[Logger] = WeakSet()


class _WandbWriter:
    def __init__(self, logger: WandbLogger) -> None:
        self.logger = logger

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        self.logger.log_image(tag, [figure], step=step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.logger.log_text(tag, columns=["text"], data=[[text]], step=step)

    def add_histogram_raw(self, tag: str, **_: Any) -> None:
        """Leave it out: only TensorBoard takes counts that are already in bins."""


class _MLFlowWriter:
    def __init__(self, logger: MLFlowLogger) -> None:
        self.logger = logger

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        self.logger.experiment.log_figure(self.logger.run_id, figure, f"{tag}/{step}.png")

    def add_text(self, tag: str, text: str, step: int) -> None:
        self.logger.experiment.log_text(self.logger.run_id, text, f"{tag}/{step}.md")

    def add_histogram_raw(self, tag: str, **_: Any) -> None:
        """Leave it out: only TensorBoard takes counts that are already in bins."""


def picture_writers(trainer: Trainer) -> list[Any]:
    """Return a writer with `add_figure`, `add_text` and `add_histogram_raw` for each logger that takes pictures."""
    writers: list[Any] = []
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            writers.append(logger.experiment)
        elif isinstance(logger, WandbLogger):
            writers.append(_WandbWriter(logger))
        elif isinstance(logger, MLFlowLogger):
            writers.append(_MLFlowWriter(logger))
        elif logger not in _TOLD:
            _TOLD.add(logger)
            rank_zero_info(f"{type(logger).__name__} takes no pictures or texts: it gets the scalars alone.")
    return writers
