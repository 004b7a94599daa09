"""Text for language models: any corpus, any tokenizer, as blocks of B × T token ids.

Letters: B is `batch_size`, T is `block_size`. A batch is transformers' dict `input_ids`, `attention_mask` (ones) and
`labels` (the same ids, unshifted), LongTensors of shape (B, T).
"""

from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
from datasets import IterableDataset
from lightning.pytorch import LightningDataModule
from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules.caching import build_once, default_cache_dir, digest
from lit_logits.datamodules.checks import as_part, check_at_least
from lit_logits.datamodules.loaders import block_loader
from lit_logits.datamodules.prepared import open_splits
from lit_logits.datamodules.resuming import ResumePoint, Resumes
from lit_logits.datamodules.splitting import check_fractions
from lit_logits.datamodules.text.corpus import Corpus, TextSource
from lit_logits.datamodules.text.packing import SplitSize, write_splits
from lit_logits.datamodules.text.streaming import StreamLoader, pack_stream
from lit_logits.datamodules.tokenization import load_or_train_tokenizer, train_bpe

__all__ = ["TextDataModule"]

FORMAT_VERSION = 2
"""Part of every cache entry's name: raise it when the same arguments are to give other blocks."""


class TextDataModule(Resumes, LightningDataModule):
    """Blocks of tokens from a corpus, prepared once and cached on disk.

    Documents are split into training, validation and test by their text, so equal documents never meet across splits.
    Each is tokenised and ended with the eos token; a split's documents are joined and cut into blocks, and the tail
    that is shorter than a block is dropped. The cache entry is named by a digest of all that shaped it: a changed file
    or argument never meets a stale one. Training resumes in the middle of an epoch with the next unseen batch.

    Args:
        source: where the documents come from: a `TextSource` (in a recipe, a mapping `{path: ..., subset: ...}`), or
            its `path` alone, such as `"python-docs"`, `"my/*.txt"` or the name of a data set.
        streaming: read the training split while training, for what is too large for the disk or the memory.
        tokenizer: hub id, local folder or `.gguf` file; None trains a byte-level BPE on the training split.
        bpe_vocab_size: tokens of that BPE, at least 257.
        bpe_documents: with `streaming`, documents that the BPE is trained on.
        block_size: T, tokens in a block.
        batch_size: B, blocks a batch on each rank.
        val_fraction: share of the characters (of a stream: of the documents) held out for validation, in [0, 1). Unused
            where the data set has a validation split of its own; 0 switches validation off.
        test_fraction: the same for test and predict.
        val_blocks: with `streaming`, blocks of the validation and of the test split.
        shuffle_buffer: with `streaming`, documents whose blocks are shuffled together.
        num_workers: processes that load batches.
        seed: of the split and of the training order.
        cache_dir: folder of the cache; None is `$XDG_CACHE_HOME/lit_logits` or `~/.cache/lit_logits`.

    Raises:
        ValueError: If an argument is out of range; from `vocab_size`, `tokenizer` or `prepare_data`, if the source
            cannot be read or a split holds less than a block.
    """

    def __init__(
        self,
        # With `Path`, jsonargparse does not read a file of that name as part of a recipe. It is last for the dumps.
        source: str | list[str] | TextSource | Path = "python-docs",
        streaming: bool = False,
        tokenizer: str | None = None,
        bpe_vocab_size: int = 4096,
        bpe_documents: int = 100_000,
        block_size: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        val_blocks: int = 256,
        shuffle_buffer: int = 1000,
        num_workers: int = 0,
        seed: int = 42,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        check_at_least(257, bpe_vocab_size=bpe_vocab_size)
        check_at_least(1, bpe_documents=bpe_documents, block_size=block_size, batch_size=batch_size)
        check_at_least(1, val_blocks=val_blocks, shuffle_buffer=shuffle_buffer)
        check_at_least(0, num_workers=num_workers)
        fractions = {"val": val_fraction, "test": test_fraction}
        check_fractions(fractions)
        documents = as_part("source", source, TextSource)
        self.corpus = Corpus(documents, streaming=streaming, fractions=fractions, seed=seed)
        self.streaming = streaming
        self.tokenizer_name = tokenizer
        self.bpe_vocab_size, self.bpe_documents = bpe_vocab_size, bpe_documents
        self.block_size, self.batch_size = block_size, batch_size
        self.val_blocks, self.shuffle_buffer = val_blocks, shuffle_buffer
        self.num_workers = num_workers
        self.seed = seed
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self._blocks: dict[str, Any] = {}
        self._resume = ResumePoint("blocks")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer; the first use in any process trains the BPE."""
        return load_or_train_tokenizer(self.tokenizer_name, self.cache_dir, self._bpe_key, self._train_tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, with added and special ones."""
        return len(self.tokenizer)

    def prepare_data(self) -> None:
        """Write the blocks of all splits to the cache, if they are not there."""
        build_once(self._directory, self._write_blocks)
        self.corpus.forget()

    def setup(self, stage: str | None = None) -> None:
        """Open the blocks that `prepare_data` wrote.

        Raises:
            RuntimeError: If it has not run.
        """
        if self._blocks:
            return
        splits = open_splits(self._directory, SplitSize)
        self._blocks = {name: rows.with_format("torch") for name, rows in splits.items()}
        if self.streaming:
            self._blocks["train"] = self.corpus.streams["train"]

    # Lightning's hooks read alike in all data modules; what they do is in `loaders`, `resuming` and `prepared`.

    def train_dataloader(self) -> Any:
        """Return the shuffled training batches, from the checkpoint's position on if one is restored."""
        if self.streaming:
            stream = StreamLoader(self._open_stream, self.batch_size, self.trainer, **self._loading)
            return self._resume.apply(stream, self.trainer)
        return self._resume.apply(self._loader("train", train=True), self.trainer)

    def val_dataloader(self) -> Any:
        """Return all validation batches in order; an empty list if validation is switched off."""
        return self._loader("val") if "val" in self._blocks else []

    def test_dataloader(self) -> Any:
        """Return all test batches in order; an empty list if the test split is switched off."""
        return self._loader("test") if "test" in self._blocks else []

    def predict_dataloader(self) -> Any:
        """Return the test batches; no rank repeats a block."""
        return self._loader("test", fill=False) if "test" in self._blocks else []

    @cached_property
    def _directory(self) -> Path:
        """The cache entry that holds the blocks."""
        tokenizer = self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.eos_token_id
        key = digest(FORMAT_VERSION, self.corpus.key, tokenizer, self.block_size, self._max_blocks)
        return self.cache_dir / f"blocks-{key}"

    @property
    def _max_blocks(self) -> int | None:
        return self.val_blocks if self.streaming else None

    def _bpe_key(self) -> str:
        return digest(FORMAT_VERSION, self.corpus.key, self.bpe_vocab_size, self.bpe_documents, tokenizers.__version__)

    def _train_tokenizer(self, directory: Path) -> None:
        limit = self.bpe_documents if self.streaming else None
        train_bpe(islice(self.corpus.documents("train"), limit), self.bpe_vocab_size, directory)

    def _write_blocks(self, directory: Path) -> None:
        """Write the blocks of all splits, of a stream those of validation and test."""
        names = [name for name in self.corpus.splits if not (self.streaming and name == "train")]
        documents = {name: self.corpus.documents(name) for name in names}
        write_splits(directory, documents, self.tokenizer, self.block_size, self._max_blocks)

    def _open_stream(self, epoch: int) -> IterableDataset:
        return pack_stream(
            self.corpus.streams["train"],
            epoch,
            tokenizer=self.tokenizer,
            text_column=self.corpus.text_column,
            block_size=self.block_size,
            fractions=self.corpus.held_out,
            shuffle_buffer=self.shuffle_buffer,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self._world_size,
        )

    def _loader(self, split: str, *, train: bool = False, fill: bool = True) -> Any:
        options: dict[str, Any] = {"train": train, "fill": fill, **self._loading}
        return block_loader(self._blocks[split], self.batch_size, self.trainer, self.seed, **options)

    def _order(self) -> dict[str, Any]:
        order = {"data": self._directory.name, "batch_size": self.batch_size, "world_size": self._world_size}
        if self.streaming:  # its workers read different shards
            order |= {"num_workers": self.num_workers, "shuffle_buffer": self.shuffle_buffer}
        return order
