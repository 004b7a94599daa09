"""Run groups of cases on one device within a time budget; a case that fails or does not fit is a row, not the end.

The cases of a round take turns, one step each, so that clocks and heat meet all of them alike. CUDA events time steps
on a GPU, `perf_counter` elsewhere. Peak memory is what torch's allocator holds above the state before the step.
"""

import gc
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

__all__ = ["TIME", "Case", "DeviceLostError", "Group", "Key", "Round", "Row", "run_group", "share_deadlines"]

TIME = "skipped: time"
Key = tuple[str, str, str]  # group, size, case


class DeviceLostError(RuntimeError):
    """The device answers nothing any more, as after an illegal access; only a new process can go on."""


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: what the row is called.
        prepare: makes the tensors on a device and returns the step, which is timed.
        seconds: what preparing and the first steps may take; the case is skipped where less time is left.
        timed: False for a step that runs once and returns a mapping, which is the row's result.
        calls: calls of the step in one repetition; times are those of one call.
    """

    name: str
    prepare: Callable[[torch.device], Callable[[], Any]]
    seconds: float = 3.0
    timed: bool = True
    calls: int = 1


@dataclass(frozen=True)
class Round:
    """Cases of one size, which take turns."""

    size: str
    cases: Sequence[Case]


@dataclass(frozen=True)
class Group:
    """Rounds that share a part of the time; `release` drops what they made together."""

    name: str
    title: str
    share: float
    rounds: Sequence[Round]
    release: Callable[[], Any] = field(default=lambda: None)


@dataclass
class Row:
    """What came of a case. `status` is `ok`, or says why there is no measurement; times are seconds of one call."""

    group: str
    size: str
    case: str
    status: str = "ok"
    seconds: list[float] = field(default_factory=list)
    first_seconds: float | None = None
    peak_bytes: int | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """Group, size and name of the case."""
        return self.group, self.size, self.case

    @property
    def median(self) -> float:
        """Seconds of the median repetition."""
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """The row for JSON, with the median."""
        return {**asdict(self), "median_seconds": self.median if self.seconds else None}


def share_deadlines(groups: Sequence[Group], seconds: float, start: float) -> list[float]:
    """When each group ends at the latest: what an earlier one leaves over goes to the next."""
    total, so_far, ends = sum(group.share for group in groups), 0.0, []
    for group in groups:
        so_far += group.share
        ends.append(start + seconds * so_far / total)
    return ends


def run_group(
    group: Group,
    device: torch.device,
    *,
    deadline: float,
    repeats: int,
    emit: Callable[[Row], None],
    begin: Callable[[list[Key]], None] = lambda keys: None,
    done: Collection[Key] = (),
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run all rounds until `deadline`, a time of `clock`.

    Args:
        group: what to run.
        device: where.
        deadline: time of `clock` after which nothing starts.
        repeats: most repetitions of a timed case.
        emit: takes each row as soon as it is known.
        begin: is told which cases run now, for a process that dies of them.
        done: cases that have a row already.
        clock: seconds.

    Raises:
        DeviceLostError: If the device answers nothing any more; rows of what ran until then have been emitted.
    """
    try:
        for round_ in group.rounds:
            cases = [case for case in round_.cases if (group.name, round_.size, case.name) not in done]
            _Turns(group, round_, cases, device, deadline, clock, emit, begin).run(repeats)
            _free(device)
    finally:
        group.release()


class _Turns:
    """The cases of one round: prepared one after the other, then timed in turns."""

    def __init__(
        self,
        group: Group,
        round_: Round,
        cases: Sequence[Case],
        device: torch.device,
        deadline: float,
        clock: Callable[[], float],
        emit: Callable[[Row], None],
        begin: Callable[[list[Key]], None],
    ) -> None:
        self.cases, self.device, self.deadline, self.clock = cases, device, deadline, clock
        self.emit, self.begin = emit, begin
        self.rows = {case.name: Row(group.name, round_.size, case.name) for case in cases}
        self.steps: dict[str, Callable[[], Any]] = {}

    def run(self, repeats: int) -> None:
        for case in self.cases:
            row = self.rows[case.name]
            if self.clock() + case.seconds > self.deadline:
                self._end(row, TIME)
                continue
            self.begin([row.key])
            self._guarded(case, self._start if case.timed else self._once)
        timed = [case for case in self.cases if case.name in self.steps]
        self.begin([self.rows[case.name].key for case in timed])
        turn_seconds = sum(self.rows[case.name].first_seconds or 0.0 for case in timed)
        for _ in range(repeats):
            before = self.clock()
            if before + turn_seconds > self.deadline:
                break
            for case in timed:
                if case.name in self.steps:
                    self._guarded(case, self._repeat)
            turn_seconds = self.clock() - before
        for case in timed:
            if case.name in self.steps:
                row = self.rows[case.name]
                self._end(row, "ok" if row.seconds else TIME)

    def _once(self, case: Case, row: Row) -> None:
        start = self.clock()
        row.result = dict(case.prepare(self.device)() or {})
        row.first_seconds = self.clock() - start
        self._end(row, "ok")
        _free(self.device)

    def _start(self, case: Case, row: Row) -> None:
        """Prepare a step and warm it up: the first call compiles and tunes, the second shows the memory."""
        step = case.prepare(self.device)
        step()
        row.peak_bytes = _peak(step, self.device)
        row.first_seconds = _seconds(step, case.calls, self.device) * case.calls
        self.steps[case.name] = step

    def _repeat(self, case: Case, row: Row) -> None:
        row.seconds.append(_seconds(self.steps[case.name], case.calls, self.device))

    def _guarded(self, case: Case, action: Callable[[Case, Row], None]) -> None:
        row, failure = self.rows[case.name], None
        try:
            action(case, row)
        except Exception as error:  # whatever it is, the other cases go on
            failure = _first_line(error)
        if failure is not None:  # outside the handler, as the traceback holds the tensors
            self.steps.pop(case.name, None)
            row.seconds.clear()
            self._end(row, failure)
            _check_alive(self.device)
            _free(self.device)

    def _end(self, row: Row, status: str) -> None:
        row.status = status
        self.steps.pop(row.case, None)
        self.emit(row)


def _seconds(step: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds of one call, out of so many in a row."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / calls
    begun = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begun) / calls


def _peak(step: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes at the peak of a step above those before it; None where no allocator counts."""
    if device.type != "cuda":
        step()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before)


def _first_line(error: Exception) -> str:
    """`failed: ` and the first line of a message; `not installed: ` where a package is missing."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    message = f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:300]
    return f"{'not installed' if isinstance(error, ImportError) else 'failed'}: {message}"


def _check_alive(device: torch.device) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.zeros(1, device=device).item()
        except Exception as error:
            raise DeviceLostError(str(error)) from error


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
