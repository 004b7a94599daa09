"""A stopped run goes on as if it had not stopped: weights, optimizer, random numbers and what is logged."""

import os
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from scripts import run_script
from torch import nn

from lit_logits.callbacks import ExactResume, LastCheckpoint
from lit_logits.datamodules.loaders import block_loader
from lit_logits.datamodules.resuming import ResumePoint, Resumes


class Rows(Resumes, LightningDataModule):
    """Batches of two rows of numbers, of which the first is to be told from the others."""

    def __init__(self, num_rows=14):
        super().__init__()
        self.rows = torch.randn(num_rows, 5, generator=torch.Generator().manual_seed(0))
        self._resume, self.num_workers = ResumePoint("rows"), 0

    def _order(self):
        return {}

    def _loader(self, train):
        return block_loader(self.rows, 2, self.trainer, 0, train=train, collate_fn=torch.stack, **self._loading)

    def train_dataloader(self):
        return self._resume.apply(self._loader(True), self.trainer)

    def val_dataloader(self):
        return self._loader(False)


class Net(LightningModule):
    """Has all that a run can lose: dropout, running statistics, moments, a schedule, random numbers in validation."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def loss(self, batch):
        return F.mse_loss(self.layers(batch[:, 1:]), batch[:, :1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch) + torch.rand(()), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Log(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step=None):
        self.lines += [(step, name, value) for name, value in metrics.items()]


class Save(Callback):
    """Saves a checkpoint in hooks of all kinds, and notes how many lines were logged by then."""

    def __init__(self, folder):
        self.folder, self.saved = folder, []

    def save(self, trainer):
        path = self.folder / f"{len(self.saved)}.ckpt"
        if not trainer.sanity_checking:
            trainer.save_checkpoint(path, weights_only=False)
            self.saved.append((path, len(trainer.logger.lines)))

    def on_train_start(self, trainer, *_):  # as a search for a learning rate does
        self.save(trainer)

    def on_train_batch_start(self, trainer, *_):
        self.save(trainer)

    def on_before_backward(self, trainer, *_):  # as when an exception is raised here
        self.save(trainer)

    def on_validation_end(self, trainer, *_):
        self.save(trainer)

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer)


def fit(*callbacks, ckpt_path=None, is_last=False, **kwargs):
    torch.manual_seed(0)
    module, log = Net(), Log()
    defaults = {"max_epochs": 3, "logger": log, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet = {"enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    callbacks = [*callbacks, ExactResume()] if is_last else [ExactResume(), *callbacks]  # the command line has it last
    trainer = Trainer(**{**defaults, **quiet, **kwargs}, callbacks=callbacks)
    trainer.fit(module, datamodule=Rows(), ckpt_path=ckpt_path)
    assert trainer.state.finished
    moments = trainer.optimizers[0].state_dict()["state"] if trainer.optimizers else {}  # several ranks clear it
    return Run(module.state_dict(), moments, log.lines)


class Run(NamedTuple):
    weights: dict
    moments: dict
    lines: list

    def check(self, whole, num_lines=0):
        """This run is the end of the whole one, at least from the line on that follows `num_lines`."""
        assert whole.lines[len(whole.lines) - len(self.lines) :] == self.lines
        assert len(whole.lines) - len(self.lines) <= num_lines
        for name, value in whole.weights.items():
            assert torch.equal(value, self.weights[name]), name
        for index, moments in whole.moments.items():
            assert all(torch.equal(value, self.moments[index][name]) for name, value in moments.items())


@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"max_steps": 17, "max_epochs": -1},
        {"accumulate_grad_batches": 3},
        {"accumulate_grad_batches": 3, "val_check_interval": 4},
        {"accumulate_grad_batches": 3, "val_check_interval": 5, "check_val_every_n_epoch": None, "max_steps": 7},
        {"accumulate_grad_batches": 4, "limit_val_batches": 0, "max_steps": 5, "max_epochs": -1},
    ],
)
def test_from_every_checkpoint_a_run_ends_as_if_it_had_not_stopped(tmp_path, trainer):
    """Seven batches an epoch, so that windows end early; validation between two micro-batches and at an epoch's end."""
    saver = Save(tmp_path)
    whole = fit(saver, **trainer)
    assert len(saver.saved) > 30
    for path, num_lines in saver.saved[::6]:
        fit(ckpt_path=path, **trainer).check(whole, num_lines)


def ema():
    return EMAWeightAveraging(decay=0.8, use_buffers=False)


def test_averages_of_weights_go_on(tmp_path):
    """They are loaded after what was noted of the window, with the buffers of the moment of saving."""
    settings = {"accumulate_grad_batches": 3, "val_check_interval": 4}
    saver = Save(tmp_path)
    whole = fit(saver, ema(), **settings)
    assert not torch.equal(whole.weights["layers.0.weight"], fit(**settings).weights["layers.0.weight"])
    for path, num_lines in saver.saved[:-1:6]:  # from the last one there is nothing to train
        fit(ema(), ckpt_path=path, **settings).check(whole, num_lines)


