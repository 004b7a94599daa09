"""The JSON and the Markdown of the benchmark on a GPU, each written in one piece."""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases.runner import Group, Row
from benchmarks.measure import markdown_table

__all__ = ["environment", "markdown", "write_report", "write_whole"]


def environment(device: torch.device) -> dict[str, Any]:
    """Card, versions, date and command."""
    versions = {name: _version(name) for name in ("triton", "lightning", "transformers", "liger_kernel")}
    versions["cut_cross_entropy"] = _version("cut_cross_entropy")
    found: dict[str, Any] = {
        "device": f"CPU, {torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        **versions,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found["device"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} SMs"
        found["capability"] = f"{card.major}.{card.minor}"
        found["driver"] = _driver()
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def write_report(folder: Path, about: dict[str, Any], groups: Sequence[Group], rows: Sequence[Row]) -> None:
    """Write `gpu.json` and `gpu.md`; what stood there before stays until the new text is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"about": about, "rows": [row.as_dict() for row in rows]}
    write_whole(folder / "gpu.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    write_whole(folder / "gpu.md", markdown(about, groups, rows))


def write_whole(path: Path, text: str) -> None:
    """Write beside the file and put the result in its place."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def markdown(about: dict[str, Any], groups: Sequence[Group], rows: Sequence[Row]) -> str:
    """One table a group, with what the rows were measured on above them."""
    facts = "; ".join(f"{name} {value}" for name, value in about.items() if value and name not in ("device", "command"))
    parts = [f"{about['device']}; {facts}\n\n    {about['command']}"]
    for group in groups:
        own = _ordered(group, rows)
        if own:
            is_timed = any(case.timed for round_ in group.rounds for case in round_.cases)
            table = _timed_table(own) if is_timed else _once_table(own)
            parts.append(f"## {group.title}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _ordered(group: Group, rows: Sequence[Row]) -> list[Row]:
    """The group's rows as it lists its cases: what fails is known before what is timed."""
    places = [(round_.size, case.name) for round_ in group.rounds for case in round_.cases]
    return sorted((row for row in rows if row.group == group.name), key=lambda row: places.index((row.size, row.case)))


def _timed_table(rows: Sequence[Row]) -> str:
    firsts: dict[str, Row] = {}
    lines: list[list[object]] = []
    for row in rows:
        first = firsts.setdefault(row.size, row)
        if row.status != "ok":
            lines.append([_cell(row.case), row.size, _cell(row.status), "", "", ""])
            continue
        spread = f"{row.median * 1e3:,.3f} ({min(row.seconds) * 1e3:,.3f}–{max(row.seconds) * 1e3:,.3f})"
        faster = f"{first.median / row.median:.2f}×" if first.seconds else ""
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"
        lines.append([_cell(row.case), row.size, spread, len(row.seconds), faster, peak])
    header = ["case", "size", "ms, median (min–max)", "repetitions", "faster than the size's first", "peak MiB"]
    return markdown_table(header, lines)


def _once_table(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.result))
    lines = []
    for row in rows:
        took = "" if row.first_seconds is None else f"{row.first_seconds:.1f}"
        lines.append(
            [_cell(row.case), row.size, _cell(row.status), *(_number(row.result.get(n, "")) for n in names), took]
        )
    return markdown_table(["case", "size", "status", *names, "s"], lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _cell(str(value))
