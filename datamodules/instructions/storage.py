"""Encoded pairs on disk.

An Arrow row is an example: its number in the split and that of its content, the prompt's token ids, a list of ids for
each response (one, or of a multiple-choice test question one a choice), for each of these ids how many characters of
the response have been read after it, how many bytes, and the number of the right response; of a conversation also which
of these ids are to be learned. Where there are other
tokenizers, all but the numbers is there once more for each of them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as compute
import torch
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from datasets.arrow_writer import ArrowWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from tqdm import tqdm

from lit_logits.datamodules.caching import hide_progress
from lit_logits.datamodules.instructions.encoding import Encoded
from lit_logits.datamodules.instructions.splits import Example
from lit_logits.datamodules.instructions.views import EncodedExample, InstructionEncoder, source_argument
from lit_logits.datamodules.prepared import write_sizes
from lit_logits.datamodules.tokenization import text_batches

__all__ = [
    "InstructionSize",
    "sequence_lengths",
    "write_examples",
    "write_instructions",
]

Encode = Callable[[Sequence[Example]], list[EncodedExample]]


class InstructionSize(NamedTuple):
    """The size of a split.

    Attributes:
        examples: number of examples.
        response_tokens: number of tokens of their (right) responses, in the data module's own tokenizer.
        truncated: examples of which a response was cut at its end, in any tokenizer.
        dropped: examples that were left out, because the prompt left no room for a response, in any tokenizer.
    """

    examples: int = 0
    response_tokens: int = 0
    truncated: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        text = f"{self.examples:,} examples, {self.response_tokens:,} response tokens"
        cut = {"truncated": self.truncated, "dropped": self.dropped}
        notes = ", ".join(f"{count:,} {name}" for name, count in cut.items() if count)
        return f"{text} ({notes}, see `max_length`)" if notes else text


def write_examples(
    file: Path,
    examples: Sequence[Example],
    encode: Encode,
    max_length: int,
    *,
    sources: Sequence[str] = (),
) -> InstructionSize:
    """Encode a split into an Arrow file, a batch at a time.

    An example whose prompt leaves no room for a token of the response, in any of the tokenizers, is left out.

    Args:
        file: the Arrow file to write.
        examples: the split.
        encode: makes token ids of a batch of examples.
        max_length: tokens that a sequence may have; a response is cut at its end, in each tokenizer at its own.
        sources: names of the other tokenizers.

    Raises:
        ValueError: If all examples are left out; it names the first. If a choice would be cut.
    """
    first = examples[0] if examples else Example("", "")
    features = _features(sources, has_teachers=bool(first.teacher), has_turns=bool(first.messages))
    bar = tqdm(total=len(examples), desc=f"Encoding {file.stem}", unit="row", disable=hide_progress(), leave=False)
    kept = tokens = truncated = 0
    first_problem = ""
    # Without the names that this version of datasets gives to its types, which an older one cannot read.
    with ArrowWriter(features=features, path=str(file), with_metadata=False) as writer, bar:
        for batch in text_batches(enumerate(examples), lambda numbered: _num_characters(numbered[1])):
            columns: dict[str, list[Any]] = {name: [] for name in features}
            for (row, example), encoded in zip(batch, encode([example for _, example in batch]), strict=True):
                if problem := _too_long(encoded, max_length):
                    first_problem = first_problem or f"the prompt of row {row} ({example.where}) to have {problem}"
                    continue
                own, *others = cut = [_cut(view, max_length) for view in (encoded.own, *encoded.sources.values())]
                if len(own.responses) > 1 and own != encoded.own:
                    longest = len(encoded.own.prompt) + max(map(len, encoded.own.responses))
                    raise ValueError(
                        f"Expected all choices of row {row} ({example.where}) to fit into {max_length} tokens, because"
                        f" choices that are cut cannot be compared, but got {longest}. Raise `max_length` or drop the"
                        " row."
                    )
                correct = example.correct if len(own.responses) > 1 else 0
                values: dict[str, Any] = {"row": row, "sample_id": encoded.sample_id, "correct": correct}
                values |= own._asdict() | {"teacher": example.teacher}
                columns_of = features["sources"] if sources else {}
                values["sources"] = {
                    name: {key: value for key, value in view._asdict().items() if key in columns_of[name]}
                    for name, view in zip(encoded.sources, others, strict=True)
                }
                for name, column in columns.items():
                    column.append(values[name])
                kept += 1
                tokens += sum(own.counted[correct]) if own.counted else len(own.responses[correct])
                truncated += cut != [encoded.own, *encoded.sources.values()]
            writer.write_batch(columns)
            bar.update(len(batch))
        if examples and not kept:
            raise ValueError(f"Expected {first_problem} So it is with all {len(examples)} of the split {file.stem!r}.")
        writer.finalize()
    return InstructionSize(kept, tokens, truncated, len(examples) - kept)


def sequence_lengths(examples: Dataset) -> Tensor:
    """Return how many tokens the prompt and the response of each example have, of a split without choices."""
    table = examples.with_format("arrow").select_columns(["prompt", "responses"])[:]
    prompts = compute.list_value_length(table["prompt"])
    responses = compute.list_value_length(compute.list_flatten(table["responses"]))
    return torch.from_numpy(compute.add(prompts, responses).to_numpy()).long()


def _features(sources: Sequence[str], *, has_teachers: bool, has_turns: bool) -> Features:
    """Return the columns of a split."""
    ids = ListOf(Value("int32"))
    view = {"prompt": ids, **{name: ListOf(ids) for name in ("responses", "ends", "byte_ends")}}
    view |= {"counted": ListOf(ListOf(Value("bool")))} if has_turns else {}
    columns = {"row": Value("int32"), "sample_id": Value("int64"), **view, "correct": Value("int32")}
    columns |= {"teacher": Value("string")} if has_teachers else {}
    return Features({**columns, "sources": {name: dict(view) for name in sources}} if sources else columns)


def _num_characters(example: Example) -> int:
    return len(example.prompt) + sum(map(len, example.choices or (example.response,)))


def _too_long(encoded: EncodedExample, max_length: int) -> str:
    """Return how long a prompt may be where one leaves no room for a response, and "" where all leave some."""
    for name, view in [(None, encoded.own), *encoded.sources.items()]:
        needed = 1 if any(view.responses) else 0  # of a source of prompts only they are empty
        if len(view.prompt) > max_length - needed:
            whose = "" if name is None else f" of {source_argument(name)}"
            return (
                f"at most {max_length - needed} tokens{whose}, but got {len(view.prompt)}. Raise `max_length` or "
                "shorten it."
            )
    return ""


def _cut(encoded: Encoded, max_length: int) -> Encoded:
    """Cut responses at their end to what the prompt leaves room for."""
    room = max_length - len(encoded.prompt)
    return Encoded(
        encoded.prompt,
        [row[:room] for row in encoded.responses],
        [row[:room] for row in encoded.ends],
        [row[:room] for row in encoded.byte_ends],
        [row[:room] for row in encoded.counted],
    )


def write_instructions(
    directory: Path, splits: dict[str, list[Example]], encoder: InstructionEncoder, max_length: int
) -> dict[str, InstructionSize]:
    """Write the encoded examples of each split, of test with all choices, and, last, `sizes.json`.

    Args:
        directory: existing folder to write into.
        splits: the examples of each split.
        encoder: makes token ids.
        max_length: tokens that a sequence may have.

    Raises:
        ValueError: If no prompt of a split leaves room for a response.
    """
    sizes = {}
    for name, examples in splits.items():
        encode = partial(encoder, all_choices=name == "test")
        sizes[name] = write_examples(
            directory / f"{name}.arrow",
            examples,
            encode,
            max_length,
            sources=encoder.names,
        )
        if name != "train" and sizes[name].dropped:
            rank_zero_warn(
                f"Of the {len(examples)} examples of the split {name!r}, {sizes[name].dropped} are left out, because"
                " their prompts leave no room for a response. Raise `max_length` to keep them."
            )
    write_sizes(directory, sizes)
    return sizes
