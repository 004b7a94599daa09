"""What the command line fills in: links from data to model, default callbacks, progress, learning-rate schedules."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.demos.boring_classes import (
    BoringDataModule,  # noqa: F401  (a short name)
    BoringModel,
)
from tiny_runs import CountingData, cli, events, fit, in_empty_folder  # noqa: F401  # fixtures by name

from lit_logits.callbacks import ExactResume, LastCheckpoint, LineProgress
from lit_logits.cli import LitLogitsCLI, SaveRun, WarmupStableDecayLR


def test_vocab_size_goes_from_the_data_to_the_model():
    assert fit("--data.size=9").model.vocab_size == 9


def test_given_vocab_size_is_kept_here_and_in_the_saved_config():
    """With a link for every run, jsonargparse leaves the value out of all dumps, and a run could not be repeated."""
    assert fit("--model.vocab_size=6").model.vocab_size == 6
    assert LitLogitsCLI(["fit", "--config=runs/CountingLM/version_0/config.yaml"]).model.vocab_size == 6


def test_link_is_without_effect_where_either_side_lacks_it():
    assert fit("--model.vocab_size=6", data="BoringText").model.vocab_size == 6
    assert fit("--data.size=3", data="BoringText").model.vocab_size is None
    assert isinstance(fit(model="BoringModel", data="BoringDataModule").model, BoringModel)
    assert LitLogitsCLI(["fit", "--model=BoringModel", "--trainer.fast_dev_run=1"]).datamodule is None


class BoringText(CountingData):
    """The same data without a `vocab_size`."""

    def __getattribute__(self, name: str) -> Any:
        if name == "vocab_size":
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_default_callbacks_join_those_of_the_user():
    trainer = fit("--trainer.callbacks=[DeviceStatsMonitor]", "--trainer.fast_dev_run=1").trainer
    for kind in (LastCheckpoint, ExactResume, LearningRateMonitor, LineProgress):
        assert sum(isinstance(c, kind) for c in trainer.callbacks) == 1


def test_the_learning_rate_of_a_step_is_logged_once():
    """Lightning's monitor logs it at every micro-batch."""
    fit("--trainer.accumulate_grad_batches=2", "--trainer.log_every_n_steps=1", steps=2)
    run = events("runs/CountingLM/version_0")
    (name,) = [tag for tag in run.Tags()["scalars"] if tag.startswith("lr-")]
    assert [event.step for event in run.Scalars(name)] == [0, 1]


def test_default_callbacks_yield_to_those_of_the_user():
    own = "[{class_path: ModelCheckpoint, init_args: {save_last: true}}, LearningRateMonitor, TQDMProgressBar]"
    callbacks = fit(f"--trainer.callbacks={own}").trainer.callbacks
    counts = {kind: sum(isinstance(c, kind) for c in callbacks) for kind in (ModelCheckpoint, LearningRateMonitor)}
    assert counts == {ModelCheckpoint: 1, LearningRateMonitor: 1}
    assert any(isinstance(c, TQDMProgressBar) for c in callbacks)
    assert not any(isinstance(c, LastCheckpoint | LineProgress) for c in callbacks)
    assert any(isinstance(c, SaveRun) for c in callbacks)


def test_default_callbacks_obey_the_switches():
    off = [f"--trainer.{name}=false" for name in ("logger", "enable_checkpointing", "enable_progress_bar")]
    kept = [c for c in fit(*off).trainer.callbacks if type(c).__module__.startswith("lit_logits.")]
    assert kept == []


def test_progress_is_printed_in_lines(capsys):
    fit("--trainer.accumulate_grad_batches=2", steps=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [re.match(r"epoch (\d)  step (\d)  train/loss [\d.]+", line)[2] for line in lines] == ["1", "2", "2"]
    assert "val/loss" in lines[-1]


def test_progress_of_a_prediction_is_printed_in_lines(capsys):
    cli("predict")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("batch ")]
    assert lines == [f"batch {number} of 4" for number in (1, 2, 3, 4)]


def test_warmup_stable_decay_rises_falls_and_stays_at_its_floor():
    schedule = "--model.lr_scheduler.num_warmup_steps=2 --model.lr_scheduler.num_stable_steps=0 "
    schedule += "--model.lr_scheduler.num_decay_steps=4 --model.lr_scheduler.min_lr_ratio=0.1"
    fit(f"--model.lr_scheduler={WarmupStableDecayLR.__module__}.WarmupStableDecayLR", *schedule.split(), steps=9)
    rates = [event.value for event in events("runs/CountingLM/version_0").Scalars("lr-AdamW")]

    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(5)]
    ramp = [0.1, 0.55]  # from the floor, in two steps
    assert rates == pytest.approx([1e-2 * r for r in [*ramp, *cosine, 0.1, 0.1]], abs=1e-8)


@pytest.mark.parametrize(("steps", "floor", "warns"), [(8, 0.0, True), (6, 0.0, False), (8, 0.1, False)])
def test_a_schedule_that_ends_before_the_training_is_told(recwarn, steps, floor, warns):
    """A longer training by `--trainer.max_steps` alone learned nothing after the end of the recipe's schedule."""
    schedule = ["--model.lr_scheduler=WarmupStableDecayLR", "--model.lr_scheduler.num_warmup_steps=1"]
    schedule += ["--model.lr_scheduler.num_stable_steps=2", "--model.lr_scheduler.num_decay_steps=3"]
    fit(*schedule, f"--model.lr_scheduler.min_lr_ratio={floor}", steps=steps)
    told = [str(w.message) for w in recwarn if "learning rate is 0" in str(w.message)]
    assert len(told) == warns
    if warns:
        assert "from step 6 on, but training has 8 steps" in told[0]
        option, value = re.search(r"(--model\S+) (\d+)\.$", told[0]).groups()
        fit(*schedule, f"{option}={value}", steps=steps)
        assert sum("learning rate is 0" in str(w.message) for w in recwarn) == 1


def test_reduce_on_plateau_of_lightning():
    fit("--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=val/loss")
    saved = yaml.safe_load(Path("runs/CountingLM/version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["lr_scheduler"]["init_args"]["monitor"] == "val/loss"
