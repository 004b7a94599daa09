"""Going on from the command line: `--ckpt_path`, the last checkpoint, signals, and what a checkpoint keeps."""

import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tiny_runs import cli, fit, in_empty_folder, python  # noqa: F401  # fixtures by name

from lit_logits.callbacks import AtomicCheckpointIO
from lit_logits.cli import main


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


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint():
    command = [*python("tiny_runs.fit('--model.sleep=0.1', steps=10**6)")]
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
