"""`CodebookFit`: vectors of tokens become shared codes, late in training.

Letters: d hidden size, V vocabulary.
"""

from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lit_logits.callbacks.parts import averaging_callback, check_at_least, find_parts, uncoded_heads
from lit_logits.callbacks.reading import share_left, training_positions
from lit_logits.callbacks.scalars import log_scalars
from lit_logits.contracts import CodingHead, GivesHiddenStates
from lit_logits.modules.sharding import check_whole_weights

__all__ = ["CodebookFit"]

_POSITIONS_A_DIMENSION = 256  # of what is read; the metric has d² numbers


class CodebookFit(Callback):
    """Late in training, fit codes to the vectors that tokens own so far, and train the codes from there on.

    A head such as `HierarchicalVQLogitsHead(own_vectors=True)` learns as a dense layer does, by a loss that is nearly
    as cheap as that of codes. After a share of the training this callback reads some of the training text, and fits the
    codes in what an error of a logit costs there; see `functional.code_vectors`. The vectors and their moments are then
    gone from model and optimizer, and the codes begin without moments. If training ends before, codes are fitted at
    its end.

    Logs `vq/coding_error`, the share of the weighted variance of the logits that is lost, and `vq/coding_cost`, by how
    many nats a token the loss rose on an eighth of what was read, which is set aside.

    Args:
        at: share of the training after which the codes are fitted, in (0, 1].
        num_tokens: tokens to read on all ranks together; default 256 d, or all of them.

    Raises:
        ValueError: If an argument is out of range; at the start of fit, if the model does not offer `hidden_states`,
            weights are averaged, or the strategy cannot let parameters go.

    Example:
        >>> CodebookFit(at=0.8).at
        0.8
    """

    def __init__(self, at: float = 0.9, num_tokens: int | None = None) -> None:
        if not 0 < at <= 1:
            raise ValueError(f"Expected `at` to be a share in (0, 1], but got {at}.")
        if num_tokens is not None:
            check_at_least(1, num_tokens=num_tokens)
        self.at, self.num_tokens = at, num_tokens

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn if no tokens own vectors, and refuse what cannot work."""
        if stage != "fit":
            return
        if not find_parts(pl_module, CodingHead):
            rank_zero_warn(
                "CodebookFit found no head whose tokens can own vectors, such as"
                " HierarchicalVQLogitsHead(own_vectors=True)."
            )
            return
        if not isinstance(pl_module, GivesHiddenStates):
            raise ValueError(
                f"Expected {type(pl_module).__name__} to have a method `hidden_states`, as `VQLogitsLM` has, for"
                " CodebookFit to read what its head reads."
            )
        strategy = trainer.strategy
        check_whole_weights(strategy, "CodebookFit")
        unused = getattr(strategy, "_ddp_kwargs", {}).get("find_unused_parameters", False)
        if isinstance(strategy, DDPStrategy) and not unused:
            raise ValueError(
                "Expected strategy='ddp_find_unused_parameters_true' with CodebookFit, as codes get no gradient before"
                " it and vectors none after it, but got plain DDP."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to code vectors while weights are averaged."""
        averages = averaging_callback(trainer)
        if averages is not None and uncoded_heads(pl_module):
            raise ValueError(
                f"Expected no {averages} with CodebookFit: it averages parameters that change their shape. Leave one of"
                " them out."
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Code as soon as the share of the training is over."""
        if share_left(trainer) <= 1 - self.at + 1e-9:
            self._code(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Code where training ends early, before other callbacks save what it came to."""
        if trainer.should_stop:
            self._code(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Code what is not coded yet."""
        self._code(trainer, pl_module)

    def _code(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for head in uncoded_heads(pl_module):
            wanted = self.num_tokens or _POSITIONS_A_DIMENSION * cast(Any, head).hidden_size
            with training_positions(trainer, pl_module, wanted) as positions:
                found = head.code_vectors(positions, progress_bar=trainer.is_global_zero)
            for optimizer in trainer.optimizers:
                forget(optimizer, found.vectors)
            log_scalars(trainer, {"vq/coding_error": found.error, "vq/coding_cost": found.cost})
            rank_zero_info(
                f"Step {trainer.global_step}: the vectors of tokens are coded, after reading {found.num_positions:,}"
                f" tokens. {100 * found.error:.1f} % of the variance of the logits is lost; on tokens that were set"
                f" aside the loss rose by {found.cost:.3f} nats a token."
            )


def forget(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Take a parameter out of an optimizer, with its moments, as if it had never been there."""
    optimizer.state.pop(parameter, None)
    for group in optimizer.param_groups:
        group["params"] = [other for other in group["params"] if other is not parameter]
