"""The command line with the real parser, Trainer and TensorBoard files, on a model of a few numbers."""

import math
import os
import pickle
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, Timer, TQDMProgressBar
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel  # noqa: F401  (short names)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lit_logits
from lit_logits.callbacks import (
    AtomicCheckpointIO,
    ExactResume,
    LastCheckpoint,
    LineProgress,
    LogitCacheWriter,
    PredictionWriter,
)
from lit_logits.cli import LitLogitsCLI, SaveRun, WarmupStableDecayLR, _command, main
from lit_logits.datamodules import PairSource, TextDataModule
from lit_logits.run_folders import claim_version

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


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
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-logits"])


def cli(subcommand: str, *args: str, model: str = "CountingLM", data: str = "CountingData") -> LitLogitsCLI:
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1"]
    return LitLogitsCLI([subcommand, f"--model={model}", f"--data={data}", *quiet, *args])


def fit(*args: str, steps: int = 2, **classes: str) -> LitLogitsCLI:
    return cli("fit", f"--trainer.max_steps={steps}", *args, **classes)


def python(statement: str) -> list[str]:
    """The command of a new process that runs `statement` with this module imported."""
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_cli; {statement}"
    return [sys.executable, "-W", "ignore", "-c", program]


def events(run: str) -> EventAccumulator:
    return EventAccumulator(run).Reload()


# --- subcommands and the record of a run ---


def test_fit_leaves_a_run_folder_with_scalars_hparams_and_config(capsys):
    fit("--trainer.limit_val_batches=1", steps=4)

    run = Path("runs/CountingLM/version_0")
    assert (run / "checkpoints/last.ckpt").is_file()
    log = events(str(run))
    scalars = log.Tags()["scalars"]
    assert {"train/loss", "val/loss", "lr-AdamW"} <= set(scalars)
    assert "hp_metric" not in scalars
    assert [event.step for event in log.Scalars("train/loss")] == [0, 1, 2, 3]
    text = log.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "seed_everything: 42" in text
    start = log.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.optimizer.lr" in start
    assert b"data.size" in start
    assert b"val/ppl" in log.summary_metadata["_hparams_/experiment"].plugin_data.content

    printed = capsys.readouterr().out
    assert f"Run folder: {run}" in printed
    assert "tensorboard --logdir runs" in printed
    _, told = re.search(r"^Test it: (.+?) (test --config .*)$", printed, re.MULTILINE).groups()
    main(shlex.split(told))
    assert "test/loss" in capsys.readouterr().out
    final = re.search(r"^val/loss: ([\d.]+)$", printed, re.MULTILINE)
    assert final
    assert float(final[1]) == pytest.approx(log.Scalars("val/loss")[-1].value, abs=1e-4)


@pytest.mark.parametrize(
    ("script", "program", "told"),
    [
        (".venv/bin/lit-logits", ".venv/bin/python", ".venv/bin/lit-logits"),
        ("/opt/bin/lit-logits", "/opt/bin/python", "lit-logits"),
        ("train.py", ".venv/bin/python", ".venv/bin/python train.py"),
        ("/x/lit_logits/__main__.py", "/opt/bin/python3", "python3 -m lit_logits"),
    ],
)
def test_the_next_command_is_one_that_is_found_here(monkeypatch, script, program, told):
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.setattr(sys, "executable", str(Path(program).absolute()))
    assert _command() == told


