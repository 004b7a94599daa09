"""Subcommands of the command line with the real Trainer, and the folder, files and output of a run."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tiny_runs import cli, events, fit, in_empty_folder  # noqa: F401  # fixtures by name

import lit_logits
from lit_logits.callbacks import LastCheckpoint, PredictionWriter
from lit_logits.cli import LitLogitsCLI, _command, main
from lit_logits.run_folders import claim_version


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
    batches = run.datamodule.predict_dataloader()
    for part, batch in zip(written, batches, strict=True):
        assert torch.equal(part["predictions"], run.lightning_module.predict_step(batch, 0))
    kinds = [type(c) for c in fit().trainer.callbacks]
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
        f"import os, sys; sys.path.insert(0, {tests!r})\nimport tiny_runs\nfrom lit_logits.cli import main\n"
        "if __name__ == '__main__':\n    main()\n"
        "    gone = not tiny_runs.torch.distributed.is_initialized()\n"
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


def test_others_are_silent(capsys, recwarn):
    """Lightning advertises, and torch deprecates what Lightning uses."""
    main(["fit", "--model=CountingLM", "--data=CountingData", "--trainer.max_steps=1", "--trainer.accelerator=cpu"])
    shown = capsys.readouterr()
    assert "Tip:" not in shown.out + shown.err
    assert not [w for w in recwarn if "LeafSpec" in str(w.message)]


def test_the_package_is_a_command_that_tells_its_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lit_logits", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("lit_logits", run_name="__main__", alter_sys=True)
    assert not stopped.value.code
    assert capsys.readouterr().out == f"python -m lit_logits {lit_logits.__version__}\n"
