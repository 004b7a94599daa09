"""The benchmark for a GPU: its runner with made-up cases, and all its cases on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_cases import all_groups, report, runner
from benchmarks.gpu_cases.runner import TIME, Case, Group, Round, Row, run_group, share_deadlines

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


class Clock:
    """A clock that only steps move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def case(name, calls, clock=None, takes=0.0, fails_at=None, error=None, **settings):
    """A case that writes down its calls, and fails at one of them."""

    def prepare(device):
        calls.append((name, "prepare"))
        count = 0

        def step():
            nonlocal count
            count += 1
            calls.append((name, count))
            if clock is not None:
                clock.now += takes
            if count == fails_at:
                raise error or RuntimeError(f"\n{name} broke\nand more")
            return {"value": 1.5}

        return step

    return Case(name, prepare, **{"seconds": 0.0, **settings})


def rows_of(*rounds, deadline=1e9, repeats=2, clock=None, release=None, **settings):
    rows = []
    group = Group("g", "Title", 1, [Round(f"size {i}", cases) for i, cases in enumerate(rounds)], release or list)
    options = {"deadline": deadline, "repeats": repeats, "emit": rows.append, "clock": clock or Clock(), **settings}
    run_group(group, CPU, **options)
    return {(row.size, row.case): row for row in rows}


def test_cases_of_a_round_take_turns_after_all_are_warm():
    calls = []
    rows = rows_of([case("a", calls), case("b", calls)], [case("c", calls)])
    warm = [(name, step) for name in "ab" for step in ("prepare", 1, 2, 3)]
    assert calls[:8] == warm
    assert calls[8:12] == [("a", 4), ("b", 4), ("a", 5), ("b", 5)]
    assert [name for name, _ in calls[12:]] == ["c"] * 6
    assert all(row.status == "ok" and len(row.seconds) == 2 for row in rows.values())
    assert rows["size 0", "a"].peak_bytes is None  # no allocator counts on a CPU


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5])
def test_a_failing_case_is_a_row_and_the_others_go_on(fails_at):
    calls = []
    rows = rows_of([case("bad", calls, fails_at=fails_at), case("good", calls)])
    assert rows["size 0", "bad"].status == "failed: RuntimeError: bad broke"
    assert not rows["size 0", "bad"].seconds
    assert len(rows["size 0", "good"].seconds) == 2
    assert calls.count(("bad", fails_at)) == 1
    assert ("bad", fails_at + 1) not in calls


def test_what_is_not_installed_says_so_and_out_of_memory_is_a_failure():
    calls = []
    missing = case("a", calls, fails_at=1, error=ModuleNotFoundError("No module named 'x'"))
    full = case("b", calls, fails_at=1, error=torch.OutOfMemoryError("out of memory"))
    rows = rows_of([missing, full])
    assert rows["size 0", "a"].status == "not installed: ModuleNotFoundError: No module named 'x'"
    assert rows["size 0", "b"].status == "failed: OutOfMemoryError: out of memory"


def test_cases_that_run_once_give_their_result():
    calls = []
    row = rows_of([case("a", calls, timed=False)])["size 0", "a"]
    assert (row.status, row.result, row.seconds) == ("ok", {"value": 1.5}, [])
    assert calls == [("a", "prepare"), ("a", 1)]


def test_a_case_that_does_not_fit_is_skipped():
    calls, clock = [], Clock()
    slow = case("slow", calls, clock, seconds=50.0)
    rows = rows_of([case("first", calls, clock, takes=1.0), slow], deadline=40.0, clock=clock)
    assert rows["size 0", "slow"].status == TIME
    assert not [name for name, _ in calls if name == "slow"]
    assert rows["size 0", "first"].status == "ok"