def test_saved_config_starts_the_same_run_again():
    first = fit("--data.size=4", "--model.optimizer=SGD", "--model.optimizer.lr=0.5")
    saved = yaml.safe_load(Path("runs/CountingLM/version_0/config.yaml").read_text())
    assert saved["seed_everything"] == 42
    assert saved["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5

    second = LitLogitsCLI(["fit", "--config=runs/CountingLM/version_0/config.yaml"])

    assert torch.equal(first.model.logits.weight, second.model.logits.weight)
    assert Path("runs/CountingLM/version_1/config.yaml").is_file()


def test_validate_test_and_predict_take_the_last_checkpoint():
    trained = fit().model.logits.weight
    for subcommand in ("validate", "test", "predict"):
        done = cli(subcommand, "--ckpt_path=last")
        assert torch.equal(done.model.logits.weight, trained)
    assert "test/loss" in cli("test", "--ckpt_path=last").trainer.callback_metrics


def test_no_logger_leaves_the_working_directory_alone():
    Path("config.yaml").write_text("mine")
    fit("--trainer.logger=false", "--trainer.enable_checkpointing=false")
    assert [path.name for path in Path().iterdir()] == ["config.yaml"]
    assert Path("config.yaml").read_text() == "mine"


def test_another_logger_gets_the_hyperparameters():
    fit("--trainer.logger=CSVLogger", "--trainer.logger.save_dir=elsewhere")
    assert "model.optimizer.lr: 0.01" in Path("elsewhere/CountingLM/version_0/hparams.yaml").read_text()


def test_predictions_are_written():
    fit()
    run = cli("predict", "--ckpt_path=last").trainer
    files = sorted(Path(run.log_dir, "predictions").iterdir())
    assert [file.name for file in files] == [f"00000{i}-0.pt" for i in range(4)]
    written = [torch.load(file) for file in files]
    assert [row for part in written for row in part["rows"]] == list(range(8))
    batches = run.datamodule.predict_dataloader()  # type: ignore[attr-defined]
    for part, batch in zip(written, batches, strict=True):
        assert torch.equal(part["predictions"], run.lightning_module.predict_step(batch, 0))
    kinds = [type(c) for c in fit().trainer.callbacks]  # type: ignore[attr-defined]
    assert PredictionWriter not in kinds


def test_runs_of_a_recipe_are_kept_under_its_name(capsys):
    Path("mine.yaml").write_text("model: CountingLM\ndata: CountingData\ntrainer: {max_steps: 1, accelerator: cpu}\n")
    LitLogitsCLI(["fit", "--config=mine.yaml"])
    assert Path("runs/mine/version_0/checkpoints/last.ckpt").is_file()
    LitLogitsCLI(["fit", "--config=mine.yaml", "--ckpt_path=last", "--trainer.max_steps=2"])
    LitLogitsCLI(["fit", "--config=runs/mine/version_1/config.yaml"])
    assert Path("runs/mine/version_2").is_dir()


@pytest.mark.slow
def test_two_processes_whose_output_is_a_pipe():
    """Lightning asks progress bars of other ranks to disable themselves; ours once had no way to."""
    tests = str(Path(__file__).parent)
    Path("run.py").write_text(
        f"import os, sys; sys.path.insert(0, {tests!r})\nimport test_cli\nfrom lit_logits.cli import main\n"
        "if __name__ == '__main__':\n    main()\n"
        "    gone = not test_cli.torch.distributed.is_initialized()\n"
        "    open(f'gloo_is_gone_{os.getpid()}', 'w').write(str(gone))\n"
    )
    options = ["--model=CountingLM", "--data=CountingData", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]
    ddp = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    command = [sys.executable, "-W", "ignore", "run.py", "fit", *options, *ddp]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    # Threads of gloo that outlive the interpreter abort it, now and then, after all has run and was printed.
    assert [path.read_text() for path in Path().glob("gloo_is_gone_*")] == ["True", "True"]
    assert done.stdout.count("step 2  train/loss") == 2  # the step and the validation, from rank zero alone
    assert Path("runs/CountingLM/version_0/checkpoints/last.ckpt").is_file()


def test_an_exception_on_one_of_several_ranks_saves_nothing(monkeypatch):
    """The others wait in a collective of the step; saving takes another one, and both would wait for ever."""
    saved = []
    callback = LastCheckpoint()
    callback.saved_step = 1
    trainer = fit().trainer
    trainer.state.fn = "fit"
    monkeypatch.setattr(trainer, "save_checkpoint", lambda *_, **__: saved.append(1))
    monkeypatch.setattr(type(trainer), "world_size", property(lambda _: 2))
    callback.on_exception(trainer, trainer.lightning_module, RuntimeError())
    assert saved == []
    monkeypatch.setattr(type(trainer), "world_size", property(lambda _: 1))
    callback.on_exception(trainer, trainer.lightning_module, RuntimeError())
    assert saved == [1]


def test_a_run_without_a_step_leaves_no_checkpoint():
    with pytest.raises(RuntimeError, match="at the start"):
        fit("--trainer.callbacks=test_cli.FailAtStart")
    assert not list(Path("runs").rglob("*.ckpt"))


class FailAtStart(L.Callback):
    def on_train_start(self, *_: Any) -> None:
        raise RuntimeError("at the start")


# --- going on ---


def test_resume_from_last_continues_the_global_step_and_equals_an_uninterrupted_run():
    whole = fit(steps=12)
    fit("--trainer.logger.name=parts", steps=8)
    rest = fit("--trainer.logger.name=parts", "--ckpt_path=last", steps=12)

    assert rest.model.steps_seen == [8, 9, 10, 11]
    assert torch.equal(rest.model.logits.weight, whole.model.logits.weight)
    saved = yaml.safe_load(Path("runs/parts/version_1/config.yaml").read_text())
    assert saved["ckpt_path"] == "runs/parts/version_0/checkpoints/last.ckpt"


def test_ckpt_path_last_takes_the_newest_run():
    fit(steps=1)
    fit(steps=3)
    os.utime("runs/CountingLM/version_0/checkpoints/last.ckpt", (0, 0))
    assert fit("--ckpt_path=last", steps=4).model.steps_seen == [3]


def test_ckpt_path_last_without_a_run_is_an_error(capsys):
    with pytest.raises(SystemExit):
        fit("--ckpt_path=last")
    assert "Expected `ckpt_path: last` to find runs/CountingLM/*/checkpoints/last.ckpt" in capsys.readouterr().err


def test_given_version_is_gone_on_with_in_place():
    fit("--trainer.logger.version=0")
    fit("--trainer.logger.version=0", "--ckpt_path=last", steps=3)
    assert [path.name for path in Path("runs/CountingLM").iterdir()] == ["version_0"]


def test_command_line_wins_over_the_hyperparameters_in_a_checkpoint():
    """Lightning 2.6 lays a checkpoint's saved hyper-parameters over the config, and `--model.sleep` had no effect."""
    fit()
    path = "runs/CountingLM/version_0/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    torch.save({**checkpoint, "hyper_parameters": {"sleep": 7.0}}, path)
    assert fit(f"--ckpt_path={path}", "--model.sleep=0.001", steps=3).model.sleep == 0.001


def test_last_checkpoint_keeps_up_when_the_monitored_metric_does_not_improve():
    """With `ModelCheckpoint(monitor=..., save_last=True)` alone, last.ckpt stays where the metric was best."""
    best = "{class_path: ModelCheckpoint, init_args: {monitor: val/loss, mode: max}}"
    fit(f"--trainer.callbacks=[{best}]", steps=12)
    assert torch.load("runs/CountingLM/version_0/checkpoints/last.ckpt", weights_only=False)["global_step"] == 12


def test_last_checkpoint_has_the_steps_after_the_last_validation():
    fit("--trainer.val_check_interval=2", steps=3)
    assert torch.load("runs/CountingLM/version_0/checkpoints/last.ckpt", weights_only=False)["global_step"] == 3


def test_sigterm_leaves_a_checkpoint():
    command = [*python("test_cli.fit('--model.sleep=0.1', steps=10**6)")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("epoch 0  step 2"):
                break
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    step = torch.load("runs/CountingLM/version_0/checkpoints/last.ckpt", weights_only=False)["global_step"]
    assert step >= 2
    assert f"Stopped at step {step}; go on with `--ckpt_path" in rest


def test_sigterm_is_told_to_the_shell(monkeypatch):
    """`fit && test` went on after a preemption, as the status was 0."""

    def stopped(args):
        raise SIGTERMException

    monkeypatch.setattr("lit_logits.cli.LitLogitsCLI", stopped)
    with pytest.raises(SystemExit) as exit_:
        main(["fit"])
    assert exit_.value.code == 143


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path):
    """A full disk left an empty file in the place of the checkpoint, or a new folder with one beside the good one."""
    path = tmp_path / "new folder" / "last.ckpt"
    writes = AtomicCheckpointIO()
    writes.save_checkpoint({"step": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*last.ckpt.partial'"):
            writes.save_checkpoint({"step": 2, "weights": torch.ones(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.load(path) == {"step": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_checkpoints_of_runs_are_written_so():
    assert isinstance(fit(steps=1).trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    chosen = fit("--trainer.plugins=[TorchCheckpointIO]", steps=1).trainer.strategy.checkpoint_io
    assert not isinstance(chosen, AtomicCheckpointIO)


def test_several_loggers_have_runs_of_the_same_name_and_a_last_checkpoint():
    """With a list they were named lightning_logs, and `--ckpt_path last` began anew without a word."""
    loggers = [{"class_path": name, "init_args": {"save_dir": "runs"}} for name in ("CSVLogger", "TensorBoardLogger")]
    Path("two.yaml").write_text(yaml.dump({"trainer": {"logger": loggers}}))
    fit("--config=two.yaml", steps=2)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["two"]
    assert fit("--config=two.yaml", "--ckpt_path=last", steps=3).model.steps_seen == [2]


def test_a_requeued_job_goes_on_and_another_does_not(monkeypatch):
    """Lightning keeps `hpc_ckpt_1.ckpt` in the working directory, where the next job of any kind began from it."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    first = fit(steps=2).trainer
    assert first.default_root_dir.endswith("runs/CountingLM/job_17")
    Path(first.default_root_dir).mkdir(parents=True, exist_ok=True)
    first.save_checkpoint(Path(first.default_root_dir, "hpc_ckpt_1.ckpt"))
    assert fit("--ckpt_path=hpc", steps=3).model.steps_seen == [2]  # which Lightning takes by itself under SLURM
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    with pytest.raises(ValueError, match="no HPC checkpoint was found"):
        fit("--ckpt_path=hpc", steps=3)


def test_ckpt_path_last_skips_what_is_cut_off(recwarn):
    fit("--trainer.logger.name=parts", steps=2)
    fit("--trainer.logger.name=parts", steps=3)
    newest = Path("runs/parts/version_1/checkpoints/last.ckpt")
    newest.write_bytes(newest.read_bytes()[:1000])
    assert fit("--trainer.logger.name=parts", "--ckpt_path=last", steps=4).model.steps_seen[0] == 2
    assert any("skips runs/parts/version_1/checkpoints/last.ckpt: it is cut off" in str(w.message) for w in recwarn)


def test_ckpt_path_best_is_that_of_the_newest_run(capsys):
    keep = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/loss"]
    fit(*keep, "--trainer.callbacks.filename=first", steps=4)
    fit(*keep, "--trainer.callbacks.filename=best", steps=5)
    assert cli("validate", "--ckpt_path=best").config.validate.ckpt_path.endswith("version_1/checkpoints/best.ckpt")
    Path("runs/CountingLM/version_1/checkpoints/best.ckpt").unlink()
    with pytest.raises(SystemExit):
        cli("test", "--ckpt_path=best")
    assert "and the best one that its `ModelCheckpoint` kept, got none" in capsys.readouterr().err


def test_runs_that_start_together_have_folders_of_their_own(tmp_path):
    """The folder was made at the first entry of the log, so that both took `version_0`."""
    loggers = [kind(tmp_path, name="runs") for kind in (TensorBoardLogger, TensorBoardLogger, CSVLogger)]
    for logger in loggers:
        claim_version(logger)
    assert [logger.version for logger in loggers] == [0, 1, 2]
    assert [Path(logger.log_dir).name for logger in loggers] == ["version_0", "version_1", "version_2"]
    given = TensorBoardLogger(tmp_path, name="runs", version=1)
    claim_version(given)
    assert given.version == 1
    bucket = TensorBoardLogger("memory://runs", name="runs")
    claim_version(bucket)
    assert bucket._version is None
    assert not Path("memory:").exists()
    run = fit(steps=1).trainer
    assert Path(run.log_dir).name == "version_0"
    assert Path("runs/CountingLM").is_dir()
    fit("--trainer.fast_dev_run=true")
    assert [entry.name for entry in Path("runs/CountingLM").iterdir()] == ["version_0"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--model.optimizer=SGD", "--model.optimizer.lr=0.01"], "Expected the optimizer of the checkpoint, AdamW, to"),
        (["--data.size=7"], "of the same model, but got other weights: size mismatch for logits.weight"),
    ],
)
def test_to_resume_with_something_else_is_refused_in_words(changes, expected, capsys):
    fit(steps=2)
    arguments = ["fit", "--model=CountingLM", "--data=CountingData", "--trainer.accelerator=cpu", *changes]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--trainer.max_steps=3", "--ckpt_path=last"])
    assert expected in str(stopped.value)
    assert "config.yaml" in str(stopped.value)


@pytest.mark.parametrize("schedule", [[], ["--model.lr_scheduler=StepLR", "--model.lr_scheduler.step_size=1"]])
def test_settings_that_a_checkpoint_keeps_are_told(schedule, recwarn):
    adam = ["--model.optimizer=Adam", *schedule]
    fit(*adam, "--model.optimizer.lr=0.01", steps=2)
    again = fit(*adam, "--model.optimizer.lr=0.02", "--model.optimizer.eps=1e-5", "--ckpt_path=last", steps=3)
    told = [str(w.message) for w in recwarn if "settings of its checkpoint" in str(w.message)]
    assert told == ["The run resumes with the settings of its checkpoint: lr 0.01 (here 0.02), eps 1e-08 (here 1e-05)."]
    assert again.trainer.optimizers[0].param_groups[0]["eps"] == 1e-8
    recwarn.clear()
    fit(*adam, "--model.optimizer.lr=0.01", "--ckpt_path=last", "--trainer.logger.version=0", steps=4)
    assert not [w for w in recwarn if "settings of its checkpoint" in str(w.message)]


@pytest.mark.parametrize(("error", "is_explained"), [(28, True), (13, True), (30, True), (2, False)])
def test_a_full_disk_or_one_without_rights_is_explained(error, is_explained, monkeypatch):
    def run(*_):
        raise OSError(error, os.strerror(error), "runs/x")

    monkeypatch.setattr("lit_logits.cli.LitLogitsCLI", run)
    with pytest.raises(SystemExit if is_explained else OSError, match=re.escape(os.strerror(error))) as stopped:
        main(["fit"])
    assert not is_explained or "read and write runs/x" in str(stopped.value)


def test_a_run_folder_that_cannot_be_made_is_explained(capsys):
    Path("file").write_text("")
    arguments = ["fit", "--model=CountingLM", "--data=CountingData", "--trainer.max_steps=1"]
    with pytest.raises(SystemExit, match=r"Expected to be able to read and write file/runs/CountingLM.*--trainer.log"):
        main([*arguments, "--trainer.accelerator=cpu", "--trainer.logger.save_dir=file/runs"])


def test_a_slip_is_told_without_the_usage(capsys):
    with pytest.raises(SystemExit):
        fit("--model.bacbone=x")
    told = capsys.readouterr().err
    assert "'bacbone' is not accepted" in told
    assert "usage:" not in told
    assert len(told.splitlines()) < 20


def test_a_pattern_without_quotes_is_told(capsys):
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("text")
    with pytest.raises(SystemExit):  # what a shell makes of my/*.txt
        cli("fit", "--data.source", "a.txt", "b.txt", data="TextDataModule")
    assert "in quotes, as in --data.init_args.source 'my/*.txt'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli("fit", "--data.source", "a.txt", "nothing_here", data="TextDataModule")
    assert "in quotes" not in capsys.readouterr().err


def test_others_are_silent(capsys, recwarn):
    """Lightning advertises, and torch deprecates what Lightning uses."""
    main(["fit", "--model=CountingLM", "--data=CountingData", "--trainer.max_steps=1", "--trainer.accelerator=cpu"])
    shown = capsys.readouterr()
    assert "Tip:" not in shown.out + shown.err
    assert not [w for w in recwarn if "LeafSpec" in str(w.message)]


def test_the_package_is_a_command_that_tells_its_version():
    done = subprocess.run([sys.executable, "-m", "lit_logits", "--version"], capture_output=True, text=True)
    assert lit_logits.__version__ in done.stdout


# --- what the parser makes ---


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
        assert sum(isinstance(c, kind) for c in trainer.callbacks) == 1  # type: ignore[attr-defined]


def test_the_learning_rate_of_a_step_is_logged_once():
    """Lightning's monitor logs it at every micro-batch."""
    fit("--trainer.accumulate_grad_batches=2", "--trainer.log_every_n_steps=1", steps=2)
    run = events("runs/CountingLM/version_0")
    (name,) = [tag for tag in run.Tags()["scalars"] if tag.startswith("lr-")]
    assert [event.step for event in run.Scalars(name)] == [0, 1]


def test_default_callbacks_yield_to_those_of_the_user():
    own = "[{class_path: ModelCheckpoint, init_args: {save_last: true}}, LearningRateMonitor, TQDMProgressBar]"
    callbacks = fit(f"--trainer.callbacks={own}").trainer.callbacks  # type: ignore[attr-defined]
    counts = {kind: sum(isinstance(c, kind) for c in callbacks) for kind in (ModelCheckpoint, LearningRateMonitor)}
    assert counts == {ModelCheckpoint: 1, LearningRateMonitor: 1}
    assert any(isinstance(c, TQDMProgressBar) for c in callbacks)
    assert not any(isinstance(c, LastCheckpoint | LineProgress) for c in callbacks)
    assert any(isinstance(c, SaveRun) for c in callbacks)


def test_default_callbacks_obey_the_switches():
    off = [f"--trainer.{name}=false" for name in ("logger", "enable_checkpointing", "enable_progress_bar")]
    kept = [c for c in fit(*off).trainer.callbacks if type(c).__module__.startswith("lit_logits.")]  # type: ignore[attr-defined]
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


# --- config files ---


def test_print_config_round_trips_in_a_new_process(capsys):
    with pytest.raises(SystemExit):
        cli("fit", "--model.optimizer.lr=0.3", "--print_config")
    first = capsys.readouterr().out
    parsed = yaml.safe_load(first)
    assert parsed["seed_everything"] == 42
    assert parsed["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.3
    assert parsed["trainer"]["logger"]["init_args"]["save_dir"] == "runs"

    Path("again.yaml").write_text(first)
    command = [*python("test_cli.LitLogitsCLI(sys.argv[1:])"), "fit", "--config=again.yaml", "--print_config"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == first


@pytest.mark.parametrize("classes", [[], ["--model=VQLogitsLM"], ["--data=TextDataModule", "--model=CausalLM"]])
def test_a_printed_config_that_lacks_something_says_so(classes, capsys):
    with pytest.raises(SystemExit) as stopped:
        LitLogitsCLI(["fit", *classes, "--print_config"])
    printed = capsys.readouterr()
    assert not stopped.value.code
    assert "seed_everything: 42" in printed.out
    lacks = "model" if len(classes) != 1 else "backbone"
    assert f"cannot be run before it is filled in: the following arguments are required: {lacks}" in printed.err
    assert len(printed.err.splitlines()) == 1


def test_a_printed_config_that_is_whole_says_nothing(capsys):
    with pytest.raises(SystemExit):
        cli("fit", "--print_config")
    assert capsys.readouterr().err == ""


class Texts(CountingData):
    """Data with texts, some of them of a part."""

    def __init__(self, size: int = 5, template: str | None = None, source: str | PairSource = "x") -> None:
        super().__init__(size)
        self.template, self.source = template, source


TEMPLATES = ["Q: {prompt}", "Q: {prompt}\nA: {response}", "{prompt}: {response}", "[INST] as: {prompt}", "note:", "a:b"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_text_with_a_colon_is_no_yaml(template, capsys):
    """It was read as a mapping; it is a plain string, also in what is saved."""
    part = ["--data.source=PairSource", "--data.source.path=x", "--data.source.prompt_column", template]
    arguments = ["fit", "--model=CountingLM", "--data=Texts", "--data.size=4", f"--data.template={template}", *part]
    data = ParseOnly(arguments).config.fit.data.init_args
    assert (data.template, data.source.prompt_column, data.size) == (template, template, 4)
    assert type(data.template) is type(data.source.prompt_column) is str
    with pytest.raises(SystemExit):
        LitLogitsCLI([*arguments, "--print_config"])
    saved = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert saved["template"] == saved["source"]["prompt_column"] == template


def test_a_mapping_in_braces_is_one():
    source = "{path: 'x', prompt_column: 'a: b'}"
    data = ParseOnly(["fit", "--model=CountingLM", "--data=Texts", f"--data.source={source}"]).config.fit.data
    assert (data.init_args.source.path, data.init_args.source.prompt_column) == ("x", "a: b")


def test_a_default_that_is_an_enumeration_is_saved():
    """That of `Timer` could not be."""
    fit("--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:00:10:00")
    saved = "runs/CountingLM/version_0/config.yaml"
    assert yaml.safe_load(Path(saved).read_text())["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"
    again = LitLogitsCLI(["fit", f"--config={saved}"]).trainer
    [timer] = [callback for callback in again.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    assert timer.time_remaining() > 0


def test_shipped_recipe_is_found_by_name_and_a_file_here_comes_first(tmp_path, monkeypatch):
    (tmp_path / "shipped").mkdir()
    recipe = "model: CountingLM\ndata: {class_path: CountingData, init_args: {size: %d}}\n"
    (tmp_path / "shipped/tiny.yaml").write_text(recipe % 6)
    monkeypatch.setattr(
        "lit_logits.recipe_parser.files", lambda package: {"lit_logits.configs": tmp_path / "shipped"}[package]
    )

    assert ParseOnly(["fit", "--config", "tiny.yaml"]).config.fit.data.init_args.size == 6
    Path("tiny.yaml").write_text(recipe % 8)
    assert ParseOnly(["fit", "-c", "tiny.yaml"]).config.fit.data.init_args.size == 8


def test_unknown_recipe_names_the_shipped_ones(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").touch()
    monkeypatch.setattr("lit_logits.recipe_parser.files", lambda package: tmp_path)
    with pytest.raises(SystemExit):
        ParseOnly(["fit", "--config=absent.yaml"])
    message = capsys.readouterr().err
    assert "Expected a file or one of the shipped recipes ['tiny.yaml'], but got 'absent.yaml'." in message


def test_recipes_of_the_checkout_are_the_installed_ones():
    from importlib.resources import files

    assert {path.name for path in CONFIGS} <= {path.name for path in files("lit_logits.configs").iterdir()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(config):
    parsed = ParseOnly(["fit", f"--config={config.name}"]).config.fit
    assert parsed.model.class_path.startswith("lit_logits.")
    assert parsed.data.class_path.startswith("lit_logits.datamodules.")


def test_own_module_by_dotted_path(monkeypatch):
    Path("my_models.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel\nclass Mine(BoringModel):\n    pass\n"
    )
    monkeypatch.syspath_prepend(".")
    assert type(fit(model="my_models.Mine", data="BoringDataModule").model).__name__ == "Mine"


def test_own_module_in_the_working_directory():
    """As the README has it: `--model my_package.MyLM` where my_package is."""
    Path("here.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel\nclass Mine(BoringModel):\n    pass\n"
    )
    command = [str(Path(sys.executable).parent / "lit-logits"), "fit", "--model", "here.Mine", "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "class_path: here.Mine" in done.stdout, done.stderr[-2000:]


REFUSED = ["fit", "--model=DualHeadKD", "--data=ImageDataModule", "--model.student=resnet8", "--model.temperature=-1"]
EXPLANATION = "lit-logits: Expected `temperature` to be positive, but got -1.0."


SMALL = "{model_type: llama, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 1}"
REFUSED_HEAD = ["--model.head=VQLogitsHead", "--model.head.codebook_size=7", "--model.vocab_size=5"]


@pytest.mark.parametrize(
    ("arguments", "explanation"),
    [
        (REFUSED, EXPLANATION),
        (
            ["fit", "--model=VQLogitsLM", "--data=CountingData", *REFUSED_HEAD, f"--model.backbone={SMALL}"],
            "lit-logits: Expected `codebook_size` to be in [1, 5], the vocabulary size, but got 7.",
        ),
    ],
)
def test_an_error_that_is_explained_is_shown_as_its_sentence_alone(arguments, explanation, capsys, monkeypatch):
    """The parser wraps an error of `__init__` into a dump of all values, and the traceback once stood above it."""
    monkeypatch.delenv("LIT_LOGITS_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert str(stopped.value).strip() == f"{explanation}\nFor the traceback, add `--debug`."
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("where", [0, 1, len(REFUSED)])
def test_debug_anywhere_shows_the_traceback_above_the_sentence(where, capsys, monkeypatch):
    monkeypatch.delenv("LIT_LOGITS_DEBUG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        main([*REFUSED[:where], "--debug", *REFUSED[where:]])
    assert str(stopped.value).strip() == EXPLANATION
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_the_environment_shows_the_traceback(value, shown, capsys, monkeypatch):
    monkeypatch.setenv("LIT_LOGITS_DEBUG", value)
    with pytest.raises(SystemExit, match="to be positive, but got -1"):
        main(REFUSED)
    assert ("Traceback" in capsys.readouterr().err) is shown


def test_debug_on_the_command_line_reaches_the_processes_that_are_started(capsys, monkeypatch):
    """Lightning starts those of other ranks with `sys.argv` and the environment."""
    monkeypatch.setenv("LIT_LOGITS_DEBUG", "0")
    monkeypatch.setattr(sys, "argv", ["lit-logits", *REFUSED, "--debug"])
    with pytest.raises(SystemExit, match="to be positive, but got -1"):
        main()
    assert "Traceback" in capsys.readouterr().err
    assert sys.argv == ["lit-logits", *REFUSED]
    assert os.environ["LIT_LOGITS_DEBUG"] == "1"


@pytest.mark.parametrize("debug", [False, True])
def test_a_checkpoint_that_would_run_code_is_explained_without_a_traceback(debug, capsys, monkeypatch):
    def load(*_: Any) -> None:
        raise pickle.UnpicklingError("Unsupported global.")

    monkeypatch.delenv("LIT_LOGITS_DEBUG", raising=False)
    monkeypatch.setattr("lit_logits.cli.LitLogitsCLI", load)
    with pytest.raises(SystemExit, match=r"`--weights_only false`\. Unsupported global\.") as stopped:
        main(["test", *["--debug"] * debug])
    assert str(stopped.value).endswith("add `--debug`.") is not debug
    assert ("Traceback" in capsys.readouterr().err) is debug


@pytest.mark.slow
def test_an_explained_error_has_exit_code_1():
    command = [str(Path(sys.executable).parent / "lit-logits"), *REFUSED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("For the traceback, add `--debug`.")
    assert "Traceback" not in done.stderr


def test_an_error_that_nobody_explains_keeps_its_traceback(monkeypatch):
    def fail(*_: Any) -> None:
        raise ValueError("math domain error")

    monkeypatch.setattr("lit_logits.cli.LitLogitsCLI", fail)
    with pytest.raises(ValueError, match="math domain error"):
        main(["fit"])


@pytest.mark.parametrize(
    "fail",
    [
        lambda *_: torch.distributions.Normal(0.0, torch.tensor(-1.0)),
        lambda *_: exec("raise ValueError('Expected a module of the user')", {"__name__": "users.module"}),
        lambda *_: exec("raise ValueError('Expected a module of the user')", {"__name__": "lit_logits_of_mine"}),
    ],
)
def test_an_error_of_others_that_begins_like_ours_keeps_its_traceback(fail, monkeypatch):
    monkeypatch.setattr("lit_logits.cli.LitLogitsCLI", fail)
    with pytest.raises(ValueError, match=r"^Expected (parameter|a module) "):
        main(["fit"])


@pytest.mark.parametrize(
    "fail", [lambda *_: LogitCacheWriter("folder", shard_tokens=0), lambda *_: TextDataModule(batch_size=0)]
)
def test_an_error_of_a_callback_or_a_data_module_is_ours(fail, monkeypatch):
    """Their folders stand beside the package in a checkout."""
    monkeypatch.setattr("lit_logits.cli.LitLogitsCLI", fail)
    with pytest.raises(SystemExit, match=r"lit-logits: Expected `(shard_tokens|batch_size)` to be "):
        main(["fit"])


def test_misspelt_option_is_an_error_that_names_it(capsys):
    with pytest.raises(SystemExit):
        ParseOnly(["fit", "--model=CountingLM", "--data=CountingData", "--model.vocabulary=3"])
    assert "vocabulary" in capsys.readouterr().err
