"""Names of classes, and their numbers."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_logits.datamodules.filling import IGNORE_INDEX

__all__ = ["encode_labels", "order_classes", "read_label"]


def read_label(value: Any, column: str, where: str, names: Sequence[str] | None = None) -> str | None:
    """Return the name of a row's class, or None without one: null, NaN, empty, or −1 in a `ClassLabel`.

    Args:
        value: of the column.
        column: its name, for messages.
        where: the row's place, for messages.
        names: of the classes by number, as a `ClassLabel` has them; a value is a number then.

    Raises:
        ValueError: If the value is neither a string nor a whole number.

    Example:
        >>> read_label(" joy ", "label", "row 0"), read_label(3.0, "label", "row 1"), read_label("", "label", "row 2")
        ('joy', '3', None)
    """
    if value is None or value != value or (names is not None and value == -1):
        return None
    if isinstance(value, float) and value.is_integer():  # whole numbers beside nulls, as pandas writes them
        value = int(value)
    if isinstance(value, list | tuple | dict):
        raise ValueError(
            f"Expected one class a row in the column {column!r}, but got {value!r} in {where}. Rows of several classes"
            " are not supported: make a column of one class each."
        )
    if not isinstance(value, str | int):
        raise ValueError(
            f"Expected the column {column!r} to hold strings or whole numbers, but got {value!r} in {where}. Round it,"
            " or set `label_column` to another column."
        )
    if names is not None:
        if not 0 <= int(value) < len(names):
            raise ValueError(
                f"Expected the column {column!r} to hold numbers of its {len(names)} classes, or -1, but got {value!r}"
                f" in {where}. Correct the row."
            )
        return names[int(value)]
    return str(value).strip() or None


def order_classes(labels: Iterable[str | None]) -> list[str]:
    """Return the distinct labels: by size if all are whole numbers, else in alphabetical order.

    Example:
        >>> order_classes(["10", "9", None, "10"]), order_classes(["10", "b", "9"])
        (['9', '10'], ['10', '9', 'b'])
    """
    names = {label for label in labels if label is not None}
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def encode_labels(labels: Sequence[str | None], class_names: Sequence[str], split: str) -> NDArray[np.int64]:
    """Return the numbers of classes, −100 where one is missing.

    Args:
        labels: (N,) names of classes.
        class_names: in the order of their numbers.
        split: for messages.

    Raises:
        ValueError: If a label is none of the classes.
    """
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(class_names)}
    unknown = sorted({label for label in labels if label is not None} - set(class_names))
    if unknown:
        raise ValueError(
            f"Expected all labels of the split {split!r} to be among the {len(class_names)} classes, which are those of"
            f" the training rows unless a ClassLabel or `class_names` tells them, but got {unknown[:5]}. Remove these"
            " rows, or give `class_names`."
        )
    return np.array([numbers.get(label, IGNORE_INDEX) for label in labels], np.int64)
