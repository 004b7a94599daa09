"""Errors on the command line: those that are explained are one sentence, and others keep their traceback."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import ParseOnly, cli, fit, in_empty_folder  # noqa: F401  # fixtures by name

from lit_logits.callbacks import LogitCacheWriter
from lit_logits.cli import main
from lit_logits.datamodules import TextDataModule


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
