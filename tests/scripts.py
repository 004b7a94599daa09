"""Scripts that tests run as a program of their own, such as those that start several processes.

They are forked from a server that has imported the libraries once: reading these takes longer than most scripts.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

__all__ = ["run_script"]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *("torch", "lightning.pytorch", "torchmetrics", "transformers", "datasets", "torch.utils.tensorboard"),
        *("lit_logits.vq_logits", "lit_logits.gld_fusion", "lit_logits.dual_head_kd", "lit_logits.dynamic_fusion"),
    ]
)


def run_script(file: Path, text: str, *args: str, folder: Path | None = None) -> None:
    """Write a script and run it to its end, which must be a good one.

    Args:
        file: where to write it.
        text: of the script.
        *args: of its command line.
        folder: that it runs in; default this process's.
    """
    file.write_text(text)
    with tempfile.TemporaryDirectory() as logs:
        log = Path(logs, "stderr")
        given = ([str(file), *args], str(folder or Path.cwd()), dict(os.environ), str(log))
        process = _SERVER.Process(target=_run, args=given)
        process.start()
        process.join(240)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
        said = log.read_text(errors="replace")
    assert process.exitcode == 0, said[-3000:] or f"exit code {process.exitcode}"
    assert "sync_dist" not in said, said[-3000:]  # what is logged is the same on all ranks


def _run(argv: list[str], folder: str, variables: dict[str, str], log: str) -> None:
    os.setsid()  # so that its processes end with it
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    runpy.run_path(argv[0], run_name="__main__")
