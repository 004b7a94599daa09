"""Random draws over classes: held-out rows, subsets, wrong labels. Each is a function of a key and an index alone.

N is the number of rows of a split and K that of classes. Nothing here has a state: the order of the calls, the process
and the library's version change no draw, and more rows or a larger share keep those that were drawn before.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_logits.datamodules.caching import digest

__all__ = ["SplitRows", "add_label_noise", "hash_uniform", "hold_out", "pick_balanced", "plan_splits"]

Ints = NDArray[np.int64]


class SplitRows(NamedTuple):
    """The rows that make up a split.

    Attributes:
        own: the data set's own split that they are in.
        rows: their numbers there, ascending.
    """

    own: str
    rows: Ints


def hash_uniform(indices: Ints, count: int, *key: object) -> NDArray[np.float64]:
    """Return numbers that are uniform in [0, 1), those of one index independent of which others are asked for.

    The bits are those of splitmix64 [0], started at a digest of the key, at the positions `count · index + 0, 1, ...`.

    Args:
        indices: (n,), each at least 0.
        count: c, numbers an index.
        key: what names the stream: see `digest`.

    Returns:
        (n, c).

    References:
        [0]: splitmix64, Steele, Lea and Flood, 2014, doi 10.1145/2660193.2660195.

    Example:
        >>> hash_uniform(np.array([3, 5]), 2, "crop", 42).round(3).tolist()
        [[0.031, 0.491], [0.094, 0.116]]
    """
    start = np.uint64(int(digest(*key)[:16], 16))
    steps = (indices[:, None] * count + np.arange(1, count + 1)).astype(np.uint64)
    bits = steps * np.uint64(0x9E3779B97F4A7C15) + start  # modulo 2⁶⁴, as all that follows
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hold_out(labels: Ints, fractions: dict[str, float], seed: int) -> dict[str, Ints]:
    """Split rows into `"train"` and the splits named in `fractions`, class by class.

    A split has fraction · N rows, rounded, but at least one; of each class it has that share to within one row. A
    class's last row goes to training as long as there are others to take.

    Args:
        labels: (N,) classes in [0, K).
        fractions: share for each split other than `"train"`, in [0, 1); one of zero gets no rows.
        seed: of the draw.

    Returns:
        Rows of each split, ascending.

    Example:
        >>> held = hold_out(np.array([0, 1] * 10), {"val": 0.2, "test": 0.1}, seed=0)
        >>> {name: rows.tolist() for name, rows in held.items() if name != "train"}
        {'val': [7, 12, 14, 15], 'test': [16, 19]}
    """
    counts = np.bincount(labels)
    ranks = _rank_in_class(labels, hash_uniform(np.arange(len(labels)), 1, "hold out", seed)[:, 0])
    taken = np.zeros_like(counts)
    splits = {}
    for name, fraction in fractions.items():
        size = max(1, round(fraction * len(labels))) if fraction > 0 else 0
        shares = _apportion(counts, counts - taken, size)
        splits[name] = np.flatnonzero((ranks >= taken[labels]) & (ranks < (taken + shares)[labels]))
        taken += shares
    return {"train": np.flatnonzero(ranks >= taken[labels]), **splits}


def plan_splits(labels: dict[str, Ints], fractions: dict[str, float], seed: int) -> dict[str, SplitRows]:
    """Choose the rows of `"train"`, `"val"` and `"test"`.

    The data set's own splits are taken as they are. A missing one is held out of its training split if its fraction is
    not zero; else the other of the two stands in for it. If both are missing, neither is made.

    Args:
        labels: classes of the data set's own splits, of `"train"` at least.
        fractions: shares of the training split for `"val"` and `"test"`.
        seed: of the draw.

    Example:
        >>> plan = plan_splits({"train": np.zeros(8, int), "test": np.zeros(2, int)}, {"val": 0.0, "test": 0.0}, seed=0)
        >>> {name: (own, len(rows)) for name, (own, rows) in plan.items()}
        {'train': ('train', 8), 'test': ('test', 2), 'val': ('test', 2)}
    """
    missing = {name: share for name, share in fractions.items() if name not in labels and share > 0}
    plan = {name: SplitRows("train", rows) for name, rows in hold_out(labels["train"], missing, seed).items()}
    plan |= {name: SplitRows(name, np.arange(len(own))) for name, own in labels.items() if name != "train"}
    for name, other in (("val", "test"), ("test", "val")):
        if name not in plan and other in plan:
            plan[name] = plan[other]
    return plan


def pick_balanced(labels: Ints, size: int, seed: int) -> Ints:
    """Return rows with as many of each class as of any other, as far as there are.

    Args:
        labels: (N,) classes in [0, K).
        size: number of rows; N or more gives all.
        seed: of the draw; a larger `size` adds rows to those of a smaller one.

    Returns:
        The rows, ascending.

    Example:
        >>> labels = np.array([0] * 90 + [1] * 10)
        >>> np.bincount(labels[pick_balanced(labels, 8, seed=0)]).tolist()
        [4, 4]
    """
    draws = hash_uniform(np.arange(len(labels)), 2, "pick", seed)
    order = np.lexsort((draws[:, 1], _rank_in_class(labels, draws[:, 0])))
    return np.sort(order[:size])


def add_label_noise(labels: Ints, noise: float, num_classes: int, seed: int) -> Ints:
    """Replace a share of the labels, each by one of the K − 1 other classes, all equally likely.

    Args:
        labels: (N,) classes in [0, K).
        noise: share that is replaced, rounded to a whole number of labels.
        num_classes: K, at least 2.
        seed: of the draw; a higher `noise` keeps the wrong labels of a lower one.

    Returns:
        (N,), a copy.

    Example:
        >>> add_label_noise(np.zeros(10, int), 0.3, 3, seed=0).tolist()
        [0, 1, 0, 0, 2, 1, 0, 0, 0, 0]
    """
    draws = hash_uniform(np.arange(len(labels)), 2, "label noise", seed)
    wrong = np.argsort(draws[:, 0], kind="stable")[: round(noise * len(labels))]
    noisy = labels.copy()
    shifts = 1 + (draws[wrong, 1] * (num_classes - 1)).astype(np.int64)
    noisy[wrong] = (labels[wrong] + shifts) % num_classes
    return noisy


def _rank_in_class(labels: Ints, draws: NDArray[np.float64]) -> Ints:
    """Return each row's position among the rows of its class, ordered by their draws."""
    order = np.lexsort((draws, labels))
    ordered = labels[order]
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return ranks


def _apportion(counts: Ints, left: Ints, size: int) -> Ints:
    """Deal `size` rows out to the classes in proportion to `counts`, by largest remainders, of the rows that are left.

    A class's last row is dealt out when nothing else is left.
    """
    quotas = counts * size / counts.sum()
    shares = np.minimum(quotas.astype(np.int64), np.maximum(left - 1, 0))
    for _ in range(min(size, left.sum()) - shares.sum()):
        gaps = quotas - shares
        gaps[shares >= left - 1] -= counts.sum()
        gaps[shares >= left] = -np.inf
        shares[gaps.argmax()] += 1
    return shares