def test_no_turn_begins_that_would_end_too_late():
    """Warm-up takes 3 calls of 2 s of each of two cases; a turn takes 4 s. At 21 s there is time for two turns."""
    calls, clock = [], Clock()
    cases = [case("a", calls, clock, takes=2.0), case("b", calls, clock, takes=2.0)]
    rows = rows_of(cases, deadline=21.0, repeats=10, clock=clock)
    assert [len(row.seconds) for row in rows.values()] == [2, 2]
    assert clock.now == 20.0


def test_groups_share_the_time_and_pass_on_what_is_left():
    groups = [Group(name, name, share, []) for name, share in (("a", 1), ("b", 3))]
    assert share_deadlines(groups, 80.0, start=100.0) == [120.0, 180.0]


def test_what_a_group_made_is_dropped_also_where_the_device_is_lost(monkeypatch):
    released, rows = [], []
    monkeypatch.setattr(runner, "_check_alive", lambda device: (_ for _ in ()).throw(runner.DeviceLostError("gone")))
    group = Group("g", "", 1, [Round("s", [case("bad", [], fails_at=1)])], lambda: released.append(1))
    with pytest.raises(runner.DeviceLostError):
        run_group(group, CPU, deadline=1e9, repeats=1, emit=rows.append, clock=Clock())
    assert released == [1]
    assert [row.status for row in rows] == ["failed: RuntimeError: bad broke"]


def test_finished_cases_are_not_run_again():
    calls = []
    rows = rows_of([case("a", calls), case("b", calls)], done={("g", "size 0", "a")})
    assert [*rows] == [("size 0", "b")]
    assert {name for name, _ in calls} == {"b"}


# ---------------------------------------------------------------------- files


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "gpu.md"
    path.write_text("before")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        report.write_whole(path, "after")
    assert path.read_text() == "before"
    monkeypatch.undo()
    report.write_whole(path, "after")
    assert path.read_text() == "after"
    assert [*tmp_path.iterdir()] == [path]


def test_the_report_has_a_line_for_every_row_in_the_order_of_the_cases(tmp_path):
    cases = [case(name, []) for name in ("dense", "a|b", "late")]
    once = Group("o", "Once", 1, [Round("s", [case("fit", [], timed=False)])])
    groups = [Group("g", "Timed", 1, [Round("N = 1", cases)]), once]
    rows = [
        Row("g", "N = 1", "late", "failed: X: a|b"),
        Row("g", "N = 1", "a|b", seconds=[0.5, 0.25, 1.0], peak_bytes=3 * 2**20),
        Row("g", "N = 1", "dense", seconds=[1.0]),
        Row("o", "s", "fit", result={"loss": 1.23456}, first_seconds=2.0),
    ]
    report.write_report(tmp_path, {"device": "card", "torch": "2", "command": "python -m x"}, groups, rows)
    lines = [line for line in (tmp_path / "gpu.md").read_text().splitlines() if line.startswith("|")]
    assert lines[2] == "| dense | N = 1 | 1,000.000 (1,000.000–1,000.000) | 1 | 1.00× |  |"
    assert lines[3] == "| a\\|b | N = 1 | 500.000 (250.000–1,000.000) | 3 | 2.00× | 3 |"
    assert lines[4] == "| late | N = 1 | failed: X: a\\|b |  |  |  |"
    assert lines[-1] == "| fit | s | ok | 1.235 | 2.0 |"
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["about"]["device"] == "card"
    assert [row["median_seconds"] for row in kept["rows"]] == [None, 0.5, 1.0, None]


# ---------------------------------------------------------------------- processes


def dying_child(steps):
    """Stands for the processes: each call plays the next one, which appends events and ends with a code."""
    plays = iter(steps)

    def child(group, args, events, left):
        code, *lines = next(plays)
        for event in lines:
            gpu.add_event(events, **event)
        return code

    return child


def apart(monkeypatch, steps, deadline=1e12):
    group = Group("g", "", 1, [Round("s", [case(name, []) for name in "abc"])])
    monkeypatch.setattr(gpu, "_child", dying_child(steps))
    return {row.case: row.status for row in gpu.run_apart(group, None, deadline)}


