"""`CodebookReassign`: give tokens other codes in training, by what the model has learned.

Letters: B batch, T sequence, N positions, d hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_logits.callbacks.parts import averaging_callback, check_at_least, find_parts
from lit_logits.callbacks.reading import share_left, training_positions
from lit_logits.callbacks.scalars import log_scalars
from lit_logits.contracts import GivesHiddenStates, ReassigningHead
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
        for head in find_parts(pl_module, ReassigningHead):
            vocab_size = len(cast(Any, head).token_counts)
            with training_positions(trainer, pl_module, self.num_tokens or _TOKENS_A_WORD * vocab_size) as positions:
                found = head.reassign(positions, min_gain=self.min_gain, slack=_SLACK * share_left(trainer))
            share = found.num_tokens / vocab_size
            log_scalars(trainer, {"vq/reassigned": share, "vq/reassign_gain": found.gain})
            rank_zero_info(
                f"Step {step}: {found.num_tokens:,} tokens got other codes, after reading {found.num_positions:,}"
                f" tokens; on those of them that were set aside the loss fell by {found.gain:.3f} nats a token."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last reading, so that a resumed run does not read twice."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the last reading."""
        self.last_step = state_dict["last_step"]
