"""Evaluation on W processes: equally many batches on each, and every row counted once.

Under DistributedDataParallel a step of validation waits for the other ranks, so that all must make as many steps. Where
rows are too few for that, copies fill up. Their labels are −100, which no loss, accuracy or mean takes in.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import Dataset

__all__ = ["FilledRows", "collate_filled"]

IGNORE_INDEX = -100
"""The label of what is not counted."""


class FilledRows(Dataset):
    """A data set with copies of its last row behind it, up to a multiple of W rows.

    Items are pairs of a row and whether it is the data set's own, for `collate_filled`.

    Args:
        dataset: anything with a length of at least 1.
        num_replicas: W, the number of ranks.

    Example:
        >>> list(map(FilledRows(["a", "b", "c"], num_replicas=2).__getitem__, range(4)))
        [('a', True), ('b', True), ('c', True), ('c', False)]
    """

    def __init__(self, dataset: Any, num_replicas: int) -> None:
        self.dataset, self.size = dataset, len(dataset)
        self.filled_size = -(-self.size // num_replicas) * num_replicas

    def __len__(self) -> int:
        """Return the number of rows with the copies."""
        return self.filled_size

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        """Return a row, and whether it is the data set's own."""
        return self.dataset[min(index, self.size - 1)], index < self.size


def collate_filled(items: list[tuple[Any, bool]], collate_fn: Callable[[list[Any]], dict[str, Any]]) -> dict[str, Any]:
    """Make a batch in which copies have the labels −100.

    Args:
        items: of `FilledRows`, the copies last.
        collate_fn: makes a batch of rows, a dict with `labels` of one or more samples for each row; dicts within it, as
            of other tokenizers, may have `labels` of their own.

    Example:
        >>> import torch
        >>> collate_filled([(5, True), (5, False)], lambda rows: {"labels": torch.tensor(rows)})
        {'labels': tensor([   5, -100])}
    """
    batch = collate_fn([row for row, _ in items])
    copies = [row for row, is_own in items if not is_own]
    if copies:
        _ignore_last(batch, len(collate_fn(copies)["labels"]))
    return batch


def _ignore_last(batch: Mapping[str, Any], count: int) -> None:
    """Set the last labels of a batch, and of batches within it, to −100."""
    for name, value in batch.items():
        if isinstance(value, Mapping):
            _ignore_last(value, count)
        elif name == "labels":
            value[-count:] = IGNORE_INDEX
