"""`CodebookReinit`: revive dead codes of a vector-quantised head in training.

Letters: K codes.
"""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_logits.callbacks.parts import averaging_callback, check_at_least, check_min_usage, find_parts
from lit_logits.callbacks.scalars import log_scalars
from lit_logits.contracts import RevivableHead
from lit_logits.modules.sharding import check_whole_weights

__all__ = ["CodebookReinit", "reset_optimizer_rows"]


class CodebookReinit(Callback):
    """Give each dead code one half of the code that costs most, every n optimizer steps, and reset what goes with it.

    A code is dead when no token maps to it or when it carries less than `min_usage` of an even share of the targets
    (running counts over all ranks). The head splits the heavy code, see `RevivableHead`; the rows of the optimizer's
    moments are cleared with the vectors, because the next update would otherwise undo the revival. Of a
    `HierarchicalVQLogitsHead` both clusters and codes are revived. All ranks end with the same codes. Logs
    `vq/reinit`, the number of codes revived.

    Args:
        every_n_steps: optimizer steps between looks.
        min_usage: share below which a code is dead, in units of the even share 1/K; 0 for codes without tokens only.
        stop_step: step from which on no code is revived, so that the last ones have time to train; None never stops.
        seed: of the 2-means that split a code; the step is added.

    Raises:
        ValueError: If an argument is out of range; at the start of fit, if weights are averaged and nothing stops the
            revivals.

    Example:
        >>> CodebookReinit(every_n_steps=100, min_usage=0.01).every_n_steps
        100
    """

    def __init__(
        self, every_n_steps: int = 200, min_usage: float = 0.01, stop_step: int | None = None, seed: int = 0
    ) -> None:
        check_at_least(1, every_n_steps=every_n_steps)
        check_min_usage(min_usage)
        self.every_n_steps, self.min_usage, self.stop_step, self.seed = every_n_steps, min_usage, stop_step, seed
        self.last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn if the model has no head with codes."""
        if not find_parts(pl_module, RevivableHead):
            rank_zero_warn(
                "CodebookReinit found no head in the model that can revive its codes, such as a VQLogitsHead, and will"
                " do nothing."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to revive codes that are in pieces, or averaged: a mean would mix a code with the one it becomes."""
        check_whole_weights(trainer.strategy, "CodebookReinit")
        averages = averaging_callback(trainer)
        if averages is not None and self.stop_step is None:
            raise ValueError(
                f"Expected `stop_step` to be set with {averages}, to a step before it starts to average: a mean over"
                " steps would mix a code with what it is revived as."
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Look for dead codes when a multiple of `every_n_steps` has just been reached."""
        step = trainer.global_step
        stopped = self.stop_step is not None and step >= self.stop_step
        if step == self.last_step or step % self.every_n_steps or stopped:
            return
        self.last_step = step
        revived = 0
        for head in find_parts(pl_module, RevivableHead):
            generator = torch.Generator(head.token_counts.device).manual_seed(self.seed + step)
            num_revived, rows = head.revive_dead(self.min_usage, generator=generator)
            revived += num_revived
            for optimizer in trainer.optimizers:
                for parameter, changed in rows.items():
                    reset_optimizer_rows(optimizer, parameter, changed)
        log_scalars(trainer, {"vq/reinit": float(revived)})

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last look, so that a resumed run does not look twice."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the last look."""
        self.last_step = state_dict["last_step"]


@torch.no_grad()
def reset_optimizer_rows(optimizer: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Clear the rows of every moment that `optimizer` keeps of `parameter`; step counts stay.

    Args:
        optimizer: any optimizer whose moments have the shape of the parameter.
        parameter: (K, ...).
        rows: (D,) int64.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value[rows] = 0
