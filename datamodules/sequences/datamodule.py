"""Texts with classes, or pairs of texts, for classifiers of transformers.

Letters: B is `batch_size`, T the longest sequence of a batch, C the number of classes. A batch is transformers' dict
`input_ids` and `attention_mask` (B, T), `token_type_ids` (B, T) where the tokenizer tells them, and `labels` (B,), all
int64. A row without a class has the label −100.
"""

from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules.caching import build_once, default_cache_dir, digest
from lit_logits.datamodules.checks import as_part, check_at_least
from lit_logits.datamodules.filling import IGNORE_INDEX
from lit_logits.datamodules.loaders import block_loader
from lit_logits.datamodules.prepared import open_splits
from lit_logits.datamodules.resuming import ResumePoint, Resumes
from lit_logits.datamodules.sampling import Ints, add_label_noise, pick_balanced
from lit_logits.datamodules.sequences.sources import SequenceSource
from lit_logits.datamodules.sequences.splits import SequenceSplits
from lit_logits.datamodules.sequences.storage import (
    LabelledSequences,
    SequenceSize,
    labels_of,
    sequence_collator,
    write_sequences,
)
from lit_logits.datamodules.splitting import check_fractions
from lit_logits.datamodules.tokenization import load_or_train_tokenizer, train_bpe

__all__ = ["SequenceDataModule"]

FORMAT_VERSION = 1
"""Part of every cache entry's name: raise it when the same arguments are to give other token ids or splits."""


