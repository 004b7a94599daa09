"""Rows of files, each with its place for messages: JSON Lines, CSV, TSV and Parquet."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import load_dataset

from lit_logits.datamodules.json_lines import iter_json_lines

__all__ = ["read_rows"]

Row = tuple[dict[str, Any], str]

SEPARATORS = {".csv": ",", ".tsv": "\t"}


def read_rows(files: Iterable[str]) -> Iterator[Row]:
    """Yield the rows of files, each with its place.

    Blank lines are skipped. The first line of a `.csv` or `.tsv` file names its columns; values are strings, in double
    quotes where they hold a separator, a quote or a line break.

    Args:
        files: names that end in `.jsonl`, `.csv`, `.tsv`, or otherwise of Parquet files.

    Raises:
        ValueError: If a line is no JSON object, has another number of values than the file has columns, or is not
            UTF-8; it names the file and the line.
    """
    for file in files:
        if file.endswith(".jsonl"):
            yield from iter_json_lines(file)
        elif Path(file).suffix in SEPARATORS:
            yield from _read_table(file)
        else:
            rows = load_dataset("parquet", data_files=file, split="train", streaming=True)
            yield from ((row, f"row {number} of {file}") for number, row in enumerate(rows))


def _read_table(file: str) -> Iterator[Row]:
    """Yield a row of strings for each line below the first; a spreadsheet's byte order mark is no part of a name."""
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=SEPARATORS[Path(file).suffix], strict=True)
        columns: list[str] = []
        try:
            for values in reader:
                where = f"line {reader.line_num} of {file}"
                if not values:
                    continue
                if not columns:
                    columns = values
                elif len(values) != len(columns):
                    raise ValueError(
                        f"Expected {len(columns)} values ({', '.join(columns)}) in {where}, but got {len(values)}. Put"
                        " values that hold a separator or a quote in double quotes."
                    )
                else:
                    yield dict(zip(columns, values, strict=True)), where
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"Expected a table in UTF-8 in {file}, but got, after line {reader.line_num}: {error}. Correct the"
                " file, or save it as .jsonl."
            ) from error
