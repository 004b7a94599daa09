"""Training loaders that stop and go on: what a resumed run sees is what the uninterrupted run would have seen.

A position is (epoch, batches): passes over the data that are complete, and batches of the present one that the trainer
has processed. The order of a pass is a function of the seed and the epoch alone, so a position is the whole state of a
map-style loader. Three things make it exact under Lightning.

* What the loader has yielded is not what the trainer has processed: a batch whose step raised is given again, and so is
  the one that Lightning holds back from a loader without length. Lightning's counters tell them apart.
* The loader counts its own passes and ignores `set_epoch`: Lightning calls an epoch that `max_steps` cut short
  complete.
* Iterating is lazy: Lightning calls `iter` before it has restored its loops, and drops iterators that it never
  advanced. An iterator that was left early is continued by the next one.
"""

from collections.abc import Callable, Iterator, Sized
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_logits.datamodules.filling import FilledRows, collate_filled

__all__ = ["BlockLoader", "BlockSampler", "Cursor", "LengthSampler", "Position", "block_loader", "collate_blocks"]


class Position(NamedTuple):
    """Where a pass over the data stands.

    Attributes:
        epoch: number of complete passes.
        batches: number of processed batches of the present pass, on each rank.
    """

    epoch: int = 0
    batches: int = 0


class Cursor:
    """Keeps a training loader's position.

    Args:
        trainer: the trainer that consumes the loader; None in a plain loop, where a yielded batch is a processed one.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        self.trainer = trainer
        self.start = Position()
        self.yielded = 0
        self.exhausted = False

    def begin(self, position: Position) -> None:
        """Start, or start again, at a position."""
        self.start, self.yielded, self.exhausted = position, position.batches, False

    def position(self, length: float) -> Position:
        """Return the position of the next batch that the trainer has not processed.

        Args:
            length: batches in a pass, infinity where that is not known.
        """
        batches = self.yielded
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            limit = self.trainer.num_training_batches
            held_back = limit == float("inf") and self.yielded > self.start.batches and not self.exhausted
            batches = max(self.start.batches, batches - held_back - (progress.ready - progress.processed))
            length = min(length, limit) if limit else length
        if batches >= length or (self.exhausted and batches == self.yielded):
            return Position(self.start.epoch + 1, 0)
        return Position(self.start.epoch, batches)


class BlockSampler(DistributedSampler):
    """Deals a permutation of the data set out to the ranks, one index each in turn.

    The permutation depends on the seed and the epoch only, so W ranks with batch size B see, step by step, the batches
    that one process with batch size W·B sees. Lightning leaves a `DistributedSampler` in place.

    Args:
        dataset: anything with a length.
        num_replicas: W, the number of ranks.
        rank: of this process.
        shuffle: False keeps the order of the data set.
        seed: of the permutations.
        drop_last: drop up to W − 1 items so that all ranks have equally many. If False, the first ranks may have one
            more.

    Attributes:
        start: number of this rank's indices to leave out at the beginning of the next iteration.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int = 1,
        rank: int = 0,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        sized: Any = dataset  # torch's annotation asks for a `Dataset`, its code for a length
        super().__init__(sized, num_replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's indices of the epoch, from `start` on."""
        order = self._order(len(self.dataset))  # type: ignore[arg-type]
        mine = order[: self.total_size][self.rank :: self.num_replicas]
        return iter(mine[self.start :].tolist())

    def __len__(self) -> int:
        """Return the number of this rank's indices in a whole epoch."""
        size = min(len(self.dataset), self.total_size)  # type: ignore[arg-type]
        return len(range(self.rank, size, self.num_replicas))

    def _order(self, size: int) -> torch.Tensor:
        """Return the order of the epoch, the same on all ranks."""
        if not self.shuffle:
            return torch.arange(size)
        return torch.randperm(size, generator=self._generator())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)


