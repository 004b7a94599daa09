"""Where prompts and responses come from: files, a Hugging Face data set, or questions about Python's library.

The `path` of a source names one of these:

* `"python-questions"`: see `lit_logits.datamodules.instructions.python_questions`;
* paths or globs: a line of a `.jsonl` and a row of a `.parquet` file are one pair each;
* anything else, and a local folder: what `datasets.load_dataset` makes of it, with its own validation and test splits.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import load_dataset

from lit_logits.datamodules.caching import digest, digest_file
from lit_logits.datamodules.checks import check_unicode
from lit_logits.datamodules.instructions.conversations import Messages, read_messages, texts_of
from lit_logits.datamodules.instructions.python_questions import fingerprint_python_questions, read_python_questions
from lit_logits.datamodules.instructions.splits import Example, split_examples
from lit_logits.datamodules.rows import read_rows
from lit_logits.datamodules.sources import Source, dataset_builder, dataset_name, find_files, own_splits

__all__ = ["PairSource", "PairSplits", "parse_row"]

EMBEDDED = "python-questions"
SUFFIXES = (".jsonl", ".parquet")

SHORT_RESPONSE = 5
"""A response of at most this many words (`42`, `yes`, a place) recurs by nature; a longer one is a text of its own."""


@dataclass(frozen=True)
class PairSource:
    """Where prompts and responses come from.

    Args:
        path: `"python-questions"` (about 14,000 questions on the standard library, answered by its sources), files or
            globs of `.jsonl` or `.parquet`, or a Hugging Face data set or local folder for `datasets.load_dataset`.
        subset: configuration of a Hugging Face data set, such as `"main"`.
        prompt_column: name of the prompts.
        response_column: name of the responses; None reads prompts only, which are all in the test split.
        choices_column: name of the lists of choices; `response_column` is unused then.
        answer_column: name of the right choices, or of their numbers from 0.
        teacher_column: name of the column that tells for each pair which of several models it is to be learned from;
            batches then have `teachers`.
        messages_column: name of conversations, lists of `{"role": ..., "content": ...}`, for chat templates; the
            assistant's turns are learned. The columns of prompts and responses are unused then.

    Raises:
        ValueError: If only one of the columns of choices and of answers is named, the source has none, or there are
            conversations beside choices.
    """

    path: Source
    subset: str | None = None
    prompt_column: str = "prompt"
    response_column: str | None = "response"
    choices_column: str | None = None
    answer_column: str | None = None
    teacher_column: str | None = None
    messages_column: str | None = None

    def __post_init__(self) -> None:
        if (self.choices_column is None) != (self.answer_column is None):
            raise ValueError(
                "Expected `choices_column` and `answer_column` to be set both or neither, but got "
                f"{self.choices_column!r} and {self.answer_column!r}."
            )
        if self.choices_column is not None and self.messages_column is not None:
            raise ValueError(
                f"Expected `choices_column` to be None beside a `messages_column`, but got {self.choices_column!r}."
            )
        for name in ("choices_column", "teacher_column", "messages_column"):
            if (value := getattr(self, name)) is not None and self.path == EMBEDDED:
                raise ValueError(f"Expected `{name}` to be None for the source {EMBEDDED!r}, but got {value!r}.")

    @property
    def prompts_only(self) -> bool:
        """Whether there is nothing that should follow a prompt."""
        return self.response_column is None and self.choices_column is None and self.messages_column is None


class PairSplits:
    """The prompt–response pairs of a source, split. Nothing is read before it is asked for.

    A data set's own validation and test splits are used where they exist. The others are carved from its training
    split, and equal prompts, or equal responses of more than five words, stay together. A source of prompts only is one
    test split: the data set's own, if it has one, else all there is.

    Args:
        source: where the pairs come from.
        fractions: share of the pairs for `"val"` and `"test"`, in [0, 1).
        max_train_rows: keep the first of the training split only.
        max_test_rows: the same of the test split.
        seed: of the split.
    """

    def __init__(
        self,
        source: PairSource,
        *,
        fractions: dict[str, float],
        max_train_rows: int | None = None,
        max_test_rows: int | None = None,
        seed: int = 42,
    ) -> None:
        self.source, self.path, self.subset = source, source.path, source.subset
        self.fractions, self.max_train_rows, self.max_test_rows = fractions, max_train_rows, max_test_rows
        self.seed = seed
        self._splits: dict[str, list[Example]] | None = None

    @cached_property
    def key(self) -> str:
        """Digest of all that decides which pairs are in which split."""
        shares = sorted(self.fractions.items())
        given = self.source
        columns = [given.prompt_column, given.response_column, given.choices_column, given.answer_column]
        columns += [given.teacher_column] if given.teacher_column is not None else []
        columns += [f"messages {given.messages_column}"] if given.messages_column is not None else []
        # What came later is left out where it is not used, so that entries of the cache keep their names.
        later = [] if self.max_train_rows is None else [self.max_train_rows]
        return digest(self._fingerprint(), tuple(columns), shares, self.max_test_rows, self.seed, *later)

    @property
    def splits(self) -> dict[str, list[Example]]:
        """The pairs of each split that is not switched off, in the source's order."""
        if self._splits is None:
            own = {name: list(examples) for name, examples in self._read().items()}
            missing = {name: share for name, share in self.fractions.items() if name not in own}
            if "train" in own:
                own |= split_examples(own["train"], missing, self.seed)
            for name, limit in (("train", self.max_train_rows), ("test", self.max_test_rows)):
                if name in own:
                    own[name] = own[name][:limit]
            self._splits = {name: examples for name, examples in own.items() if examples}
            if not self._splits:
                raise ValueError(f"Expected `source` to hold prompts, but {self.path!r} has no rows.")
        return self._splits

    def forget(self) -> None:
        """Give the memory of the pairs back; they are read again if need be."""
        self._splits = None

    def _fingerprint(self) -> str:
        if self.path == EMBEDDED:
            return fingerprint_python_questions()
        files = find_files(self.path, SUFFIXES)
        if files is None:
            builder = dataset_builder(self.path, self.subset, embedded=EMBEDDED)
            return digest("dataset", self.path, self.subset, builder.hash)
        return digest("files", [(Path(path).suffix, digest_file(path)) for path in files])

    def _read(self) -> dict[str, Iterable[Example]]:
        """Return the pairs under `"train"` and the names of the source's own splits; prompts only under `"test"`."""
        prompts_only = self.source.prompts_only
        if self.path == EMBEDDED:
            questions = read_python_questions()
            return {"test": [q._replace(response="") for q in questions]} if prompts_only else {"train": questions}
        files = find_files(self.path, SUFFIXES)
        if files is not None:
            rows = (parse_row(row, where, self.source) for row, where in read_rows(files))
            return {"test" if prompts_only else "train": rows}
        dataset_builder(self.path, self.subset, embedded=EMBEDDED)  # its errors are the helpful ones
        loaded = load_dataset(dataset_name(self.path), self.subset)
        if prompts_only:
            names = ["test"] if "test" in loaded else list(loaded)
            return {"test": [example for name in names for example in self._parse(loaded[name], name)]}
        names_of = own_splits(self.path, list(loaded), may_be_test=True)
        return {split: self._parse(loaded[own], own) for split, own in names_of.items()}

    def _parse(self, rows: Iterable[dict[str, Any]], split: str) -> Iterator[Example]:
        for number, row in enumerate(rows):
            yield parse_row(row, f"row {number} of {split!r} of {self.path!r}", self.source)


