"""Encoded texts on disk, and the items and batches that are made of them.

An Arrow row is a text, or a pair of texts: its token ids, its token types where the tokenizer tells them, its class.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as compute
import torch
from datasets import Dataset as ArrowDataset
from datasets import Features, Value
from datasets import Sequence as ListOf
from datasets.arrow_writer import ArrowWriter
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from lit_logits.datamodules.caching import hide_progress
from lit_logits.datamodules.filling import IGNORE_INDEX
from lit_logits.datamodules.prepared import write_sizes
from lit_logits.datamodules.sequences.splits import LabelledTexts

__all__ = ["LabelledSequences", "SequenceSize", "labels_of", "sequence_collator", "write_sequences"]

ROWS_A_BATCH = 1000


class SequenceSize(NamedTuple):
    """Size of a split.

    Attributes:
        rows: number of texts, or pairs of texts.
        unlabelled: rows without a class.
        tokens: number of tokens, with special ones.
        truncated: rows that were cut to `max_length`.
    """

    rows: int
    unlabelled: int
    tokens: int
    truncated: int


class LabelledSequences(Dataset):
    """Some rows of a split, with classes that may be others than those on disk.

    Args:
        dataset: the split.
        rows: numbers of the rows to keep.
        labels: (len(rows),) their classes.
    """

    def __init__(self, dataset: ArrowDataset, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        self.dataset, self.labels = dataset.select(rows), labels

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each row."""
        table = self.dataset.with_format("arrow").select_columns(["input_ids"])[:]
        return torch.tensor(compute.list_value_length(table["input_ids"]).to_numpy(), dtype=torch.long)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the token ids, token types if there are any, and the class as `label`."""
        return {**self.dataset[index], "label": int(self.labels[index])}


def labels_of(dataset: ArrowDataset) -> NDArray[np.int64]:
    """Return the classes on disk, (N,)."""
    return dataset.with_format("numpy")["label"][:]


def sequence_collator(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return what pads rows to a batch: a dict of `input_ids`, `attention_mask`, token types if any, and `labels`."""
    return partial(_collate, DataCollatorWithPadding(tokenizer))


def _collate(pad: DataCollatorWithPadding, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return dict(pad(rows))


def write_sequences(
    directory: Path, splits: Mapping[str, LabelledTexts], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> None:
    """Write the encoded rows of each split and, last, `sizes.json`.

    Args:
        directory: existing folder to write into.
        splits: the rows of each split.
        tokenizer: adds its special tokens, as it does everywhere.
        max_length: tokens that a row may have; a longer one is cut as the tokenizer does, of a pair the longer text.
    """
    sizes = {
        name: _write_split(directory / f"{name}.arrow", split, tokenizer, max_length) for name, split in splits.items()
    }
    write_sizes(directory, sizes)


def _write_split(file: Path, split: LabelledTexts, tokenizer: PreTrainedTokenizerFast, max_length: int) -> SequenceSize:
    columns = [name for name in ("input_ids", "token_type_ids") if name in tokenizer.model_input_names]
    types: dict[str, Any] = {name: ListOf(Value("int32")) for name in columns}
    features = Features(types | {"label": Value("int64")})
    tokens = truncated = 0
    bar = tqdm(total=len(split.texts), desc=f"Encoding {file.stem}", unit="row", disable=hide_progress(), leave=False)
    # Without the names that this version of datasets gives to its types, which an older one cannot read.
    with ArrowWriter(features=features, path=str(file), with_metadata=False) as writer, bar:
        for start in range(0, len(split.texts), ROWS_A_BATCH):
            part = slice(start, start + ROWS_A_BATCH)
            texts, labels = split.texts[part], split.labels[part]
            whole = [len(ids) for ids in _encode(tokenizer, texts)["input_ids"]]
            encoded = _encode(tokenizer, texts, truncation=True, max_length=max_length)
            tokens += sum(map(len, encoded["input_ids"]))
            truncated += sum(length > max_length for length in whole)
            rows: dict[str, Any] = {name: encoded[name] for name in columns}
            writer.write_batch(rows | {"label": labels.tolist()})
            bar.update(len(texts))
        writer.finalize()
    tokenizer.backend_tokenizer.no_truncation()  # which `truncation=True` has switched on
    return SequenceSize(len(split.texts), int((split.labels == IGNORE_INDEX).sum()), tokens, truncated)


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, ...]], **options: Any) -> Any:
    """Encode texts, or pairs; the tokenizer's warning that one is long is left out, as they are counted."""
    pairs = [text[1] for text in texts] if len(texts[0]) == 2 else None
    return tokenizer([text[0] for text in texts], pairs, verbose=False, **options)