def row_event(name):
    return {"row": gpu.as_event(Row("g", "s", name, seconds=[1.0]))}


def begin(*names):
    return {"begin": [("g", "s", name) for name in names]}


def test_a_process_that_dies_costs_the_case_that_it_ran(monkeypatch):
    steps = [(-11, row_event("a"), begin("b")), (0, row_event("c"))]
    assert apart(monkeypatch, steps) == {"a": "ok", "b": "failed: its process ended (-11)", "c": "ok"}


def test_a_process_that_hangs_is_ended_and_the_rest_is_skipped(monkeypatch):
    steps = [(None, row_event("a"), begin("b"))]
    assert apart(monkeypatch, steps) == {"a": "ok", "b": "failed: its process hung and was ended", "c": TIME}


def test_a_process_that_does_not_begin_is_not_started_for_ever(monkeypatch):
    assert set(apart(monkeypatch, [(1,)]).values()) == {"failed: its process ended (1)"}


def test_a_group_without_time_is_skipped(monkeypatch):
    assert set(apart(monkeypatch, [], deadline=0.0).values()) == {TIME}


# ---------------------------------------------------------------------- the command


def test_without_a_gpu_the_command_lists_what_it_would_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert gpu.main([]) == 0
    printed = capsys.readouterr().out
    for group in all_groups():
        assert group.title in printed
    assert "N = 16,384: dense, cross_entropy" in printed
    assert "No GPU is here" in printed
    assert not [*tmp_path.iterdir()]


def test_unknown_groups_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "losses", "kernels"])
    assert "but got kernels" in capsys.readouterr().err


@pytest.mark.parametrize("small", [False, True])
def test_rows_have_keys_of_their_own(small):
    for group in all_groups(small=small):
        keys = [(round_.size, case_.name) for round_ in group.rounds for case_ in round_.cases]
        assert len({*keys}) == len(keys)


WITHOUT = """
import importlib.metadata, runpy, sys
ABSENT = ("jsonargparse", "datasets")
sys.modules.update(dict.fromkeys(ABSENT))
find = importlib.metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name in ABSENT:
        raise importlib.metadata.PackageNotFoundError(name)
    return find(cls, name)
importlib.metadata.Distribution.from_name = classmethod(from_name)
sys.argv = ["gpu", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def run(tmp_path, program, *arguments):
    command = [sys.executable, *program, "--device", "cpu", "--small", "--repeats", "1", "--seconds", "3000"]
    settings = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "timeout": 570}
    command += ["--out", str(tmp_path)]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((tmp_path / "gpu.json").read_text())["rows"]


@pytest.mark.nightly
@pytest.mark.slow
def test_every_case_runs_on_a_cpu_without_what_the_machine_with_the_card_lacks(tmp_path):
    rows = run(tmp_path, ["-c", WITHOUT])
    expected = {
        (group.name, round_.size, case_.name)
        for group in all_groups(small=True)
        for round_ in group.rounds
        for case_ in round_.cases
    }
    assert {(row["group"], row["size"], row["case"]) for row in rows} == expected
    failed = [row for row in rows if row["status"] != "ok" and not row["status"].startswith("not installed")]
    assert not failed
    assert {row["result"]["holds"] for row in rows if row["group"] == "checks"} == {"yes"}
    for row in rows:
        if row["group"] == "fits":
            assert abs(row["result"]["difference"]) < 0.1 * row["result"]["last loss, float32"], row


@pytest.mark.slow
def test_a_group_runs_in_a_process_of_its_own(tmp_path):
    rows = run(tmp_path, ["-m", "benchmarks.gpu"], "--apart", "--only", "fusion")
    assert {row["status"] for row in rows} == {"ok"}
    assert "Search for fusion weights" in (tmp_path / "gpu.md").read_text()
