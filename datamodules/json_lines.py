"""JSON Lines: an object a line, each with its place for messages."""

import json
from collections.abc import Iterator
from itertools import count
from typing import Any

__all__ = ["MAX_LINE_BYTES", "iter_json_lines"]

MAX_LINE_BYTES = 2**24
"""Longer lines are refused: a text is tokenised at once, which takes thirty to three hundred times its bytes."""


def iter_json_lines(file: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield an object a line and its place, "line 3 of x.jsonl"; blank lines are skipped.

    Raises:
        ValueError: If a line is no JSON object, or longer than `MAX_LINE_BYTES`, of which no more is read.
    """
    # The reader in storage/served.py has the same loop; neither layer may import the other.
    with open(file, "rb") as lines:  # `json` decodes, so that a line that is no text is told like any other
        for number in count(1):
            line, where = lines.readline(MAX_LINE_BYTES + 1), f"line {number} of {file}"
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"Expected a JSON object of at most {MAX_LINE_BYTES:,} bytes in {where}, but it is longer. Write"
                    " one row a line, and cut longer texts."
                )
            if not line:
                return
            if not line.isspace():
                yield _parse(line, where), where


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected a JSON object in {where}, but got: {error}. Correct the line.") from error
    if not isinstance(row, dict):
        raise ValueError(f"Expected a JSON object in {where}, but got {type(row).__name__}. Correct the line.")
    return row
