"""Encoded pairs on disk, and batches of them.

An Arrow row is an example: its number in the split, the prompt's token ids, a list of ids for each response (one, or of
a multiple-choice test question one a choice), and the number of the right one.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from datasets.arrow_writer import ArrowWriter
from torch import Tensor
from tqdm import tqdm

from lit_logits.datamodules.caching import hide_progress
from lit_logits.datamodules.instruction_encoding import Encoded, Encoder
from lit_logits.datamodules.instruction_splits import Example

__all__ = [
    "InstructionSize",
    "collate_examples",
    "read_examples",
    "read_instruction_sizes",
    "write_examples",
    "write_instructions",
]

EXAMPLES_A_BATCH = 256
IGNORED = -100

Encode = Callable[[Sequence[Example]], list[Encoded]]


class InstructionSize(NamedTuple):
    """What a split holds.

    Attributes:
        examples: number of examples.
        response_tokens: number of tokens of their (right) responses.
        truncated: examples of which a response was cut at its end.
        dropped: training examples that were left out, because the prompt left no room for a response.
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
    file: Path, examples: Sequence[Example], encode: Encode, max_length: int, *, drop: bool
) -> InstructionSize:
    """Encode a split into an Arrow file, a batch at a time.

    Args:
        file: the Arrow file to write.
        examples: the split.
        encode: makes token ids of a batch of examples.
        max_length: tokens that a sequence may have; a response is cut at its end.
        drop: leave an example out whose prompt leaves no room for a token of the response.

    Raises:
        ValueError: If there is such an example and `drop` is False; it names the row.
    """
    ids = ListOf(Value("int32"))
    features = Features({"row": Value("int32"), "prompt": ids, "responses": ListOf(ids), "correct": Value("int32")})
    bar = tqdm(total=len(examples), desc=f"Encoding {file.stem}", unit="row", disable=hide_progress(), leave=False)
    kept = tokens = truncated = 0
    numbered = iter(enumerate(examples))
    with ArrowWriter(features=features, path=str(file)) as writer, bar:
        while batch := list(islice(numbered, EXAMPLES_A_BATCH)):
            columns: dict[str, list[Any]] = {name: [] for name in features}
            for (row, example), encoded in zip(batch, encode([example for _, example in batch]), strict=True):
                room = max_length - len(encoded.prompt)
                needed = 1 if any(encoded.responses) else 0  # of a source of prompts only they are empty
                if room < needed and drop:
                    continue
                if room < needed:
                    raise ValueError(
                        f"Expected the prompt of row {row} ({example.where}) to have at most {max_length - needed} "
                        f"tokens, but got {len(encoded.prompt)}. Raise `max_length` or shorten it."
                    )
                responses = [response[:room] for response in encoded.responses]
                correct = example.correct if len(responses) > 1 else 0
                for name, value in zip(features, (row, encoded.prompt, responses, correct), strict=True):
                    columns[name].append(value)
                kept += 1
                tokens += len(responses[correct])
                truncated += responses != encoded.responses
            writer.write_batch(columns)
            bar.update(len(batch))
        writer.finalize()
    return InstructionSize(kept, tokens, truncated, len(examples) - kept)


def write_instructions(
    directory: Path, splits: dict[str, list[Example]], encoder: Encoder, max_length: int
) -> dict[str, InstructionSize]:
    """Write the encoded examples of each split, of test with all choices, and, last, `sizes.json`.

    Args:
        directory: existing folder to write into.
        splits: the examples of each split.
        encoder: makes token ids.
        max_length: tokens that a sequence may have.

    Raises:
        ValueError: If a prompt for evaluation leaves no room for a response.
    """
    sizes = {}
    for name, examples in splits.items():
        encode = partial(encoder, all_choices=name == "test")
        sizes[name] = write_examples(directory / f"{name}.arrow", examples, encode, max_length, drop=name == "train")
    (directory / "sizes.json").write_text(json.dumps({name: size._asdict() for name, size in sizes.items()}, indent=1))
    return sizes


def read_examples(file: Path) -> Dataset:
    """Memory-map encoded examples."""
    return Dataset.from_file(str(file))


def read_instruction_sizes(directory: Path) -> dict[str, InstructionSize]:
    """Read `sizes.json`."""
    sizes = json.loads((directory / "sizes.json").read_text())
    return {name: InstructionSize(**size) for name, size in sizes.items()}


def collate_examples(rows: list[dict[str, Any]], pad_token_id: int, *, all_choices: bool = False) -> dict[str, Tensor]:
    """Pad examples on the right to a batch of sequences, prompt and response each.

    Args:
        rows: B examples `{"row", "prompt", "responses", "correct"}`.
        pad_token_id: fills up the ids.
        all_choices: one sequence for each choice instead of one with the right response.

    Returns:
        `input_ids`, `attention_mask` and `labels` (the ids, unshifted; −100 on prompts and padding), LongTensors of
        shape (N, T), where N is B or the number of all choices, and `rows` (N,); with `all_choices` also `choices`
        (N,), numbers of the choices, and `correct` (N,), 1 for the right ones.

    Example:
        >>> batch = collate_examples([{"row": 7, "prompt": [5, 6], "responses": [[8, 1]], "correct": 0}], 0)
        >>> batch["labels"].tolist(), batch["rows"].tolist()
        ([[-100, -100, 8, 1]], [7])
    """
    pairs = [
        (row, choice) for row in rows for choice in (range(len(row["responses"])) if all_choices else [row["correct"]])
    ]
    sequences = [(row["prompt"], row["responses"][choice]) for row, choice in pairs]
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    batch = {
        "input_ids": torch.full((len(sequences), length), pad_token_id),
        "attention_mask": torch.zeros(len(sequences), length, dtype=torch.long),
        "labels": torch.full((len(sequences), length), IGNORED),
        "rows": torch.tensor([row["row"] for row, _ in pairs]),
    }
    for i, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        batch["input_ids"][i, :end] = torch.tensor([*prompt, *response])
        batch["attention_mask"][i, :end] = 1
        batch["labels"][i, len(prompt) : end] = batch["input_ids"][i, len(prompt) : end]
    if all_choices:
        batch["choices"] = torch.tensor([choice for _, choice in pairs])
        batch["correct"] = torch.tensor([int(choice == row["correct"]) for row, choice in pairs])
    return batch
