"""What callbacks of codes read: training text as the head meets it, in the middle of training.

Letters: B batch, T sequence, N positions, d hidden size.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from tqdm.auto import tqdm

from lit_logits.callbacks.parts import data_module
from lit_logits.functional.labels import next_token_labels

__all__ = ["first_pass", "read_positions", "share_left", "training_positions"]


@contextmanager
def training_positions(
    trainer: Trainer, pl_module: LightningModule, num_tokens: int
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Give what `read_positions` yields of the training text, `num_tokens` on all ranks together, from its start.

    What training draws next, of text and of random numbers, stays as it is.
    """
    data = data_module(trainer)
    loader = first_pass(trainer.train_dataloader if data is None else cast(Any, data).train_dataloader())
    with torch.random.fork_rng(devices=[]):  # loaders of torch draw a seed
        yield read_positions(
            loader,
            pl_module,
            num_tokens=-(-num_tokens // trainer.world_size),
            precision=trainer.precision_plugin.forward_context,
            progress_bar=trainer.is_global_zero,
        )


@torch.no_grad()
def read_positions(
    batches: Iterable[Mapping[str, Tensor]],
    module: Any,
    *,
    num_tokens: int,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress_bar: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield hidden states (N, d) and the tokens (N,) that follow them, of each batch until `num_tokens` are read.

    Args:
        batches: dicts with `input_ids`, `labels` (unshifted) and maybe `attention_mask` and `position_ids`, all (B, T).
        module: see `GivesHiddenStates`; it runs in eval mode.
        num_tokens: how many positions to read, if there are as many; the last batch is read whole.
        precision: context of the forward alone, such as autocast: what is summed of it is to be exact.
        progress_bar: show one line of progress on a terminal.
    """
    training, read = [part for part in module.modules() if part.training], 0
    module.eval()
    bar = tqdm(desc="reading for other codes", total=num_tokens, disable=None if progress_bar else True, leave=False)
    try:
        for batch in batches:
            labels, mask = next_token_labels(batch["labels"].to(module.device))
            names = [name for name in ("input_ids", "attention_mask", "position_ids") if name in batch]
            with precision():
                hidden = module.hidden_states(**{name: batch[name].to(module.device) for name in names})
            yield hidden[mask], labels[mask]
            bar.update(int(mask.sum()))
            read += int(mask.sum())
            if read >= num_tokens:
                break
    finally:
        bar.close()
        for part in training:
            part.training = True


def share_left(trainer: Trainer) -> float:
    """Return the share of the training that is still to come; 1 where its end is not known."""
    if trainer.max_steps > 0:
        return 1 - trainer.global_step / trainer.max_steps
    batches = trainer.num_training_batches
    if (trainer.max_epochs or -1) < 0 or not math.isfinite(batches):
        return 1.0
    done = trainer.current_epoch + (trainer.fit_loop.epoch_loop.batch_idx + 1) / batches
    return 1 - done / cast(int, trainer.max_epochs)


def first_pass(loader: Any) -> Any:
    """Return a loader for the data's first pass, from its start, which leaves the given one, in training, alone."""
    loader = copy.copy(loader)
    if hasattr(loader, "_iterator"):
        loader._iterator = None
    if hasattr(loader, "cursor"):  # where the loaders of the library keep their position
        loader.cursor = copy.copy(loader.cursor)
        loader.load_state_dict({"epoch": 0, "batches": 0, "streams": []})
    return loader
