"""Everything that a card decides, measured by one command in eight minutes: losses, decoding, precision, memory.

    python -m benchmarks.gpu [--only checks layer ...] [--seconds 480] [--out runs/gpu]
    python -m benchmarks.gpu --device cpu --small        # the same code on small sizes

It needs torch, Lightning and transformers, no network and no compiler but Triton's; `liger-kernel` and
`cut-cross-entropy` are rivals where they are installed. Where no GPU is, it lists what it would run. Each group has a
share of the time and, on a GPU, a process of its own, so that neither a hang nor an illegal access ends the others.
Every case is a row: its times, or why there are none. `gpu.json` and `gpu.md` are written after every group.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import all_groups
from benchmarks.gpu_cases.report import environment, write_report
from benchmarks.gpu_cases.runner import TIME, DeviceLostError, Group, Key, Row, run_group, share_deadlines

MAX_RESTARTS = 4
GRACE = 20.0  # seconds that a process may take above its share: imports, and a step that is under way


def listed(groups: Sequence[Group]) -> str:
    """What would run, a line a size."""
    lines = []
    for group in groups:
        lines.append(f"{group.name}: {group.title}")
        lines += [f"    {round_.size}: {'; '.join(case.name for case in round_.cases)}" for round_ in group.rounds]
    return "\n".join(lines)


def missing_rows(group: Group, rows: Sequence[Row], status: str) -> list[Row]:
    """A row of this status for every case that has none."""
    known = {row.key for row in rows}
    every = [Row(group.name, round_.size, case.name, status) for round_ in group.rounds for case in round_.cases]
    return [row for row in every if row.key not in known]


# ---------------------------------------------------------------------- a process of its own


def read_events(path: Path) -> tuple[list[Row], list[Key]]:
    """Rows that a process has written, and the cases that it ran last."""
    rows, running = [], []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # cut off when the process ended
            continue
        if "begin" in event:
            running = [(str(group), str(size), str(case)) for group, size, case in event["begin"]]
        else:
            rows.append(Row(**event["row"]))
    return rows, running


def add_event(path: Path, **event: Any) -> None:
    """Append one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def as_event(row: Row) -> dict[str, Any]:
    """The row's fields alone."""
    return {name: value for name, value in row.as_dict().items() if name != "median_seconds"}


def run_apart(group: Group, args: argparse.Namespace, deadline: float) -> list[Row]:
    """Run a group in new processes until all its cases have rows or its time is over."""
    with tempfile.TemporaryDirectory() as folder:
        events, rest_status, num_rows = Path(folder) / "events.jsonl", TIME, 0
        for _ in range(MAX_RESTARTS + 1):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            code = _child(group, args, events, left)
            status = "failed: its process hung and was ended" if code is None else f"failed: its process ended ({code})"
            rows, running = read_events(events)
            if not missing_rows(group, rows, TIME):
                break
            known = {row.key for row in rows}
            died = [Row(*key, status=status) for key in running if key not in known]
            for row in died:
                report_row(row)
                add_event(events, row=as_event(row))
            if code is None:
                break
            if len(rows) + len(died) == num_rows:  # it did not even begin
                rest_status = status
                break
            num_rows = len(rows) + len(died)
        rows, _ = read_events(events)
        rest = missing_rows(group, rows, rest_status)
        for row in rest:
            report_row(row)
        return rows + rest


def _child(group: Group, args: argparse.Namespace, events: Path, left: float) -> int | None:
    """Exit code of a process that runs the rest of a group; None if it had to be ended."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", args.device, "--only", group.name]
    command += ["--events", str(events), "--seconds", f"{left:.0f}", "--repeats", str(args.repeats)]
    process = subprocess.Popen([*command, *(["--small"] if args.small else [])])
    try:
        return process.wait(timeout=left + GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def run_child(group: Group, args: argparse.Namespace) -> int:
    """Run the cases that have no row yet and append what comes of them."""
    events, device = Path(args.events), torch.device(args.device)
    done = {row.key for row in read_events(events)[0]}

    def emit(row: Row) -> None:
        report_row(row)
        add_event(events, row=as_event(row))

    deadline = time.monotonic() + args.seconds
    try:
        run_group(
            group,
            device,
            deadline=deadline,
            repeats=args.repeats,
            emit=emit,
            begin=lambda keys: add_event(events, begin=keys),
            done=done,
        )
    except DeviceLostError as error:
        print(f"The device is lost, a new process goes on: {error}", flush=True)
        os._exit(3)  # nothing can be freed any more
    return 0


# ---------------------------------------------------------------------- all groups


def report_row(row: Row) -> None:
    """A line of progress."""
    said = row.status
    if row.seconds:
        said = f"{row.median * 1e3:,.3f} ms"
    elif row.status == "ok":
        said = ", ".join(f"{name} {value}" for name, value in row.result.items())
    print(f"  {row.group} | {row.size} | {row.case}: {said}", flush=True)


def run_all(groups: Sequence[Group], args: argparse.Namespace) -> list[Row]:
    """Run group after group; the report is written after each."""
    device, rows, start = torch.device(args.device), [], time.monotonic()
    about = environment(device)
    apart = device.type == "cuda" if args.apart is None else args.apart
    for group, deadline in zip(groups, share_deadlines(groups, args.seconds, start), strict=True):
        print(f"[{time.monotonic() - start:5.0f} s of {args.seconds:.0f}] {group.title}", flush=True)
        if apart:
            rows += run_apart(group, args, deadline)
        else:
            own: list[Row] = []

            def emit(row: Row, own: list[Row] = own) -> None:
                report_row(row)
                own.append(row)

            try:
                run_group(group, device, deadline=deadline, repeats=args.repeats, emit=emit)
            except Exception as error:  # the device is lost, or a group frees nothing
                own += missing_rows(group, own, f"failed: {type(error).__name__}")
            rows += own
        write_report(args.out, about, groups, rows)
    print(f"[{time.monotonic() - start:5.0f} s] {args.out / 'gpu.md'} and gpu.json are written.", flush=True)
    return rows


def make_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--only", nargs="+", help="names of groups")
    parser.add_argument("--seconds", type=float, default=480.0, help="of all groups together")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--apart", action=argparse.BooleanOptionalAction, help="a process for each group")
    parser.add_argument("--list", action="store_true", help="list the cases and end")
    parser.add_argument("--events", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """List the cases, or run them."""
    parser = make_parser()
    args = parser.parse_args(argv)
    groups = all_groups(small=args.small)
    unknown = {*(args.only or [])} - {group.name for group in groups}
    if unknown:
        names = ", ".join(group.name for group in groups)
        parser.error(f"Expected `--only` to name some of {names}, but got {', '.join(sorted(unknown))}.")
    groups = [group for group in groups if not args.only or group.name in args.only]
    if args.list or (args.device is None and not torch.cuda.is_available()):
        print(listed(groups))
        if not args.list:
            print("\nNo GPU is here, so nothing ran. `--device cpu --small` runs the same code on small sizes.")
        return 0
    args.device = args.device or "cuda"
    warnings.filterwarnings("ignore")
    if args.events:
        return run_child(groups[0], args)
    run_all(groups, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
