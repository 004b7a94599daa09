"""Look-ups and checks that several callbacks share: parts of the model, what the data module offers, arguments."""

import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_logits.contracts import CodingHead, HasClassNames, offers
from lit_logits.contracts.checks import data_tokenizer

__all__ = [
    "TrainedSoFar",
    "averaged_weights",
    "averaging_callback",
    "check_at_least",
    "check_min_usage",
    "data_class_names",
    "data_module",
    "data_tokenizer",
    "find_part",
    "find_parts",
    "on_rank_zero",
    "shown_class_names",
    "swap_averages",
    "tell_finished",
    "trained_so_far",
    "uncoded_heads",
]

_Part = TypeVar("_Part")  # a class of modules, or a contract of heads
_Result = TypeVar("_Result")


def find_parts(pl_module: LightningModule, kind: type[_Part]) -> list[_Part]:
    """Return all parts of the model that are a `kind`, in the order of `modules()`."""
    return [module for module in pl_module.modules() if isinstance(module, kind)]


def find_part(pl_module: LightningModule, kind: type[_Part]) -> _Part | None:
    """Return the first part of the model that is a `kind`, or None.

    Callbacks find what they serve by the type of a part, never by the class of the LightningModule, so that they also
    serve a user's own.

    Example:
        >>> from torch import nn
        >>> class Mine(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.Sequential(nn.Tanh(), nn.Linear(2, 3))
        >>> find_part(Mine(), nn.Linear)
        Linear(in_features=2, out_features=3, bias=True)
    """
    return next((module for module in pl_module.modules() if isinstance(module, kind)), None)


def uncoded_heads(pl_module: LightningModule) -> list[CodingHead]:
    """Return the heads whose tokens still own vectors, and so cannot be saved in codes."""
    return [head for head in find_parts(pl_module, CodingHead) if head.has_own_vectors]


def data_module(trainer: Trainer) -> object:
    """Return the data module of the run, or None where loaders were given."""
    return getattr(trainer, "datamodule", None)  # which Lightning sets and does not declare


def data_class_names(trainer: Trainer) -> Sequence[str] | None:
    """Return the names of the classes that the data module tells, or None without them."""
    data = data_module(trainer)
    return data.class_names if offers(data, HasClassNames) else None


def shown_class_names(trainer: Trainer, num_classes: int) -> list[str]:
    """Return the names of the classes for a picture: those of the data module if they fit, else their numbers."""
    names = data_class_names(trainer)
    return [str(name) for name in (range(num_classes) if names is None or len(names) != num_classes else names)]


class TrainedSoFar(NamedTuple):
    """Result of `trained_so_far`: the epoch, and the optimizer steps taken."""

    epoch: int
    step: int


def trained_so_far(trainer: Trainer) -> TrainedSoFar:
    """Return how far the weights at hand have been trained, for the titles and steps of pictures.

    Outside of fit Lightning's own counters are not those of the checkpoint that it has loaded: they stand at 0. The
    checkpoint's are read from its file, of which tensors are not read. A file that cannot be read so, as the folder of
    a sharded checkpoint, gives Lightning's.
    """
    own = TrainedSoFar(trainer.current_epoch, trainer.global_step)
    if trainer.state.fn == TrainerFn.FITTING or trainer.ckpt_path is None:
        return own
    try:
        saved = torch.load(trainer.ckpt_path, map_location="cpu", weights_only=True, mmap=True)
        return TrainedSoFar(saved["epoch"], saved["global_step"])
    except (OSError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError):
        return own


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


def averaging_callback(trainer: Trainer) -> str | None:
    """Return the name of a callback that averages weights over training, or None."""
    kinds = (WeightAveraging, StochasticWeightAveraging)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((type(callback).__name__ for callback in callbacks if isinstance(callback, kinds)), None)


def swap_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Exchange the weights of the model and their averages, if a `WeightAveraging` keeps some, as validations do."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback.on_validation_epoch_start(trainer, pl_module)


@contextmanager
def averaged_weights(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Have the averages in the model that validations measure, if a `WeightAveraging` keeps some."""
    swap_averages(trainer, pl_module)
    try:
        yield
    finally:
        swap_averages(trainer, pl_module)


def on_rank_zero(trainer: Trainer, function: Callable[[], _Result]) -> _Result:
    """Call `function` on rank zero and return its result on all ranks; all must call this.

    Where it raises, all ranks raise: the others would wait for rank zero for ever.

    Raises:
        ValueError: If `function` raises one.
        RuntimeError: If it raises anything else, and there are several ranks.
    """
    outcome: tuple[Any, Exception | None] = None, None
    if trainer.is_global_zero:
        try:
            outcome = function(), None
        except Exception as error:  # of any kind, such as that of a full disk
            if trainer.world_size == 1:
                raise
            known = isinstance(error, ValueError)
            outcome = None, error if known else RuntimeError(f"{type(error).__name__}: {error}")
    result, problem = trainer.strategy.broadcast(outcome)
    if problem is not None:
        raise problem
    return result


def check_at_least(minimum: int, **arguments: int) -> None:
    """Raise unless every argument, given by its name, is at least `minimum`.

    Data modules have a function of their own, as they import nothing from the rest of the library.

    Raises:
        ValueError: If one is less; the first is named.

    Example:
        >>> check_at_least(1, every_n_steps=0)
        Traceback (most recent call last):
        ...
        ValueError: Expected `every_n_steps` to be at least 1, but got 0.
    """
    for name, value in arguments.items():
        if value < minimum:
            raise ValueError(f"Expected `{name}` to be at least {minimum}, but got {value}.")


def check_min_usage(min_usage: float) -> None:
    """Raise for a share at which an evenly used codebook would be dead.

    Args:
        min_usage: in units of the even share 1/K.

    Raises:
        ValueError: If it is outside [0, 1).
    """
    if not 0 <= min_usage < 1:
        raise ValueError(f"Expected `min_usage` to be in [0, 1), in units of 1/K, but got {min_usage}.")
