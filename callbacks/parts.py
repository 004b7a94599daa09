"""What several callbacks look up or check: parts of the model by their type, the data's tokenizer, shared arguments."""

from typing import Any, TypeVar

from lightning import LightningModule, Trainer
from torch import nn

__all__ = ["check_min_usage", "data_tokenizer", "find_part", "find_parts"]

_Part = TypeVar("_Part", bound=nn.Module)


def find_parts(pl_module: LightningModule, kind: type[_Part]) -> list[_Part]:
    """Every part of the model that is a `kind`, in the order of `modules()`."""
    return [module for module in pl_module.modules() if isinstance(module, kind)]


def find_part(pl_module: LightningModule, kind: type[_Part]) -> _Part | None:
    """The first part of the model that is a `kind`, or None.

    Callbacks find what they serve by the type of a part, never by the class of the LightningModule, so that they also
    serve a user's own.

    Example:
        >>> class Mine(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.Sequential(nn.Tanh(), nn.Linear(2, 3))
        >>> find_part(Mine(), nn.Linear)
        Linear(in_features=2, out_features=3, bias=True)
    """
    return next((module for module in pl_module.modules() if isinstance(module, kind)), None)


def data_tokenizer(trainer: Trainer) -> Any:
    """The tokenizer of the data module; None if it has none, or if there is no data module."""
    return getattr(getattr(trainer, "datamodule", None), "tokenizer", None)


def check_min_usage(min_usage: float) -> None:
    """Refuse a share at which an evenly used codebook would be dead.

    Args:
        min_usage: in units of the even share 1/K.

    Raises:
        ValueError: for a share outside [0, 1).
    """
    if not 0 <= min_usage < 1:
        raise ValueError(f"Expected `min_usage` to be in [0, 1), in units of 1/K, but got {min_usage}.")
