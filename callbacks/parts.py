"""Look-ups and checks that several callbacks share: parts of the model, what the data module offers, arguments."""

from collections.abc import Collection
from typing import Any, TypeVar

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lit_logits.contracts import HasTokenizer, offers

__all__ = [
    "check_min_usage",
    "data_module",
    "data_tokenizer",
    "find_part",
    "find_parts",
    "tell_finished",
]

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


def data_module(trainer: Trainer) -> object:
    """Return the data module of the run, or None where loaders were given."""
    return getattr(trainer, "datamodule", None)  # which Lightning sets and does not declare


def data_tokenizer(trainer: Trainer) -> Any:
    """Return the tokenizer of the data module, or None without one."""
    data = data_module(trainer)
    return data.tokenizer if offers(data, HasTokenizer) else None


def tell_finished(finished: set[int] | None, found: Collection[int], warning: str) -> None:
    """Tell the data module what is finished.

    Args:
        finished: the data module's set of what it leaves out, or None if it has none.
        found: what the set is to hold.
        warning: given if there is no set, and something to put into it.
    """
    if finished is not None:
        finished.clear()
        finished.update(found)
    elif found:
        rank_zero_warn(warning)


def check_min_usage(min_usage: float) -> None:
    """Refuse a share at which an evenly used codebook would be dead.

    Args:
        min_usage: in units of the even share 1/K.

    Raises:
        ValueError: for a share outside [0, 1).
    """
    if not 0 <= min_usage < 1:
        raise ValueError(f"Expected `min_usage` to be in [0, 1), in units of 1/K, but got {min_usage}.")
