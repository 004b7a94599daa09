"""Assign prompt–response pairs to splits, and draw the shots. Pairs that share a key stay together."""

from collections.abc import Iterable, Sequence
from random import Random
from typing import NamedTuple

from lit_logits.datamodules.caching import digest
from lit_logits.datamodules.splitting import fill_splits

__all__ = ["Example", "draw_shots", "group_examples", "sample_id", "shots_before", "split_examples"]


class Example(NamedTuple):
    """A prompt and what should follow it.

    Attributes:
        prompt: never empty.
        response: empty where the source has prompts only.
        keys: texts that no two splits may share.
        choices: of a multiple-choice question, `response` among them; else empty.
        correct: number of the right choice; 0 without choices.
        where: the row's place in its source, for messages.
        teacher: name of the model that the pair is to be learned from, or empty.
        messages: role and content of each turn of a conversation, of which prompt and response then are what comes
            before the assistant's first turn, and its turns, a line break between them; else empty.
    """

    prompt: str
    response: str
    keys: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    correct: int = 0
    where: str = ""
    teacher: str = ""
    messages: tuple[tuple[str, str], ...] = ()


def group_examples(examples: Sequence[Example]) -> list[int]:
    """Return a number for each example, the same for examples that a chain of shared keys connects.

    Example:
        >>> group_examples([Example("p", "r", keys) for keys in (("a",), ("b",), ("a", "c"), ("c",), ())])
        [0, 1, 0, 0, 4]
    """
    parent = list(range(len(examples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[str, int] = {}
    for i, example in enumerate(examples):
        for key in example.keys:
            one, other = sorted((root(first.setdefault(key, i)), root(i)))
            parent[other] = one
    return [root(i) for i in range(len(examples))]


def split_examples(examples: Sequence[Example], fractions: dict[str, float], seed: int) -> dict[str, list[Example]]:
    """Split examples into `"train"` and the splits named in `fractions`.

    Groups (see `group_examples`) are visited in an order drawn from the seed, and `fill_splits` says where they go; the
    rest is the training split.

    Args:
        examples: the pairs; their order decides only the order within each split.
        fractions: share of the examples for each split other than `"train"`, in [0, 1); zero gives an empty split.
        seed: of the order.

    Raises:
        ValueError: If nothing would be left for training.

    Example:
        >>> examples = [Example(str(i), "yes", (str(i),)) for i in range(50)]
        >>> {name: len(rows) for name, rows in split_examples(examples, {"val": 0.1, "test": 0.2}, seed=0).items()}
        {'train': 35, 'val': 5, 'test': 10}
    """
    groups: dict[int, list[int]] = {}
    for i, group in enumerate(group_examples(examples)):
        groups.setdefault(group, []).append(i)
    order = sorted(groups, key=lambda group: _draw((examples[i] for i in groups[group]), seed))
    split_of_group = fill_splits({group: len(groups[group]) for group in order}, fractions)
    split_of = {i: split_of_group.get(group, "train") for group, rows in groups.items() for i in rows}
    splits: dict[str, list[Example]] = {name: [] for name in ("train", *fractions)}
    for i, example in enumerate(examples):
        splits[split_of[i]].append(example)
    if not splits["train"] and max(fractions.values(), default=0) < 1:
        raise ValueError(
            f"Expected the source to hold enough distinct pairs for {1 + sum(map(bool, fractions.values()))} splits, "
            f"but got {len(groups)} of {len(examples)} rows. Set `val_fraction` and `test_fraction` to 0."
        )
    return splits


def draw_shots(train: Sequence[Example], num_shots: int, seed: int) -> list[Example]:
    """Return `num_shots` + 1 training examples of different prompts: one more, for the row that is itself a shot.

    Raises:
        ValueError: If there are fewer.
    """
    if num_shots == 0:
        return []
    order = Random(seed).sample(range(len(train)), len(train))
    shots = {train[i].prompt: train[i] for i in reversed(order)}
    if len(shots) <= num_shots:
        raise ValueError(
            f"Expected `num_shots` to be below the number of different training prompts, {len(shots)}, but got "
            f"{num_shots}. Lower it, or the fractions that are held out."
        )
    return list(shots.values())[: num_shots + 1]


def shots_before(example: Example, drawn: Sequence[Example]) -> list[Example]:
    """Return the shots of an example, of what `draw_shots` drew: all but one, and none with its own prompt."""
    return [shot for shot in drawn if shot.prompt != example.prompt][: max(len(drawn) - 1, 0)]


def sample_id(example: Example, shots: Sequence[Example] = (), system_prompt: str | None = None) -> int:
    """Return a number of 63 bits for an example's content: its texts, and those of what is put before it.

    It is the same in every split, order, layout and tokenizer. Of several choices the right one counts.

    Example:
        >>> sample_id(Example("1 + 1 =", "2", where="row 0")) == sample_id(Example("1 + 1 =", "2", where="row 7"))
        True
        >>> sample_id(Example("1 + 1 =", "2")) == sample_id(Example("1 + 1 =", "2"), [Example("1 + 2 =", "3")])
        False
    """
    texts = [(shot.prompt, shot.response) for shot in shots]
    conversation = [example.messages] if example.messages else []
    return int(digest(system_prompt, texts, example.prompt, example.response, *conversation)[:16], 16) >> 1


def _draw(examples: Iterable[Example], seed: int) -> str:
    """Return a group's place in the order, a hash of its content."""
    return digest(seed, min((example.prompt, example.response) for example in examples))
