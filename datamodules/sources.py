"""Where the documents come from: files, a Hugging Face data set, or the standard library's documentation.

The `path` of a source names one of these:

* `"python-docs"`: the documentation of the running Python's standard library;
* paths or globs: a `.txt` or `.md` file is one document, a line of a `.jsonl` and a row of a `.parquet` file are one
  each;
* anything else, and a local folder: what `datasets.load_dataset` makes of it, with its own validation and test splits.

Documents that are empty or white space are dropped.
"""

import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset, load_dataset_builder

from lit_logits.datamodules.caching import digest, digest_file
from lit_logits.datamodules.checks import check_unicode
from lit_logits.datamodules.json_lines import iter_json_lines
from lit_logits.datamodules.python_docs import fingerprint_python_docs, read_python_docs

__all__ = [
    "SPLIT_NAMES",
    "Source",
    "dataset_builder",
    "dataset_name",
    "find_files",
    "fingerprint_source",
    "iter_column",
    "own_splits",
    "read_source",
    "stream_source",
]

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
SPLIT_NAMES = {"train": ("train",), "val": ("validation", "valid", "val", "dev"), "test": ("test",)}

Source = str | list[str]


def fingerprint_source(source: Source, subset: str | None, text_column: str, *, streaming: bool = False) -> str:
    """Return a digest of the source's content.

    Files are hashed byte by byte, except in a stream, where name, size and time of change stand for them. A Hugging
    Face data set is identified by its name, subset and revision, the standard library by its version and file sizes.

    Raises:
        ValueError: If `source` names nothing that can be found.
    """
    if source == "python-docs":
        return fingerprint_python_docs()
    files = find_files(source)
    if files is None:
        return digest("dataset", source, subset, dataset_builder(source, subset).hash, text_column)
    if streaming:
        stats = [(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in files]
        return digest("file stream", stats, text_column)
    return digest("files", [(Path(path).suffix, digest_file(path)) for path in files], text_column)


def read_source(source: Source, subset: str | None, text_column: str) -> dict[str, Sequence[str]]:
    """Read all documents of a source.

    Returns:
        The documents under `"train"` and, where the source has such splits of its own, `"val"` and `"test"`.

    Raises:
        ValueError: If the source cannot be found or read, has no column `text_column`, or holds no text.
    """
    files = find_files(source)
    if source == "python-docs":
        splits: dict[str, Iterable[str]] = {"train": read_python_docs()}
    elif files is not None:
        splits = {"train": (row["text"] for row in _read_files(files, text_column))}
    else:
        dataset_builder(source, subset)  # its errors are the helpful ones
        loaded = load_dataset(dataset_name(source), subset)
        splits = {name: iter_column(loaded[own], text_column) for name, own in own_splits(source, list(loaded)).items()}
    documents: dict[str, Sequence[str]] = {
        name: [text for text in texts if text and not text.isspace()] for name, texts in splits.items()
    }
    if not documents["train"]:
        raise ValueError(f"Expected `source` to hold text, but every document of {source!r} is empty.")
    return documents


def stream_source(source: Source, subset: str | None, text_column: str) -> dict[str, IterableDataset]:
    """Open a source for reading piece by piece, with one column, `text_column`.

    Returns:
        The streams under `"train"` and, where the source has such splits of its own, `"val"` and `"test"`. Files are
        the shards of the training stream.

    Raises:
        ValueError: If the source cannot be found, or is `"python-docs"`, which cannot be streamed.
    """
    if source == "python-docs":
        raise ValueError("Expected `streaming` to be False for the source 'python-docs', but got True.")
    files = find_files(source)
    if files is not None:
        rows = IterableDataset.from_generator(_read_files, gen_kwargs={"files": files, "text_column": text_column})
        return {"train": rows.rename_column("text", text_column) if text_column != "text" else rows}
    dataset_builder(source, subset)
    loaded = load_dataset(dataset_name(source), subset, streaming=True)
    return {name: loaded[own].select_columns([text_column]) for name, own in own_splits(source, list(loaded)).items()}


def iter_column(rows: Iterable[dict[str, Any]], text_column: str) -> Iterator[str]:
    """Yield the column's strings; a null is an empty document.

    Raises:
        ValueError: If the column is missing, or holds something other than strings, or half a surrogate pair.
    """
    for row in rows:
        if text_column not in row:
            raise ValueError(f"Expected `text_column` to be one of {sorted(row)}, but got {text_column!r}.")
        text = row[text_column]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"Expected the column {text_column!r} to hold strings, but got {type(text).__name__}.")
        check_unicode(text or "", f"the column {text_column!r}")
        yield text or ""


