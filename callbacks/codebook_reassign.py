"""`CodebookReassign`: give tokens other codes in training, by what the model has learned.

Letters: B batch, T sequence, N positions, d hidden size, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from tqdm.auto import tqdm

from lit_logits.callbacks.parts import averaging_callback, check_at_least, data_module, find_parts
from lit_logits.callbacks.scalars import log_scalars
from lit_logits.contracts import GivesHiddenStates, ReassigningHead
from lit_logits.functional.labels import next_token_labels
from lit_logits.modules.sharding import check_whole_weights

__all__ = ["CodebookReassign"]

_TOKENS_A_WORD = 160  # in a sketch 25 gained nothing, 75 a little, 160 most
# Nats, where the whole training is still to come: a longer step is worth that much at once, as vectors then learn to
# serve the tokens that they got. In the demo, half-way, the step of the lowest loss moved a fifth of the tokens and
# ended at 84.5 and 85.5, one that cost 0.02 more at 83.4.
_SLACK = 0.05


class CodebookReassign(Callback):
    """At some steps, read training text and give each token the codes that lower the loss most.

    A mapping from co-occurrence is known before training; what the model has learned tells better. The head sums, over
    one reading with the weights as they are, how the loss depends on the vector of each token, and gives the token the
    codes that come nearest to what it asks for; see `functional.reassign_by_loss`. Up to an eighth of what is read is
    set aside. Of steps of several lengths, and none, the longest is taken after which the loss there is nearly the
    lowest: within 0.05 nats times the share of the training that is left, in which vectors learn to serve the tokens
    that they got. Vectors stay, so the moments of the optimizer stay right. A `HierarchicalVQLogitsHead` keeps its
    clusters. All ranks end with the same codes.

    Logs `vq/reassigned`, the share of the tokens that got other codes, and `vq/reassign_gain`, by how many nats a token
    the loss fell on what was set aside.

    Args:
        at_steps: optimizer steps at which it reads, for instance one in the middle of a short training.
        num_tokens: tokens to read on all ranks together; default 160 V, or all of them. With far fewer, codes follow
            chance.
        min_gain: nats, summed over what is read, that the change of a code must gain.

    Raises:
        ValueError: If an argument is out of range; at the start of fit, if the head cannot, the model does not offer
            `hidden_states`, or weights are averaged.

    Example:
        >>> CodebookReassign(at_steps=[240]).at_steps
        (240,)
    """

    def __init__(self, at_steps: Sequence[int], num_tokens: int | None = None, min_gain: float = 2.0) -> None:
        for step in at_steps:
            check_at_least(1, at_steps=step)
        if num_tokens is not None:
            check_at_least(1, num_tokens=num_tokens)
        if min_gain < 0:
            raise ValueError(f"Expected `min_gain` to be at least 0, but got {min_gain}.")
        self.at_steps, self.num_tokens, self.min_gain = tuple(at_steps), num_tokens, min_gain
        self.last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn if the model has no head with codes, and refuse one whose codes cannot change."""
        heads = find_parts(pl_module, ReassigningHead)
        if not heads:
            rank_zero_warn("CodebookReassign found no head in the model whose tokens can get other codes.")
        elif not isinstance(pl_module, GivesHiddenStates):
            raise ValueError(
                f"Expected {type(pl_module).__name__} to have a method `hidden_states`, as `VQLogitsLM` has, for"
                " CodebookReassign to read what its head reads."
            )
        for head in heads:
            if not head.can_reassign:
                raise ValueError(
                    "Expected a head with a fixed mapping for CodebookReassign, because one that is learned would undo"
                    " it. Set mapping='fixed' and codebook_update='gradient', or leave the callback out."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to change codes that are in pieces, or averaged; warn if training ends before the first reading."""
        check_whole_weights(trainer.strategy, "CodebookReassign")
        if 1 < trainer.max_steps <= min(self.at_steps, default=0):
            rank_zero_warn(
                f"CodebookReassign reads at steps {list(self.at_steps)}, but training ends at step {trainer.max_steps}."
                f" Set at_steps=[{max(1, trainer.max_steps // 2)}]."
            )
        averages = averaging_callback(trainer)
        if averages is not None:
            raise ValueError(
                f"Expected no {averages} with CodebookReassign: a mean over steps would mix what two mappings learned."
                " Leave one of them out."
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Read and re-assign when one of the steps has just been reached, unless no training follows."""
        step = trainer.global_step
        is_last = 0 < trainer.max_steps <= step
        if step == self.last_step or step not in self.at_steps or is_last:
            return
        self.last_step = step
        data = data_module(trainer)
        for head in find_parts(pl_module, ReassigningHead):
            loader = first_pass(trainer.train_dataloader if data is None else cast(Any, data).train_dataloader())
            # Loaders of torch draw a seed, which must not change what training draws next.
            with torch.random.fork_rng(devices=[]):
                found = head.reassign(
                    self._positions(trainer, pl_module, loader, head),
                    min_gain=self.min_gain,
                    slack=_SLACK * share_left(trainer),
                )
            share = found.num_tokens / len(cast(Any, head).token_counts)
            log_scalars(trainer, {"vq/reassigned": share, "vq/reassign_gain": found.gain})
            rank_zero_info(
                f"Step {step}: {found.num_tokens:,} tokens got other codes, after reading {found.num_positions:,}"
                f" tokens; on those of them that were set aside the loss fell by {found.gain:.3f} nats a token."
            )

    def _positions(
        self, trainer: Trainer, pl_module: LightningModule, loader: Iterable[Mapping[str, Tensor]], head: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        wanted = self.num_tokens or _TOKENS_A_WORD * len(head.token_counts)
        return read_positions(
            loader,
            pl_module,
            num_tokens=-(-wanted // trainer.world_size),
            precision=trainer.precision_plugin.forward_context,
            progress_bar=trainer.is_global_zero,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last reading, so that a resumed run does not read twice."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the last reading."""
        self.last_step = state_dict["last_step"]


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
