"""Batches of encoded examples, and data sets that are batches already.

Letters: B examples, N sequences (B, or all choices of B questions), T the longest of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset as ArrowDataset
from datasets import concatenate_datasets
from torch import Tensor
from torch.utils.data import Dataset

from lit_logits.datamodules.filling import IGNORE_INDEX
from lit_logits.datamodules.instructions.encoding import BEYOND

__all__ = ["FixedBatches", "Vocabulary", "collate_examples", "collate_fixed_batch"]


class Vocabulary(NamedTuple):
    """The numbers of a tokenizer that batches hold.

    Attributes:
        pad_token_id: fills up the ids.
        tokenizer_id: see `lit_logits.datamodules.tokenization.tokenizer_id`.
        layout_id: digest of all that makes an example's ids of its texts.
    """

    pad_token_id: int
    tokenizer_id: int
    layout_id: int = 0


def collate_examples(
    rows: list[dict[str, Any]],
    vocabulary: Vocabulary,
    sources: Mapping[str, Vocabulary] | None = None,
    *,
    all_choices: bool = False,
) -> dict[str, Any]:
    """Pad examples on the right to a batch of sequences, prompt and response each.

    Args:
        rows: B examples `{"row", "sample_id", "prompt", "responses", "ends", "byte_ends", "correct"}` and, with
            `sources`, `"sources"`, for each of their names `{"prompt", "responses", "ends", "byte_ends"}`. Of
            conversations, `"counted"` says which ids of a response are labels.
        vocabulary: of the ids.
        sources: name → vocabulary of the other tokenizers.
        all_choices: one sequence for each choice instead of one with the right response; without `sources`.

    Returns:
        `input_ids`, `attention_mask`, `labels` (the ids, unshifted; −100 on prompts and padding), `response_ends` and
        `response_bytes` (characters and bytes of the response that have been read; −1 before the prompt's last token
        and after the response), LongTensors of shape (N, T); `tokenizer_id` and `layout_id`, scalars; `rows` and
        `sample_ids` (N,); with `sources` a dict `sources`, name → the first seven of these in that tokenizer; with
        `all_choices` `choices` (N,), numbers of the choices, and `correct` (N,), 1 for the right ones; with `teacher`
        in the rows `teachers`, N names.

    Example:
        >>> row = {"row": 7, "sample_id": 99, "prompt": [5, 6], "responses": [[8, 1]], "ends": [[2, -1]]}
        >>> row |= {"byte_ends": [[3, -1]], "correct": 0}
        >>> batch = collate_examples([row], Vocabulary(pad_token_id=0, tokenizer_id=3))
        >>> batch["labels"].tolist(), batch["response_ends"].tolist(), batch["rows"].tolist()
        ([[-100, -100, 8, 1]], [[-1, 0, 2, -1]], [7])
    """
    pairs = [
        (row, choice) for row in rows for choice in (range(len(row["responses"])) if all_choices else [row["correct"]])
    ]
    batch: dict[str, Any] = _pad(pairs, vocabulary)
    batch["rows"] = torch.tensor([row["row"] for row, _ in pairs])
    batch["sample_ids"] = torch.tensor([row["sample_id"] for row, _ in pairs])
    if rows and "teacher" in rows[0]:
        batch["teachers"] = [row["teacher"] for row, _ in pairs]
    if all_choices:
        batch["choices"] = torch.tensor([choice for _, choice in pairs])
        batch["correct"] = torch.tensor([int(choice == row["correct"]) for row, choice in pairs])
    elif sources:
        batch["sources"] = {
            name: _pad([(row["sources"][name], choice) for row, choice in pairs], other)
            for name, other in sources.items()
        }
    return batch


def _pad(pairs: Sequence[tuple[dict[str, Any], int]], vocabulary: Vocabulary) -> dict[str, Tensor]:
    """Make the tensors of one tokenizer, a sequence for each pair of an example and the number of its response."""
    columns = ("responses", "ends", "byte_ends")
    sequences = [(row["prompt"], *(row[name][choice] for name in columns)) for row, choice in pairs]
    counted = [row["counted"][choice] if "counted" in row else True for row, choice in pairs]
    shape = len(sequences), max(len(prompt) + len(response) for prompt, response, *_ in sequences)
    batch = {
        "input_ids": torch.full(shape, vocabulary.pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORE_INDEX),
        "response_ends": torch.full(shape, BEYOND),
        "response_bytes": torch.full(shape, BEYOND),
        "tokenizer_id": torch.tensor(vocabulary.tokenizer_id),
        "layout_id": torch.tensor(vocabulary.layout_id),
    }
    for i, (prompt, response, *read) in enumerate(sequences):
        start, end = len(prompt), len(prompt) + len(response)
        batch["input_ids"][i, :end] = torch.tensor([*prompt, *response])
        batch["attention_mask"][i, :end] = 1
        is_label = torch.tensor(counted[i])
        batch["labels"][i, start:end] = batch["input_ids"][i, start:end].masked_fill(~is_label, IGNORE_INDEX)
        for name, ends in zip(("response_ends", "response_bytes"), read, strict=True):
            batch[name][i, start:end] = torch.tensor(ends)
            if start:
                batch[name][i, start - 1] = 0
    return batch


class FixedBatches(Dataset):
    """The examples of several splits, one after another, in batches that never change: an item is a batch's rows.

    The last batch may be a short one. `row` becomes the example's number in the whole.

    Args:
        splits: encoded examples.
        batch_size: B, examples of a batch.
        finished: sample ids; a batch all of whose samples are among them is left out.
        at_least: number of items to have, if there are any: finished batches fill up.
    """

    def __init__(
        self, splits: Sequence[ArrowDataset], batch_size: int, finished: set[int] | None = None, at_least: int = 1
    ) -> None:
        self.examples, self.batch_size = concatenate_datasets(list(splits)), batch_size
        starts = range(0, len(self.examples), batch_size)
        self.starts = list(starts)
        if finished:
            done = [number in finished for number in self.examples.with_format("numpy")["sample_id"][:].tolist()]
            self.starts = [start for start in starts if not all(done[start : start + batch_size])]
        if self.starts:
            left_out = sorted(set(starts) - set(self.starts))
            self.starts += left_out[: max(0, at_least - len(self.starts))]

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.starts)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        """Return the rows of a batch."""
        start = self.starts[index]
        numbers = range(start, min(start + self.batch_size, len(self.examples)))
        return [{**self.examples[number], "row": number} for number in numbers]


def collate_fixed_batch(
    items: list[list[dict[str, Any]]], vocabulary: Vocabulary, sources: Mapping[str, Vocabulary] | None = None
) -> dict[str, Any]:
    """Make a batch of the one item of `FixedBatches` that a loader of batch size 1 gives."""
    [rows] = items
    return collate_examples(rows, vocabulary, sources)