class LengthSampler(BlockSampler):
    """Deals out batches whose items have like lengths, in an order that is drawn, so that there is little padding.

    The permutation of the epoch is cut into windows of 50 batches of all ranks. Those of a window are made of its items
    in the order of their lengths, and all batches are shuffled. An incomplete batch comes last. As with a
    `BlockSampler`, seed and epoch decide everything, and W ranks see what one process with W·B items a batch sees.

    Args:
        dataset: anything with a length.
        lengths: of each item.
        batch_size: B, items a rank and batch.
        num_replicas: W, the number of ranks.
        rank: of this process.
        seed: of the permutations.

    Example:
        >>> sampler = LengthSampler(range(4), torch.tensor([5, 1, 5, 1]), batch_size=2)
        >>> sorted(sorted(batch) for batch in torch.tensor(list(sampler)).view(2, 2).tolist())
        [[0, 2], [1, 3]]
    """

    WINDOW = 50

    def __init__(
        self,
        dataset: Sized,
        lengths: torch.Tensor,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed, drop_last=True)
        self.lengths, self.size = lengths, batch_size * num_replicas

    def _order(self, size: int) -> torch.Tensor:
        generator = self._generator()
        batches = list[torch.Tensor]()
        for window in torch.randperm(size, generator=generator).split(self.WINDOW * self.size):
            batches += window[self.lengths[window].argsort(stable=True)].split(self.size)
        whole = sum(len(batch) == self.size for batch in batches)
        shuffled = torch.randperm(whole, generator=generator).tolist()
        return torch.cat([*(batches[number] for number in shuffled), *batches[whole:]])


class BlockLoader(DataLoader):
    """A map-style training loader that saves and restores its position.

    Its sampler is a `BlockSampler`. `len` is that of a whole pass, also when the next iteration starts in the middle:
    it is what Lightning reckons with. Batches that were processed before are never read again. A data set with a method
    `set_epoch` is told which pass it is read for, so that what it draws can depend on it.
    """

    cursor: Cursor

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the rest of the present pass, or the next pass if none is left."""
        position = self.cursor.position(len(self))
        self.cursor.begin(position)
        if isinstance(self.sampler, BlockSampler):  # `Trainer(overfit_batches=...)` puts another one in its place
            self.sampler.set_epoch(position.epoch)
            self.sampler.start = position.batches * (self.batch_size or 1)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(position.epoch)
        for batch in super().__iter__():
            self.cursor.yielded += 1
            yield batch
        self.cursor.exhausted = True

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain integers."""
        return self.cursor.position(len(self))._asdict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next iteration start at a saved position."""
        self.cursor.begin(Position(state_dict["epoch"], state_dict["batches"]))


def collate_blocks(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack blocks into a batch.

    Args:
        rows: B times `{"input_ids": T token ids}`.

    Returns:
        `input_ids`, `attention_mask` (ones) and `labels` (the same ids, unshifted), LongTensors of shape (B, T).
    """
    input_ids = torch.stack([torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids.clone()}


def block_loader(
    dataset: Dataset,
    batch_size: int,
    trainer: Trainer | None,
    seed: int,
    *,
    train: bool,
    fill: bool = True,
    collate_fn: Callable[[Any], Any] = collate_blocks,
    lengths: torch.Tensor | None = None,
    items: str = "blocks",
    advice: str = "Lower `batch_size` or `block_size`.",
    **kwargs: Any,
) -> DataLoader:
    """Build the loader of a split for the trainer's rank.

    Args:
        dataset: the split's items; rows `{"input_ids": ...}` unless `collate_fn` takes others.
        batch_size: B, items a rank and batch.
        trainer: tells rank and world size; None is a single process.
        seed: of the training order.
        train: shuffled, resumable, and without a last short batch; else in order and complete.
        fill: give all ranks as many evaluation batches, see `lit_logits.datamodules.filling`. If False, as suits
            predicting, a rank may have a row less than another, or none.
        collate_fn: makes a batch of B items.
        lengths: of each item; training batches are then made of items of like lengths.
        items: what an error message calls them.
        advice: last sentence of the message that there are too few.
        kwargs: further arguments of `DataLoader`.

    Raises:
        ValueError: If there is less than a training batch for every rank.
    """
    world_size = trainer.world_size if trainer else 1
    size = len(dataset)  # type: ignore[arg-type]
    if train and size < batch_size * world_size:
        raise ValueError(
            f"Expected at least {batch_size * world_size} training {items} for batches of {batch_size} on {world_size} "
            f"rank(s), but got {size}. {advice}"
        )
    if not train and fill and size % world_size:
        dataset, collate_fn = FilledRows(dataset, world_size), partial(collate_filled, collate_fn=collate_fn)
    ranks = world_size, trainer.global_rank if trainer else 0
    if train and lengths is not None:
        sampler: BlockSampler = LengthSampler(dataset, lengths, batch_size, *ranks, seed=seed)  # type: ignore[arg-type]
    else:
        sampler = BlockSampler(dataset, *ranks, shuffle=train, seed=seed, drop_last=train)  # type: ignore[arg-type]
    cls = BlockLoader if train else DataLoader
    loader = cls(dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate_fn, drop_last=train, **kwargs)
    if isinstance(loader, BlockLoader):
        loader.cursor = Cursor(trainer)
    return loader
