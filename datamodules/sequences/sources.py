"""Where texts and their classes come from: files, a folder of them, a Hugging Face data set, or Python's library.

The `path` of a source names one of these:

* `"python-paragraphs"`: see `lit_logits.datamodules.sequences.python_paragraphs`;
* a file, a folder, globs or a list of these: `.jsonl`, `.csv`, `.tsv` and `.parquet`;
* a folder as `Dataset.save_to_disk` wrote it;
* anything else: the name of a data set for `datasets.load_dataset`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, load_dataset, load_from_disk

from lit_logits.datamodules.caching import digest, digest_file
from lit_logits.datamodules.checks import check_unicode
from lit_logits.datamodules.rows import read_rows
from lit_logits.datamodules.sequences.labels import read_label
from lit_logits.datamodules.sequences.python_paragraphs import fingerprint_python_paragraphs, read_python_paragraphs
from lit_logits.datamodules.sources import SPLIT_NAMES, Source, dataset_builder, dataset_name, find_files, own_splits

__all__ = ["Row", "SequenceSource", "fingerprint_sequences", "read_sequences"]

EMBEDDED = "python-paragraphs"
SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class SequenceSource:
    """Where texts and their classes come from.

    Args:
        path: `"python-paragraphs"` (about 6,000 paragraphs of the standard library's docstrings, each with its module),
            a file, a folder or globs of `.jsonl`, `.csv`, `.tsv` or `.parquet`, a folder of `Dataset.save_to_disk`, or
            a Hugging Face data set. Of several files, the word `train`, `validation` (`valid`, `val`, `dev`) or `test`
            in a name, or in a folder's name below `path`, tells the split.
        subset: configuration of a Hugging Face data set, such as `"sst2"`.
        text_column: name of the texts; a list of two names for pairs of texts.
        label_column: name of the classes: strings, integers or `ClassLabel`.
        split_column: name of a column of `train`, `validation` and `test`, which is used in files that have it. None
            uses none.
        class_names: names of the classes in the order of their numbers, such as those of a teacher (`id2label`). None
            takes those of a `ClassLabel`, or else the labels of the training rows: whole numbers by size, other
            strings in alphabetical order.

    Raises:
        ValueError: If there are more than two columns of texts, or class names are repeated.
    """

    path: Source
    subset: str | None = None
    text_column: str | list[str] = "text"
    label_column: str = "label"
    split_column: str | None = "split"
    class_names: list[str] | None = None

    def __post_init__(self) -> None:
        if len(self.text_columns) not in (1, 2):
            raise ValueError(
                f"Expected `text_column` to be a name, or two for pairs of texts, but got {self.text_column!r}."
            )
        if len(set(self.class_names or [])) < len(self.class_names or []):
            raise ValueError(f"Expected `class_names` to differ from each other, but got {self.class_names}.")

    @property
    def text_columns(self) -> list[str]:
        """Names of the columns of texts."""
        return [self.text_column] if isinstance(self.text_column, str) else list(self.text_column)


class Row(NamedTuple):
    """A text, or a pair of texts, with its class.

    Attributes:
        texts: one or two; empty ones stand for missing ones.
        label: name of the class, or None.
        where: the row's place in its source, for messages.
    """

    texts: tuple[str, ...]
    label: str | None
    where: str


def fingerprint_sequences(source: SequenceSource) -> str:
    """Return a digest of the source's content.

    Files are hashed byte by byte, except those of `save_to_disk`, where size and time of change stand for them.

    Raises:
        ValueError: If the path names nothing that can be found.
    """
    if source.path == EMBEDDED:
        return fingerprint_python_paragraphs()
    if (saved := _saved_folder(source.path)) is not None:
        stats = [(path.relative_to(saved).as_posix(), path.stat()) for path in saved.rglob("*") if path.is_file()]
        return digest("saved", sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
    files = _find_splits(source.path)
    if files is None:
        return digest("dataset", source.path, source.subset, _builder(source).hash)
    return digest("files", [(split, Path(file).suffix, digest_file(file)) for file, split in files.items()])


def read_sequences(source: SequenceSource) -> tuple[dict[str, list[Row]], list[str] | None]:
    """Read all rows of a source.

    Returns:
        The rows under `"train"` and, where the source has such splits of its own, `"val"` and `"test"`; and the names
        that a `ClassLabel` gives to the classes, or None.

    Raises:
        ValueError: If the source cannot be found, has no training rows, or a row is not as it should be; it names the
            row.
    """
    if source.path == EMBEDDED:
        pairs = read_python_paragraphs()
        return {"train": [Row((text,), module, f"the paragraph {text!r}") for text, module in pairs]}, None
    if (saved := _saved_folder(source.path)) is not None:
        loaded: Any = load_from_disk(str(saved))
        return _parse_sets(source, {"train": loaded} if isinstance(loaded, Dataset) else dict(loaded))
    files = _find_splits(source.path)
    if files is not None:
        return _read_files(source, files)
    _builder(source)  # its errors are the helpful ones
    return _parse_sets(source, dict(load_dataset(dataset_name(source.path), source.subset)))


def _builder(source: SequenceSource) -> Any:
    return dataset_builder(source.path, source.subset, embedded=EMBEDDED)


def _parse_sets(source: SequenceSource, sets: Mapping[str, Dataset]) -> tuple[dict[str, list[Row]], list[str] | None]:
    """Parse the splits of a data set; those that are empty are absent."""
    own = own_splits(source.path, [name for name, rows in sets.items() if len(rows)])
    names = _label_names(sets[own["train"]].features, source)
    rows = {
        split: [
            _parse(row, f"row {i} of {name!r} of {source.path!r}", source, names) for i, row in enumerate(sets[name])
        ]
        for split, name in own.items()
    }
    return rows, names


def _read_files(source: SequenceSource, files: Mapping[str, str]) -> tuple[dict[str, list[Row]], list[str] | None]:
    """Read the rows of files, each into the split that its column of splits or its file tells."""
    rows: dict[str, list[Row]] = {}
    told: list[str] | None = None
    for file, split in files.items():
        names = _label_names(_features(file), source)
        told = told or names
        for row, where in read_rows([file]):
            rows.setdefault(_split_of_row(row, where, source) or split, []).append(_parse(row, where, source, names))
    if "train" not in rows:
        raise ValueError(
            f"Expected {source.path!r} to have rows to train on, but got {sorted(rows) or 'none'}. Name a file with the"
            " word 'train', or the split of each row in `split_column`."
        )
    return rows, told


def _features(file: str) -> Mapping[str, Any]:
    """Return the types of a file's columns, of Parquet only."""
    return Features.from_arrow_schema(pyarrow.parquet.read_schema(file)) if file.endswith(".parquet") else {}


def _label_names(features: Mapping[str, Any], source: SequenceSource) -> list[str] | None:
    feature = features.get(source.label_column)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _parse(row: Mapping[str, Any], where: str, source: SequenceSource, names: list[str] | None) -> Row:
    """Make a `Row` of a mapping from columns to values."""
    for argument, columns in (("text_column", source.text_columns), ("label_column", [source.label_column])):
        for column in columns:
            if column not in row:
                raise ValueError(f"Expected `{argument}` to be one of {sorted(row)}, but got {column!r}, in {where}.")
    texts = tuple(row[column] if row[column] is not None else "" for column in source.text_columns)
    for column, text in zip(source.text_columns, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(
                f"Expected the column {column!r} to hold strings, but got {type(text).__name__} in {where}. Convert it,"
                " or set `text_column` to another column."
            )
        check_unicode(text, where)
    return Row(texts, read_label(row[source.label_column], source.label_column, where, names), where)


def _split_of_row(row: Mapping[str, Any], where: str, source: SequenceSource) -> str | None:
    """Return what the column of splits tells, or None without one."""
    if source.split_column is None or source.split_column not in row:
        return None
    value = row[source.split_column]
    split = next((split for split, known in SPLIT_NAMES.items() if value in known), None)
    if split is None:
        known = [name for names in SPLIT_NAMES.values() for name in names]
        raise ValueError(
            f"Expected the column {source.split_column!r} to hold one of {known}, but got {value!r} in {where}. If it"
            " means something else, set `split_column: null`."
        )
    return split


def _saved_folder(path: Source) -> Path | None:
    """Return the folder that `save_to_disk` wrote, or None if it is no such folder."""
    folder = Path(path).expanduser() if isinstance(path, str) else None
    files = ("dataset_dict.json", "state.json")
    return folder if folder is not None and any((folder / name).is_file() for name in files) else None


def _find_splits(path: Source) -> dict[str, str] | None:
    """Return the split of each file that a path names, or None if it names none.

    Raises:
        ValueError: If a folder has no file that can be read, or only some of the names tell a split.
    """
    folder = Path(path).expanduser() if isinstance(path, str) and Path(path).expanduser().is_dir() else None
    if folder is None:
        files = find_files(path, SUFFIXES)
        names = {file: Path(file).stem for file in files or []}
    else:
        found = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        files = [str(file) for file in found]
        names = {str(file): file.relative_to(folder).with_suffix("").as_posix() for file in found}
        if not files:
            raise ValueError(f"Expected the folder {path!r} to hold files with a suffix of {SUFFIXES}, but got none.")
    if files is None:
        return None
    told = {file: _split_of_name(name) for file, name in names.items()}
    if len(files) == 1 or not any(told.values()):
        return dict.fromkeys(files, "train")
    if unknown := [file for file, split in told.items() if split is None]:
        raise ValueError(
            f"Expected every file to have one of 'train', 'validation' or 'test' in its name, because some have, but"
            f" got {unknown[:3]}. Rename them, or leave them out with a glob."
        )
    return {file: split for file, split in told.items() if split is not None}


def _split_of_name(name: str) -> str | None:
    """Return the split that the last telling word of a file's name means."""
    words: Iterator[str] = reversed(re.split("[^a-z]+", name.lower()))
    splits: Iterable[str | None] = (
        next((split for split, known in SPLIT_NAMES.items() if word in known), None) for word in words
    )
    return next((split for split in splits if split is not None), None)