class Terminate(Callback):
    """Sends SIGTERM after a batch."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("averages", [[], [ema]], ids=["", "averages"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_goes_on_after_sigterm(tmp_path, accumulate, averages):
    """Batches 3, 5 and 13 end with a validation, which it stops; 2 and 5 end a window, and 13 an epoch.

    A validation measures averages, which are then in the place of the weights.
    """
    settings = {"accumulate_grad_batches": accumulate, "val_check_interval": 2, "enable_checkpointing": True}
    whole = fit(LastCheckpoint(), *(make() for make in averages), default_root_dir=tmp_path, **settings)
    for at in (2, 3, 5, 13):
        root = tmp_path / str(at)
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SIGTERMException):
            fit(LastCheckpoint(), Terminate(at), *(make() for make in averages), default_root_dir=root, **settings)
        signal.signal(signal.SIGTERM, handler)
        path = root / "checkpoints" / "last.ckpt"
        resumed = fit(
            LastCheckpoint(), *(make() for make in averages), ckpt_path=path, default_root_dir=root, **settings
        )
        resumed.check(whole, len(whole.lines))


class Fail(Callback):
    """Raises in a hook of the third validation, as pictures do on a full disk."""

    def __init__(self, hook):
        self.count = 0
        setattr(self, hook, self.fail)

    def fail(self, *_):
        self.count += 1
        if self.count == 3:
            raise KeyError("full")


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end"])
@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("is_before", [False, True])
def test_a_callback_that_fails_in_a_validation_of_averages(tmp_path, hook, is_last, is_before):
    """Between the averaging callback and this one, whether averages are in the model depends on the order of all."""
    settings = {"val_check_interval": 2, "enable_checkpointing": True, "num_sanity_val_steps": 0, "is_last": is_last}
    whole = fit(LastCheckpoint(), ema(), default_root_dir=tmp_path / "whole", **settings)
    parts = [Fail(hook), ema()] if is_before else [ema(), Fail(hook)]
    with pytest.raises(KeyError, match="full"):
        fit(LastCheckpoint(), *parts, default_root_dir=tmp_path, **settings)
    path = tmp_path / "checkpoints" / "last.ckpt"
    fit(LastCheckpoint(), ema(), ckpt_path=path, default_root_dir=tmp_path, **settings).check(whole, len(whole.lines))


def test_a_validation_that_is_repeated_counts_once(tmp_path):
    """It was in the window to which the run returns, so what callbacks made of it is forgotten too."""
    settings = {"accumulate_grad_batches": 3, "val_check_interval": 4, "max_epochs": 40}
    stopper, saver = EarlyStopping("val/loss", patience=3), Save(tmp_path)
    whole = fit(stopper, saver, **settings)
    assert 3 < stopper.stopped_epoch < 39
    for path, num_lines in saver.saved[-30::5]:
        fit(EarlyStopping("val/loss", patience=3), ckpt_path=path, **settings).check(whole, num_lines)


def test_a_checkpoint_inside_a_window_holds_the_model_that_was_validated(tmp_path):
    """Running statistics go back to the window's start only where training goes on."""
    saver = Save(tmp_path)
    fit(saver, accumulate_grad_batches=7, max_epochs=1)
    first, last = (torch.load(saver.saved[i][0], weights_only=True) for i in (1, -3))
    name = "layers.1.running_mean"
    assert not torch.equal(last["state_dict"][name], first["state_dict"][name])
    assert torch.equal(last["exact_resume"]["buffers"][name], first["state_dict"][name])


def test_a_run_on_another_number_of_ranks_draws_anew(tmp_path):
    saver = Save(tmp_path)
    whole = fit(saver)
    path, num_lines = saver.saved[10]
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["exact_resume"]["random"] *= 2
    torch.save(checkpoint, path)
    resumed = fit(ckpt_path=path)
    assert len(resumed.lines) >= len(whole.lines) - num_lines
    assert not torch.equal(resumed.weights["layers.0.weight"], whole.weights["layers.0.weight"])


def test_what_follows_the_end_of_training_is_not_lost(tmp_path):
    """A kill between the last checkpoint and `on_train_end` of other callbacks once left a run that was over."""

    class Killed(Exception):
        pass

    class Finish(Callback):
        def on_train_end(self, trainer, pl_module):
            if not Path(trainer.default_root_dir, "checkpoints", "last.ckpt").is_file():
                raise Killed

    settings = {"default_root_dir": tmp_path, "enable_checkpointing": True, "limit_val_batches": 0}
    with pytest.raises(Killed):
        fit(Finish(), LastCheckpoint(), max_epochs=1, **settings)


TWO_RANKS = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_exact_resume import Callback, Save, fit

class Draw(Callback):
    def on_train_start(self, trainer, pl_module):  # ranks with random numbers of their own
        if trainer.global_step == 0:
            torch.manual_seed(trainer.global_rank)

if __name__ == "__main__":
    settings = dict(devices=2, strategy="ddp_fork", accumulate_grad_batches=2, val_check_interval=3, max_epochs=2)
    saver = Save(__import__("pathlib").Path({folder!r}))

    class Check(Callback):
        def on_fit_end(self, trainer, pl_module):
            kind = "whole" if saver.saved else "resumed"
            name = f"{{kind}}{{trainer.global_rank}}"
            torch.save((pl_module.state_dict(), torch.get_rng_state()), saver.folder / name)

    fit(Draw(), saver, Check(), **settings)
    saver.saved = []
    fit(Draw(), Check(), ckpt_path=saver.folder / "7.ckpt", **settings)
"""


@pytest.mark.slow
def test_each_of_two_processes_gets_its_own_random_numbers_back(tmp_path):
    run_script(tmp_path / "run.py", TWO_RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    whole, resumed = ([torch.load(tmp_path / f"{kind}{rank}") for rank in (0, 1)] for kind in ("whole", "resumed"))
    assert not torch.equal(whole[0][1], whole[1][1])
    for rank in (0, 1):
        assert torch.equal(whole[rank][1], resumed[rank][1])
        for name, value in whole[rank][0].items():
            torch.testing.assert_close(resumed[rank][0][name], value, rtol=0, atol=0)
