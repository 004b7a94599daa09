"""Scripts that tests run as a program of their own, such as those that start several processes.

They are forked from a server that has imported the libraries once: reading these takes longer than most scripts.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import Sampler

__all__ = ["TakeTurns", "run_script"]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *("torch", "lightning.pytorch", "torchmetrics", "transformers", "datasets", "torch.utils.tensorboard"),
        *("lit_logits.vq_logits", "lit_logits.gld_fusion", "lit_logits.dual_head_kd", "lit_logits.dynamic_fusion"),
    ]
)


class TakeTurns(Sampler[int]):
    """Rows for two processes in turns, unshuffled: Lightning's own sampler would shuffle."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows // 2

    def __iter__(self) -> Iterator[int]:
        return iter(range(torch.distributed.get_rank(), self.rows, 2))


def run_script(file: Path, text: str, *args: str, folder: Path | None = None) -> str:
    """Write a script, run it to its end, which must be a good one, and return what it printed.

    Args:
        file: where to write it.
        text: of the script.
        *args: of its command line.
        folder: that it runs in; default this process's.
    """
    file.write_text(text)
    with tempfile.TemporaryDirectory() as logs:
        printed, log = Path(logs, "stdout"), Path(logs, "stderr")
        given = ([str(file), *args], str(folder or Path.cwd()), dict(os.environ), [str(printed), str(log)])
        process = _SERVER.Process(target=_run, args=given)
        process.start()
        process.join(240)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
        output, said = (path.read_text(errors="replace") if path.exists() else "" for path in (printed, log))
    assert process.exitcode == 0, said[-3000:] or f"exit code {process.exitcode}"
    assert "sync_dist" not in said, said[-3000:]  # what is logged is the same on all ranks
    return output


def _run(argv: list[str], folder: str, variables: dict[str, str], logs: list[str]) -> None:
    os.setsid()  # so that its processes end with it
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    for stream, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    runpy.run_path(argv[0], run_name="__main__")
