"""Optimizer and schedule in the form that Lightning expects from `configure_optimizers`."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

__all__ = ["make_optimizers"]


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
