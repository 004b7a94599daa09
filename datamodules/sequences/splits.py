"""The rows of a source, split, with the numbers of their classes."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray

from lit_logits.datamodules.caching import build_once, digest
from lit_logits.datamodules.sampling import plan_splits
from lit_logits.datamodules.sequences.labels import encode_labels, order_classes
from lit_logits.datamodules.sequences.sources import Row, SequenceSource, fingerprint_sequences, read_sequences

__all__ = ["LabelledTexts", "SequenceSplits"]


class LabelledTexts(NamedTuple):
    """A split.

    Attributes:
        texts: one, or a pair, for each row.
        labels: (N,) classes, −100 where one is missing.
    """

    texts: list[tuple[str, ...]]
    labels: NDArray[np.int64]


class SequenceSplits:
    """The rows of a source, split as `SequenceDataModule` says. Nothing is read before it is asked for.

    Args:
        source: where the rows come from.
        fractions: shares of the training rows for `"val"` and `"test"`, in [0, 1).
        seed: of the split.
        cache_dir: folder of the cache, where the names of the classes are kept.
    """

    def __init__(self, source: SequenceSource, *, fractions: dict[str, float], seed: int, cache_dir: Path) -> None:
        self.source, self.fractions, self.seed, self.cache_dir = source, fractions, seed, cache_dir
        self._rows: tuple[dict[str, list[Row]], list[str] | None] | None = None

    @cached_property
    def key(self) -> str:
        """Digest of all that decides which rows are in which split."""
        return digest(self._source_key, sorted(self.fractions.items()), self.seed)

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers; the first use in any process reads the source."""
        folder = build_once(self.cache_dir / f"classes-{self._source_key}", self._write_class_names)
        return json.loads((folder / "class_names.json").read_text(encoding="utf-8"))

    def read(self) -> dict[str, LabelledTexts]:
        """Return the splits that are not switched off, in the source's order.

        Raises:
            ValueError: If the source cannot be read, a label is unknown, or nothing is left to train on.
        """
        own = {name: _without_empty(rows, name) for name, rows in self._read()[0].items()}
        own = {name: rows for name, rows in own.items() if name == "train" or _has_labels(rows, name)}
        labels = {
            name: encode_labels([row.label for row in rows], self.class_names, name) for name, rows in own.items()
        }
        held_out = self._hold_out(own["train"], labels)
        splits = {name: LabelledTexts([row.texts for row in rows], labels[name]) for name, rows in own.items()}
        train = splits["train"]
        for name in ("train", "val", "test"):
            rows = np.flatnonzero(held_out == name)
            if len(rows):
                splits[name] = LabelledTexts([train.texts[row] for row in rows], train.labels[rows])
        if not (held_out == "train").any():
            raise ValueError(
                f"Expected the source to hold rows to train on, but got {len(train.texts)}, all of them held out. Set"
                " `val_fraction` and `test_fraction` to 0, or give more rows."
            )
        for name, other in (("val", "test"), ("test", "val")):
            if name not in splits and other in splits:
                splits[name] = splits[other]
        return splits

    def forget(self) -> None:
        """Give the memory of the rows back; they are read again if need be."""
        self._rows = None

    @cached_property
    def _source_key(self) -> str:
        given = self.source
        columns = given.text_columns, given.label_column, given.split_column, given.class_names
        return digest(fingerprint_sequences(given), columns)

    def _read(self) -> tuple[dict[str, list[Row]], list[str] | None]:
        if self._rows is None:
            self._rows = read_sequences(self.source)
        return self._rows

    def _write_class_names(self, directory: Path) -> None:
        names = self.source.class_names
        if names is None:
            splits, told = self._read()
            names = told or order_classes(row.label for row in splits["train"] if _has_text(row))
        if len(names) < 2:
            raise ValueError(
                f"Expected the column {self.source.label_column!r} to hold at least 2 classes, but got {names}. Set"
                " `label_column` to another column."
            )
        (directory / "class_names.json").write_text(json.dumps(names), encoding="utf-8")

    def _hold_out(self, train: Sequence[Row], labels: dict[str, NDArray[np.int64]]) -> NDArray[np.str_]:
        """Return the split of each training row: equal texts share one, and those without a class stay where they are.

        Only the first of equal texts is drawn, among those with a class, so that each class gives its share.
        """
        first: dict[tuple[str, ...], int] = {}
        for number, row in enumerate(train):
            if row.label is not None:
                first.setdefault(row.texts, number)
        drawn = np.array([*first.values()], np.int64)
        if not len(drawn):
            return np.array(["train"] * len(train))
        plan = plan_splits({**labels, "train": labels["train"][drawn]}, self.fractions, self.seed)
        split_of = {
            train[number].texts: name for name, (own, rows) in plan.items() if own == "train" for number in drawn[rows]
        }
        return np.array([split_of.get(row.texts, "train") for row in train])


def _has_text(row: Row) -> bool:
    return any(text.strip() for text in row.texts)


def _without_empty(rows: list[Row], split: str) -> list[Row]:
    """Return the rows with a text, and warn of the others."""
    empty = [row for row in rows if not _has_text(row)]
    if empty:
        rank_zero_warn(
            f"Expected every row to have a text, but {len(empty)} of {len(rows)} in the split {split!r} have none, such"
            f" as {empty[0].where}. They are left out."
        )
        left_out = {id(row) for row in empty}
        rows = [row for row in rows if id(row) not in left_out]
    return rows


def _has_labels(rows: Sequence[Row], split: str) -> bool:
    """Return whether a validation or test split has a label to be judged by, and warn if it has none."""
    has_labels = any(row.label is not None for row in rows)
    if not has_labels:
        rank_zero_warn(
            f"Expected the split {split!r} to have labels, but got none in {len(rows)} rows. It is taken for absent;"
            f" see `{split}_fraction`."
        )
    return has_labels
