"""Optimizer, schedule and the gradient of a step, in the forms that Lightning expects."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_logits.functional.distributed import all_reduce_sum_

__all__ = ["StepCount", "TokenWindow", "counted_steps", "make_optimizers"]


def make_optimizers(
    parameters: Iterable[nn.Parameter],
    optimizer: Callable[[Any], Optimizer],
    lr_scheduler: Callable[[Optimizer], Any] | None = None,
    interval: Literal["epoch", "step"] = "step",
    trainer: Any = None,
) -> Any:
    """Make the optimizer of the parameters that are trained, and its schedule if there is one.

    Args:
        parameters: of the module; frozen ones are left out.
        optimizer: callable that takes the parameters.
        lr_scheduler: callable that takes the optimizer; a schedule with a `monitor` (`ReduceLROnPlateau`) is stepped
            once an epoch on that value.
        interval: how often any other schedule is stepped.
        trainer: of the run; None outside of one.

    Raises:
        ValueError: If parameters that are trained are float16, as `precision: 16-true` makes them. A strategy that
            keeps copies in float32 (DeepSpeed) may have such.

    Example:
        >>> from torch.optim import SGD
        >>> type(make_optimizers([nn.Parameter()], SGD)).__name__
        'SGD'
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    keeps_copies = trainer is not None and trainer.strategy.handles_gradient_accumulation
    if not keeps_copies and any(parameter.dtype == torch.float16 for parameter in trained):
        raise ValueError(
            "Expected parameters that are trained to be float32, bfloat16 or float64, but got float16, in which small"
            " gradients are zero and AdamW divides by it. Set `precision: 16-mixed` or `bf16-true`."
        )
    made = optimizer(trained)
    if lr_scheduler is None:
        return made
    scheduler = lr_scheduler(made)
    monitor = getattr(scheduler, "monitor", None)
    settings = {
        "scheduler": scheduler,
        "interval": interval if monitor is None else "epoch",
        "monitor": monitor or "val/loss",
    }
    return {"optimizer": made, "lr_scheduler": settings}


class StepCount:
    """How many steps an optimizer has taken; see `counted_steps`."""

    def __init__(self) -> None:
        self.taken = 0


@contextlib.contextmanager
def counted_steps(optimizer: Any) -> Iterator[StepCount]:
    """Count the steps that an optimizer takes within the context.

    A loss scaler (float16) leaves a step out where gradients have overflowed. An optimizer that cannot tell, because it
    is not one of torch, counts as one that has taken a step.

    Args:
        optimizer: of torch, or Lightning's wrapper of one.

    Example:
        >>> import torch
        >>> parameter = nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([parameter], lr=0.1)
        >>> with counted_steps(optimizer) as steps:
        ...     optimizer.step()
        >>> steps.taken
        1
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    steps = StepCount()

    def count(stepped: Any, *_: object) -> None:
        overflow = getattr(stepped, "found_inf", None)  # set during the step of a fused one, which looks by itself
        steps.taken += int(overflow is None or not bool(overflow))

    if not getattr(getattr(type(inner), "step", None), "hooked", False):  # as torch marks a `step` that calls hooks
        steps.taken = 1
        yield steps
        return
    handle = inner.register_step_post_hook(count)
    try:
        yield steps
    finally:
        handle.remove()


class TokenWindow:
    """Makes the gradient of a step that of the mean over all its tokens, on all micro-batches and ranks.

    A Trainer with `accumulate_grad_batches` A averages the means of A micro-batches, and W ranks average theirs: a
    token then weighs more where there are few. Here each mean is weighted by its number n of tokens, which gives
    Σ n ∇mean / (A W) when all is added up, and this is multiplied by A W / Σ n before it is clipped. A loss scaler
    (float16) has divided by its scale before that, or does so after. With one micro-batch on one rank nothing changes.

    Call `weigh` on the loss in `training_step`, and `normalize_` in `on_before_optimizer_step`, which does nothing for
    a loss that was not weighed. A strategy that accumulates by itself (DeepSpeed) keeps the mean of means.

    Example:
        >>> import torch
        >>> loss = torch.tensor(2.0, requires_grad=True)
        >>> TokenWindow().weigh(loss, torch.tensor(5), 0, trainer=None) is loss
        True
    """

    def __init__(self) -> None:
        self._count: Tensor | None = None  # tokens of the step so far
        # Weights are n / scale, so that gradients are of the size that a loss scaler expects. It is a power of two,
        # which rounds nothing, and the same on all ranks.
        self._scale = 0.0

    def weigh(self, loss: Tensor, count: Tensor, batch_idx: int, trainer: Any) -> Tensor:
        """Return a loss of the same value whose gradient is weighted by its number of tokens; all ranks call this.

        Args:
            loss: scalar, mean over the tokens of a micro-batch.
            count: scalar, their number.
            batch_idx: as Lightning gives it, which tells where a step begins.
            trainer: of the run; None outside of one.
        """
        if not _averages_means(trainer):
            return loss
        count = count.detach().float()
        if not self._scale:
            mean = float(all_reduce_sum_(count.clone())) / trainer.world_size
            self._scale = 2.0 ** round(math.log2(max(mean, 1.0)))
        is_first = batch_idx % trainer.accumulate_grad_batches == 0
        self._count = count if is_first or self._count is None else self._count + count
        return loss.detach() + (count / self._scale) * (loss - loss.detach())

    def normalize_(self, parameters: Iterable[nn.Parameter], trainer: Any) -> None:
        """Divide gradients by the number of tokens that they were summed over, in place; all ranks call this.

        Args:
            parameters: whose gradients are complete.
            trainer: of the run.
        """
        count, self._count = self._count, None
        if count is None:
            return
        num_means = trainer.accumulate_grad_batches * trainer.world_size
        factor = num_means * self._scale / all_reduce_sum_(count.clone()).clamp(min=1)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def _averages_means(trainer: Any) -> bool:
    """Return whether a step averages the means of several micro-batches or ranks, in gradients that can be reached."""
    if trainer is None or trainer.strategy.handles_gradient_accumulation:
        return False
    return bool(trainer.accumulate_grad_batches > 1 or trainer.world_size > 1)
