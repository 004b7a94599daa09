"""The command line on a model and data of a few numbers: how tests run it, and an empty folder to run it in."""

import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_logits.cli import LitLogitsCLI

__all__ = ["CountingData", "CountingLM", "ParseOnly", "cli", "events", "fit", "in_empty_folder", "python"]


class CountingLM(L.LightningModule):
    """A bigram model that remembers what the CLI gave it."""

    def __init__(
        self,
        backbone: str | dict[str, Any] = "none",
        vocab_size: int | None = None,
        sleep: float = 0.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-2),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.vocab_size, self.sleep = backbone, vocab_size, sleep
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.logits = nn.Embedding(vocab_size or 3, vocab_size or 3)
        self.steps_seen: list[int] = []

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        return nn.functional.cross_entropy(self.logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.steps_seen.append(self.global_step)
        time.sleep(self.sleep)
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), prog_bar=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.logits(batch["input_ids"]).argmax(-1)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        settings = {"scheduler": scheduler, "interval": "step"}
        if hasattr(scheduler, "monitor"):
            settings.update(interval="epoch", monitor=scheduler.monitor)
        return {"optimizer": optimizer, "lr_scheduler": settings}


class CountingData(L.LightningDataModule):
    def __init__(self, size: int = 5) -> None:
        super().__init__()
        self.size = size

    @property
    def vocab_size(self) -> int:
        return self.size

    def _loader(self) -> DataLoader:
        return DataLoader([{"input_ids": torch.arange(i, i + 4) % self.size} for i in range(8)], batch_size=2)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


class ParseOnly(LitLogitsCLI):
    """Stops after parsing: nothing is made and nothing is run."""

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-logits"])


def cli(subcommand: str, *args: str, model: str = "CountingLM", data: str = "CountingData") -> LitLogitsCLI:
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1"]
    return LitLogitsCLI([subcommand, f"--model={model}", f"--data={data}", *quiet, *args])


def fit(*args: str, steps: int = 2, **classes: str) -> LitLogitsCLI:
    return cli("fit", f"--trainer.max_steps={steps}", *args, **classes)


def python(statement: str) -> list[str]:
    """The command of a new process that runs `statement` with this module imported."""
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import tiny_runs; {statement}"
    return [sys.executable, "-W", "ignore", "-c", program]


def events(run: str) -> EventAccumulator:
    return EventAccumulator(run).Reload()