def find_files(source: Source, suffixes: tuple[str, ...] = SUFFIXES) -> list[str] | None:
    """Return the files that `source` names, sorted within each pattern, or None if it names a data set.

    Raises:
        ValueError: If `source` is a list of which something matches nothing, or a file has none of the suffixes.
    """
    patterns = [source] if isinstance(source, str) else list(source)
    found = [_match(pattern) for pattern in patterns]
    if isinstance(source, str) and not found[0]:
        return None
    for pattern, files in zip(patterns, found, strict=True):
        if not files:
            raise ValueError(
                f"Expected every `source` of a list to be a file or glob, but nothing matches {pattern!r}."
            )
    files = list(dict.fromkeys(file for files in found for file in files))
    for file in files:
        if Path(file).suffix not in suffixes:
            raise ValueError(f"Expected `source` to be files with a suffix of {suffixes}, but got {file!r}.")
    if not files:
        raise ValueError("Expected `source` to name at least one file, but got an empty list.")
    return files


def _match(pattern: str) -> list[str]:
    expanded = str(Path(pattern).expanduser())
    if Path(expanded).is_file():  # a name with brackets is a file before it is a glob
        return [expanded]
    return sorted(path for path in glob.glob(expanded, recursive=True) if Path(path).is_file())


def dataset_builder(source: Source, subset: str | None, *, embedded: str = "python-docs") -> Any:
    """Return the `datasets` builder of a hub name or a local folder.

    Args:
        source: hub name or folder.
        subset: configuration of a Hugging Face data set.
        embedded: name of the source that is always there, for the message.

    Raises:
        ValueError: If there is nothing to build from; it says why.
    """
    name = dataset_name(source)
    try:
        if not Path(name).is_dir() and (
            Path(name).suffix in (*SUFFIXES, ".csv", ".tsv") or name.startswith(("/", "./", "../"))
        ):
            raise FileNotFoundError("that is not the name of a data set")
        return load_dataset_builder(name, subset)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Expected `source` to be {embedded!r}, files, or a Hugging Face data set, but got {source!r}. As a path: "
            f"nothing matches it in {Path.cwd()}. As a data set (subset {subset!r}): {error}"
        ) from error


def dataset_name(source: Source) -> str:
    """Return what `datasets` is to load, with the home folder in full."""
    return str(Path(str(source)).expanduser()) if str(source).startswith("~") else str(source)


def own_splits(source: Source, names: list[str], *, may_be_test: bool = False) -> dict[str, str]:
    """Map `train`, `val` and `test` to the names that the data set gives to them.

    Args:
        source: for the error.
        names: those of the data set.
        may_be_test: also take one that is there to test with, and has no training split.

    Raises:
        ValueError: If there is none to train on.
    """
    own = {split: name for split, known in SPLIT_NAMES.items() for name in reversed(known) if name in names}
    if "train" not in own and not (may_be_test and "test" in own):
        raise ValueError(f"Expected {source!r} to have a split named 'train', but it has {names}.")
    return own


def _read_files(files: list[str], text_column: str) -> Iterator[dict[str, str]]:
    """Yield the documents of the files as `{"text": ...}`; `datasets` takes each item of `files` for a shard."""
    for file in files:
        texts: Iterable[str]
        if file.endswith(".jsonl"):
            texts = _read_json_lines(file, text_column)
        elif file.endswith(".parquet"):
            texts = iter_column(load_dataset("parquet", data_files=file, split="train", streaming=True), text_column)
        else:
            texts = [_read_text(file)]
        for text in texts:
            yield {"text": text}


def _read_text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected {file} to be UTF-8 text, but got: {error}") from error


def _read_json_lines(file: str, text_column: str) -> Iterator[str]:
    """Yield one string a line.

    Raises:
        ValueError: If a line is not a JSON object with a string under `text_column`; it names the file and the line.
    """
    for row, where in iter_json_lines(file):
        try:
            yield from iter_column([row], text_column)
        except ValueError as error:
            raise ValueError(f"{error} It is in {where}.") from error
