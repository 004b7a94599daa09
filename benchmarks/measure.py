"""What the benchmarks share: time, peak memory, the machine in a line, and a Markdown table."""

import contextlib
import gc
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = [
    "Measurement",
    "in_fresh_process",
    "machine",
    "markdown_table",
    "measure",
    "reset_peak",
    "resident",
    "spread",
]


class Measurement(NamedTuple):
    """Seconds of each repetition, and peak bytes above what was held before the first."""

    seconds: list[float]
    peak_bytes: int

    @property
    def median(self) -> float:
        """Seconds of the median repetition."""
        return statistics.median(self.seconds)


def measure(step: Callable[[], Any], *, repeats: int, device: torch.device) -> Measurement:
    """Time `step` and find its peak memory: torch's allocator on a GPU, the resident set's high water on Linux."""
    is_cuda = device.type == "cuda"
    gc.collect()
    before = torch.cuda.memory_allocated(device) if is_cuda else resident("VmRSS")
    step()  # first touch; a fresh process has no higher water mark from before
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        step()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resident("VmHWM")
    seconds = []
    for _ in range(repeats):
        if is_cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        if is_cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Measurement(seconds, max(0, peak - before))


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` in a new process, so that no earlier case has left a high water mark behind."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def machine(device: torch.device) -> str:
    """The machine in a line, for the foot of a table."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    return f"{where}; torch {torch.__version__}; Python {platform.python_version()}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± sample standard deviation, or the value if it is the only one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status, `VmRSS` or its high water `VmHWM`; 0 where there is none (not Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Let `resident("VmHWM")` count from now; nothing where there is no such thing (not Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