def parse_row(row: dict[str, Any], where: str, source: PairSource) -> Example:
    """Make a pair of a row.

    Args:
        row: column → value.
        where: place of the row, for messages.
        source: names the columns.

    Raises:
        ValueError: If a column is missing or holds something else than it should, or a text has half a surrogate pair;
            it names the row.

    Example:
        >>> source = PairSource("x.jsonl", prompt_column="ask", choices_column="choices", answer_column="right")
        >>> parse_row({"ask": "1 + 1 =", "choices": ["1", "2"], "right": 1}, "row 0", source).response
        '2'
    """
    column, choices, correct = source.response_column, tuple[str, ...](), 0
    messages: Messages = ()
    if source.messages_column is not None:
        messages = read_messages(_value(row, "messages_column", source.messages_column, where), where)
        prompt, response = texts_of(messages)
    else:
        prompt = _text(row, "prompt_column", source.prompt_column, where)
        if source.choices_column is not None and source.answer_column is not None:
            choices, correct = _choices(row, source.choices_column, source.answer_column, where)
        response = _text(row, "response_column", column, where) if column is not None and not choices else ""
        response = choices[correct] if choices else response
    for text in (prompt, response, *choices, *(content for _, content in messages)):
        check_unicode(text, where)
    keys: tuple[str, ...] = (f"prompt {prompt}",)
    if len(response.split()) > SHORT_RESPONSE:
        keys = (*keys, f"response {response}")
    teacher = "" if source.teacher_column is None else _text(row, "teacher_column", source.teacher_column, where)
    return Example(prompt, response, keys, choices, correct, where, teacher, messages)


def _value(row: dict[str, Any], argument: str, column: str, where: str) -> Any:
    if column not in row:
        raise ValueError(f"Expected `{argument}` to be one of {sorted(row)}, but got {column!r}, in {where}.")
    return row[column]


def _text(row: dict[str, Any], argument: str, column: str, where: str) -> str:
    text = _value(row, argument, column, where)
    if not isinstance(text, str):
        raise ValueError(
            f"Expected the column {column!r} to hold strings, but got {type(text).__name__} in {where}. Convert it, or "
            f"set `{argument}` to another column."
        )
    if not text.strip():
        kind = argument.partition("_")[0]
        raise ValueError(
            f"Expected the column {column!r} to hold text, but got an empty {kind} in {where}. Fill it in or drop the "
            "row."
        )
    return text


def _choices(row: dict[str, Any], column: str, answer_column: str, where: str) -> tuple[tuple[str, ...], int]:
    """Return the choices and the number of the right one."""
    choices = _value(row, "choices_column", column, where)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(
            f"Expected the column {column!r} to hold lists of at least 2 texts, but got {choices!r} in {where}."
        )
    answer = _value(row, "answer_column", answer_column, where)
    number = choices.index(answer) if answer in choices else answer
    if isinstance(number, str) and number.isdecimal():  # HellaSwag's "3"
        number = int(number)
    if type(number) is not int or not 0 <= number < len(choices):
        raise ValueError(
            f"Expected the column {answer_column!r} to hold a choice or its number, in [0, {len(choices)}), but got "
            f"{answer!r} in {where}."
        )
    return tuple(choices), number
