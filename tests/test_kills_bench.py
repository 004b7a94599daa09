"""Runs that are killed and go on, by the benchmark that does it many times."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from benchmarks.kills import compare


def write_run(folder, *versions, weight=0.0):
    """A folder of runs by their scalars, and the checkpoint of the last."""
    for number, values in enumerate(versions):
        version = folder / "runs" / "x" / f"version_{number}"
        with SummaryWriter(str(version)) as writer:
            for step, value in values:
                writer.add_scalar("train/loss", value, step)
    state = {"state_dict": {"w": torch.tensor(weight)}, "optimizer_states": [], "lr_schedulers": []}
    (version / "checkpoints").mkdir()
    torch.save(state, version / "checkpoints" / "last.ckpt")
    return folder


def test_a_loss_a_double_and_a_difference_are_found(tmp_path):
    whole = write_run(tmp_path / "whole", [(0, 3.0), (1, 2.0), (2, 1.0)])
    good = write_run(tmp_path / "good", [(0, 3.0), (1, 2.0)], [(1, 2.0), (2, 1.0)])
    assert compare(good, whole) == (0, 0, [])
    lossy = write_run(tmp_path / "lossy", [(0, 3.0)], [(2, 1.0)])
    assert compare(lossy, whole) == (1, 0, [])
    twice = write_run(tmp_path / "twice", [(0, 3.0), (1, 2.0), (1, 2.0)], [(2, 1.0), (3, 1.0)])
    assert compare(twice, whole) == (0, 2, [])
    other = write_run(tmp_path / "other", [(0, 3.0), (1, 2.5), (2, 1.0)], weight=1.0)
    assert compare(other, whole) == (1, 1, ["weights"])


@pytest.mark.nightly
@pytest.mark.slow
def test_runs_that_are_killed_end_as_if_they_were_not(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kills", "--kills=4", "--methods", "VQLogitsLM", f"--folder={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| VQLogitsLM")]
    assert len(rows) == 4
    assert all(row.endswith("| 1 | 0 | 0 | yes |") for row in rows), done.stdout
