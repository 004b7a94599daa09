"""Streams: documents that are tokenised and packed while training reads them.

The documents of a stream are read in windows of `shuffle_buffer`; a window is tokenised, packed into blocks (its tail
is dropped) and its blocks are shuffled. So the state of a shuffled stream is where the present window began and how
many of its blocks were taken, which is what `IterableDataset.state_dict` keeps of a batched `map`, and resuming
re-reads one window at most. The order of the shards is shuffled every epoch.
"""

import os
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules.loaders import Cursor, Position, collate_blocks
from lit_logits.datamodules.splitting import bucket_of
from lit_logits.datamodules.text.packing import pack

__all__ = ["StreamLoader", "pack_stream"]


def pack_stream(
    stream: IterableDataset,
    epoch: int,
    *,
    tokenizer: PreTrainedTokenizerFast,
    text_column: str,
    block_size: int,
    fractions: dict[str, float],
    shuffle_buffer: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> IterableDataset:
    """Turn a stream of documents into the training stream of blocks of one epoch and rank.

    Args:
        stream: rows with the one column `text_column`.
        epoch: the pass; together with `seed` it decides the order.
        tokenizer: makes the tokens.
        text_column: name of the column.
        block_size: T, tokens in a block.
        fractions: shares of the documents that are held out for validation and test.
        shuffle_buffer: documents in a window.
        seed: of the order and of what is held out.
        rank: of this process.
        world_size: number of ranks. Each gets whole shards if their number is a multiple of `world_size`; otherwise
            each reads all and keeps one block in `world_size`.

    Returns:
        Rows `{"input_ids": list of T ints}`.
    """
    if world_size > 1:
        stream = split_dataset_by_node(stream, rank, world_size)
    blocks = stream.map(
        _pack_window,
        with_indices=True,
        batched=True,
        batch_size=shuffle_buffer,
        remove_columns=[text_column],
        fn_kwargs={
            "tokenizer": tokenizer,
            "text_column": text_column,
            "block_size": block_size,
            "fractions": fractions,
            "seed": seed,
            "epoch": epoch,
        },
    )
    # `datasets` shuffles the shards by any epoch but 0, without the inexact buffer of its `shuffle`.
    blocks.set_epoch(1 + (seed * 1_000_003 + epoch) % 2**31)
    return blocks


def _pack_window(
    window: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerFast,
    text_column: str,
    block_size: int,
    fractions: dict[str, float],
    seed: int,
    epoch: int,
) -> dict[str, list[Any]]:
    """Pack the training documents of a window and shuffle their blocks."""
    texts = [text for text in window[text_column] if text and not text.isspace()]
    texts = [text for text in texts if bucket_of(text, fractions, seed) == "train"]
    blocks = pack(texts, tokenizer, block_size) if texts else []
    random.Random(f"{seed}-{epoch}-{indices[0]}").shuffle(blocks)
    return {"input_ids": blocks}


class StreamLoader:
    """A training loader over a stream that saves and restores its position on every rank.

    With `num_workers=0` the state of the stream itself is kept, and resuming re-reads one window at most. Workers keep
    theirs to themselves, so with `num_workers > 0` resuming reads the epoch from its beginning and skips by count: as
    exact, and slower the later in the epoch it was interrupted.

    Args:
        open_stream: returns this rank's blocks of an epoch.
        batch_size: B, blocks a rank and batch; a last short batch is dropped.
        trainer: the trainer that consumes the loader.
        num_workers: processes that read; no more than the stream has shards are of use.
        pin_memory: copy batches into page-locked memory.
        generator: from which torch's loader draws a seed for its workers.
    """

    def __init__(
        self,
        open_stream: Callable[[int], IterableDataset],
        batch_size: int,
        trainer: Trainer | None = None,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.open_stream = open_stream
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.generator = generator
        self.cursor = Cursor(trainer)
        self._world_size = trainer.world_size if trainer else 1
        self._streams: dict[int, dict[str, Any] | None] = {0: None}  # state of the stream after this many batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the rest of the present pass, or the next pass if none is left; ranks stop together.

        Raises:
            ValueError: If a whole pass holds less than one batch.
        """
        position = self.cursor.position(float("inf"))
        state = self._streams.get(position.batches) if position.epoch == self.cursor.start.epoch else None
        self.cursor.begin(position)
        self._streams = {position.batches: state}
        blocks = self.open_stream(position.epoch)
        if state is not None:
            blocks.load_state_dict(state)
        batches: Iterator[dict[str, torch.Tensor]] = iter(self._loader(blocks))
        if state is None:
            batches = islice(batches, position.batches, None)
        while (batch := self._next(batches)) is not None:
            self.cursor.yielded += 1
            self._streams[self.cursor.yielded] = blocks.state_dict() if self.num_workers == 0 else None
            self._streams.pop(self.cursor.yielded - 4, None)  # Lightning lags by two batches at most
            yield batch
        if self.cursor.yielded == 0:
            raise ValueError(
                f"Expected the stream to hold at least one batch of {self.batch_size} blocks on each rank, but got "
                "less. Lower `batch_size` or `block_size`, or raise `shuffle_buffer`."
            )
        self.cursor.exhausted = True

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the state of every rank's stream; all ranks must call it together."""
        position = self.cursor.position(float("inf"))
        state = self._streams.get(position.batches) if position.epoch == self.cursor.start.epoch else None
        streams = [state]
        if self._world_size > 1:
            streams = [None] * self._world_size
            torch.distributed.all_gather_object(streams, state)
        return {**position._asdict(), "streams": streams}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration start at a saved position.

        Raises:
            RuntimeError: If Lightning has already fetched a batch from an earlier position.
        """
        position = Position(state_dict["epoch"], state_dict["batches"])
        if self.cursor.yielded > self.cursor.start.batches and position != self.cursor.start:
            raise RuntimeError(
                "Expected the checkpoint to be restored before the stream is read, but `configure_optimizers` reads "
                "`trainer.estimated_stepping_batches` and the strategy restores later. Set `max_epochs=-1` and "
                "give `max_steps`."
            )
        streams = state_dict["streams"]
        usable = self.num_workers == 0 and len(streams) == self._world_size
        rank = self.cursor.trainer.global_rank if self.cursor.trainer else 0
        self.cursor.begin(position)
        self._streams = {position.batches: streams[rank] if usable else None}

    def _loader(self, blocks: IterableDataset) -> DataLoader:
        return DataLoader(
            blocks,
            batch_size=self.batch_size,
            collate_fn=collate_blocks,
            drop_last=True,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=self.generator,
            worker_init_fn=_no_nested_threads,
        )

    def _next(self, batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor] | None:
        """Return the next batch, or None when it is this rank's or any other rank's turn to stop."""
        batch = next(batches, None)
        if self._world_size > 1 and self.cursor.trainer is not None:
            everyone_has_one = self.cursor.trainer.strategy.reduce_boolean_decision(batch is not None, all=True)
            return batch if everyone_has_one else None
        return batch


def _no_nested_threads(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of a forked worker, where `tokenizers` would warn and do so itself
