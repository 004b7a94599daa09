"""Assign documents to splits by their text, so that no text is in two of them."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

__all__ = ["bucket_of", "carve_splits", "check_fractions", "fill_splits"]

Item = TypeVar("Item")

FEW_DOCUMENTS = 40
"""A corpus with fewer distinct documents than this is cut into pieces before it is split."""


def check_fractions(fractions: dict[str, float], *, may_be_all: bool = False) -> None:
    """Raise unless each share is in [0, 1) and something is left for training.

    Args:
        fractions: shares of the splits other than `"train"`.
        may_be_all: also let one of them be 1 and the others 0, which leaves nothing to train on.

    Raises:
        ValueError: If a share is out of range, or all together leave nothing.
    """
    if may_be_all and sorted(fractions.values(), reverse=True)[0] == sum(fractions.values()) == 1:
        return
    for name, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise ValueError(f"Expected `{name}_fraction` to be in [0, 1), but got {fraction}.")
    if sum(fractions.values()) >= 1:
        names = " + ".join(f"`{name}_fraction`" for name in fractions)
        raise ValueError(f"Expected {names} to be below 1, but got {' + '.join(map(str, fractions.values()))}.")


def carve_splits(documents: Sequence[str], fractions: dict[str, float], seed: int) -> dict[str, list[str]]:
    r"""Split documents into `"train"` and the splits named in `fractions`.

    Documents are visited in an order drawn from `seed` and go to the first split that they still fit into; a split that
    all would overfill gets the smallest one, and the rest is the training split. Equal documents stay together. A
    corpus of few documents is first cut, between lines where possible, into pieces of a quarter of the smallest split.

    Args:
        documents: the texts, in any order: it decides nothing but the order within each split.
        fractions: share of the corpus's characters for each split other than `"train"`, in [0, 1).
        seed: of the order.

    Returns:
        The splits `"train"` and those of `fractions`; one whose fraction is zero is an empty list.

    Raises:
        ValueError: If nothing would be left for training.

    Example:
        >>> splits = carve_splits(["line\n" * 3 + str(i) for i in range(100)], {"val": 0.1, "test": 0.2}, seed=0)
        >>> {name: len(texts) for name, texts in splits.items()}
        {'train': 70, 'val': 10, 'test': 20}
    """
    splits: dict[str, list[str]] = {"train": [], **{name: [] for name in fractions}}
    fractions = {name: fraction for name, fraction in fractions.items() if fraction > 0}
    if fractions and len(set(documents)) < FEW_DOCUMENTS:
        limit = max(1, int(sum(map(len, documents)) * min(fractions.values()) / 4))
        documents = [piece for text in documents for piece in _cut(text, limit) if not piece.isspace()]
    sizes = Counter[str]()
    for text in documents:
        sizes[text] += len(text)
    total = sum(sizes.values())
    order = sorted(sizes, key=lambda text: _draw(text, seed)) if fractions else []
    split_of = fill_splits({text: sizes[text] for text in order}, fractions)
    for text in documents:
        splits[split_of.get(text, "train")].append(text)
    if not splits["train"]:
        raise ValueError(
            f"Expected the corpus to hold enough distinct text for {1 + len(fractions)} splits, but got {len(sizes)} "
            f"distinct pieces of {total} characters in all. Set `val_fraction` and `test_fraction` to 0."
        )
    return splits


def fill_splits(sizes: Mapping[Item, int], fractions: Mapping[str, float]) -> dict[Item, str]:
    """Return the split of each item that does not stay for training.

    Items go to the first split that they still fit into; a split that all would overfill gets the smallest one.

    Args:
        sizes: size of each item, in the order in which they are visited.
        fractions: share of the sizes' sum for each split.

    Example:
        >>> fill_splits({"a": 3, "b": 1, "c": 6}, {"val": 0.3, "test": 0.1})
        {'a': 'val', 'b': 'test'}
    """
    total = sum(sizes.values())
    split_of: dict[Item, str] = {}
    for name, fraction in fractions.items():
        room = fraction * total
        free = [item for item in sizes if item not in split_of]
        taken = []
        for item in free:
            if sizes[item] <= room:
                taken.append(item)
                room -= sizes[item]
        if room and free and not taken:
            taken = [min(free, key=sizes.__getitem__)]
        split_of |= dict.fromkeys(taken, name)
    return split_of


def bucket_of(text: str, fractions: dict[str, float], seed: int) -> str:
    """Return the split of a document of a stream, by a hash of its text: independent of order, shards and processes.

    Args:
        text: the document.
        fractions: expected share of the documents for each split other than `"train"`.
        seed: of the hash.

    Example:
        >>> [bucket_of(text, {"val": 0.3, "test": 0.3}, seed=1) for text in "abcdef"]
        ['val', 'test', 'train', 'val', 'test', 'test']
    """
    position = int.from_bytes(_draw(text, seed)[:8], "big") / 2**64
    for name, fraction in fractions.items():
        if position < fraction:
            return name
        position -= fraction
    return "train"


def _draw(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()


def _cut(text: str, limit: int) -> list[str]:
    """Cut a text into pieces of at most `limit` characters, between lines unless a line alone is longer."""
    pieces, current = [], ""
    for line in text.splitlines(keepends=True):
        if current and len(current) + len(line) > limit:
            pieces.append(current)
            current = ""
        current += line
        while len(current) > limit:
            pieces.append(current[:limit])
            current = current[limit:]
    return [*pieces, current] if current else pieces
