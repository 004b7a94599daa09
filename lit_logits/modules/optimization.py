"""Optimizer and schedule in the form that Lightning expects from `configure_optimizers`."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

__all__ = ["StepCount", "counted_steps", "make_optimizers"]


def make_optimizers(
    parameters: Iterable[nn.Parameter],
    optimizer: Callable[[Any], Optimizer],
    lr_scheduler: Callable[[Optimizer], Any] | None = None,
    interval: Literal["epoch", "step"] = "step",
) -> Any:
    """Make the optimizer of the parameters that are trained, and its schedule if there is one.

    Args:
        parameters: of the module; frozen ones are left out.
        optimizer: callable that takes the parameters.
        lr_scheduler: callable that takes the optimizer; a schedule with a `monitor` (`ReduceLROnPlateau`) is stepped
            once an epoch on that value.
        interval: how often any other schedule is stepped.

    Example:
        >>> from torch.optim import SGD
        >>> type(make_optimizers([nn.Parameter()], SGD)).__name__
        'SGD'
    """
    made = optimizer([parameter for parameter in parameters if parameter.requires_grad])
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