class SequenceDataModule(Resumes, LightningDataModule):
    """Texts and their classes, encoded once and cached on disk.

    Splits: the source's own validation and test splits where they exist and have labels. A missing one is held out of
    the training rows, class by class, if its fraction is above 0; equal texts stay together, and the only row of a
    class stays in training. If it is 0, the other one stands in. Where there is neither, both are switched off.

    Rows that are not as they should be: those whose texts are all empty are left out, with a warning. Those without a
    class have the label −100 in every split: a teacher teaches them, nothing judges them. A validation or test split in
    which no row has a class counts as absent. A class in validation or test that training does not have is an error,
    unless the column's ClassLabel or `class_names` tells it.

    A row is encoded as the tokenizer does by itself, with its special tokens, so that `transformers.pipeline` reads
    texts as the model learned them. What is longer than `max_length` is cut, of a pair the longer text; `prepare_data`
    says how many rows were. Training resumes in the middle of an epoch with the next unseen batch.

    Args:
        source: where the texts come from: a `SequenceSource` (in a recipe, a mapping `{path: ..., label_column: ...}`),
            or its `path` alone, such as `"python-paragraphs"`, `"my.csv"` or the name of a data set.
        tokenizer: hub id, local folder or `.gguf` file; None trains a byte-level BPE on the training split. A student
            and its teacher read the same batches: give the teacher's.
        bpe_vocab_size: tokens of that BPE, at least 259.
        max_length: tokens that a row may have, at least 4 and no more than the tokenizer says that its model reads.
        batch_size: B, rows a batch on each rank.
        eval_batch_size: the same for validation, test and predict; None is `batch_size`.
        val_fraction: share of the training rows that is held out for validation, in [0, 1). Unused where the source has
            a validation split of its own.
        test_fraction: the same for test and predict.
        max_train_rows: train on this many rows only, equally many of each class; those without a class count as one
            more.
        label_noise: share of the training labels that are replaced by another class, in [0, 1).
        group_by_length: make training batches of rows of like lengths, which need less padding; see
            `lit_logits.datamodules.loaders.LengthSampler`.
        num_workers: processes that load batches.
        seed: of splits, subset, label noise and training order.
        cache_dir: folder of the cache; None is `$XDG_CACHE_HOME/lit_logits` or `~/.cache/lit_logits`.

    Raises:
        ValueError: If an argument is out of range; from `class_names`, `vocab_size`, `tokenizer` or `prepare_data`, if
            the source cannot be read, a row is not as it should be, or the tokenizer cannot pad.
    """

    def __init__(
        self,
        # With `Path`, jsonargparse does not read a file of that name as part of a recipe. It is last for the dumps.
        source: str | list[str] | SequenceSource | Path = "python-paragraphs",
        tokenizer: str | None = None,
        bpe_vocab_size: int = 4096,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        max_train_rows: int | None = None,
        label_noise: float = 0.0,
        group_by_length: bool = False,
        num_workers: int = 0,
        seed: int = 42,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer_name, self.bpe_vocab_size, self.max_length = tokenizer, bpe_vocab_size, max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size if eval_batch_size is not None else batch_size
        self.max_train_rows, self.label_noise = max_train_rows, label_noise
        self.group_by_length, self.num_workers, self.seed = group_by_length, num_workers, seed
        check_at_least(259, bpe_vocab_size=bpe_vocab_size)
        check_at_least(4, max_length=max_length)
        check_at_least(1, batch_size=batch_size, eval_batch_size=self.eval_batch_size)
        check_at_least(1, max_train_rows=1 if max_train_rows is None else max_train_rows)
        check_at_least(0, num_workers=num_workers)
        fractions = {"val": val_fraction, "test": test_fraction}
        check_fractions(fractions)
        if not 0 <= label_noise < 1:
            raise ValueError(f"Expected `label_noise` to be in [0, 1), but got {label_noise}.")
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        texts = as_part("source", source, SequenceSource)
        self.texts = SequenceSplits(texts, fractions=fractions, seed=seed, cache_dir=self.cache_dir)
        self._sequences: dict[str, LabelledSequences] = {}
        self._resume = ResumePoint("texts")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer; the first use in any process trains the BPE."""
        tokenizer = load_or_train_tokenizer(
            self.tokenizer_name, self.cache_dir, self._bpe_key, self._train_tokenizer, has_end=False
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        _check_tokenizer(tokenizer, self.tokenizer_name, self.max_length)
        if self.tokenizer_name is None:  # a saved model reads no more than what it was trained on
            tokenizer.model_max_length = self.max_length
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens, with added and special ones."""
        return len(self.tokenizer)

    @property
    def pad_token_id(self) -> int:
        """The token that fills up sequences: the tokenizer's, or else its eos token."""
        return int(self.tokenizer.pad_token_id)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers; the first use in any process reads the source."""
        return self.texts.class_names

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_names)

    def prepare_data(self) -> None:
        """Write the encoded rows of all splits to the cache, if they are not there."""
        build_once(self._directory, self._write)
        self.texts.forget()

    def setup(self, stage: str | None = None) -> None:
        """Open what `prepare_data` wrote, and draw subset and label noise.

        Raises:
            RuntimeError: If it has not run.
        """
        if self._sequences:
            return
        for name, dataset in open_splits(self._directory, SequenceSize).items():
            labels = labels_of(dataset)
            rows = np.arange(len(labels))
            if name == "train":
                rows = pick_balanced(labels, self.max_train_rows or len(rows), self.seed)
                labels = self._add_noise(labels[rows])
            self._sequences[name] = LabelledSequences(dataset, rows, labels)
        if self.max_train_rows is not None:
            rank_zero_info(f"Training on {len(self._sequences['train'])} rows, see `max_train_rows`.")

    # Lightning's hooks read alike in all data modules; what they do is in `loaders`, `resuming` and `prepared`.

    def train_dataloader(self) -> Any:
        """Return the shuffled training batches, from the checkpoint's position on if one is restored."""
        return self._resume.apply(self._loader("train", self.batch_size), self.trainer)

    def val_dataloader(self) -> Any:
        """Return all validation batches in order; an empty list if validation is switched off."""
        return self._loader("val", self.eval_batch_size) if "val" in self._sequences else []

    def test_dataloader(self) -> Any:
        """Return all test batches in order; an empty list if the test split is switched off."""
        return self._loader("test", self.eval_batch_size) if "test" in self._sequences else []

    def predict_dataloader(self) -> Any:
        """Return the test batches; no rank repeats a row."""
        return self._loader("test", self.eval_batch_size, fill=False) if "test" in self._sequences else []

    @cached_property
    def _directory(self) -> Path:
        """The cache entry that holds the encoded rows."""
        own = self.tokenizer
        tokenizer = own.backend_tokenizer.to_str(), own.model_input_names, own.truncation_side
        return self.cache_dir / f"sequences-{digest(FORMAT_VERSION, self.texts.key, tokenizer, self.max_length)}"

    def _bpe_key(self) -> str:
        return digest("sequences", FORMAT_VERSION, self.texts.key, self.bpe_vocab_size, tokenizers.__version__)

    def _train_tokenizer(self, directory: Path) -> None:
        texts = chain.from_iterable(self.texts.read()["train"].texts)
        train_bpe(texts, self.bpe_vocab_size, directory, for_encoders=True)

    def _write(self, directory: Path) -> None:
        write_sequences(directory, self.texts.read(), self.tokenizer, self.max_length)

    def _add_noise(self, labels: Ints) -> Ints:
        """Return the labels with some of them replaced; a missing one stays so."""
        known = labels != IGNORE_INDEX
        noisy = labels.copy()
        noisy[known] = add_label_noise(labels[known], self.label_noise, self.num_classes, self.seed)
        return noisy

    def _loader(self, split: str, batch_size: int, *, fill: bool = True) -> Any:
        rows = self._sequences[split]
        train = split == "train"
        return block_loader(
            rows,
            batch_size,
            self.trainer,
            self.seed,
            train=train,
            fill=fill,
            collate_fn=sequence_collator(self.tokenizer),
            lengths=rows.lengths if train and self.group_by_length else None,
            items="rows",
            advice="Lower `batch_size` or the fractions that are held out, or raise `max_train_rows`.",
            **self._loading,
        )

    def _order(self) -> dict[str, Any]:
        data = digest(self._directory.name, self.max_train_rows, self.group_by_length)
        return {"data": data, "batch_size": self.batch_size, "world_size": self._world_size}


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast, name: str | None, max_length: int) -> None:
    if tokenizer.pad_token is None:
        raise ValueError(
            f"Expected `tokenizer` to have a padding token, but {name!r} has neither that nor an end-of-sequence token."
            " Set `pad_token` in its `tokenizer_config.json`."
        )
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"Expected `max_length` to be at most {tokenizer.model_max_length}, which is what the tokenizer {name!r}"
            f" says that its model reads, but got {max_length}."
        )
