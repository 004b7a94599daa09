"""Experts that are adapters of peft: merged into a copy of the model that they adapt."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

__all__ = ["is_adapter_folder", "load_adapted", "merged_copy", "without_adapters_of"]


def is_adapter_folder(name: str) -> bool:
    """Return whether a local folder holds adapters, as `PeftModel.save_pretrained` writes them."""
    return Path(name).expanduser().joinpath("adapter_config.json").is_file()


def load_adapted(base: PreTrainedModel, folder: str, label: str) -> PreTrainedModel:
    """Return a copy of the base with the adapters of a folder merged into its weights.

    Args:
        base: the model that they adapt; stays as it is.
        folder: of the adapters.
        label: what errors call them.

    Raises:
        ValueError: If peft is missing, or the adapters are damaged, do not fit the base or cannot be merged.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(
            f"Expected peft, which the adapters {folder!r} need, but it is missing. Install it in a checkout of"
            ' lit-logits: pip install -e ".[peft]"'
        ) from error
    try:
        adapted = PeftModel.from_pretrained(deepcopy(base), str(Path(folder).expanduser()))
    except Exception as error:  # files that are damaged, and adapters of other layers, raise errors of any kind
        raise ValueError(
            f"Expected {label} to be adapters of the base, {type(base).__name__}, but {folder!r} could not be loaded:"
            f" {type(error).__name__}: {error}"
        ) from error
    return _merge(adapted, label)


def merged_copy(model: Any, label: str) -> Any:
    """Return a model of peft with its adapters merged into a copy; any other model as it is.

    Raises:
        ValueError: If the adapters are no weights, such as those of prompt tuning.
    """
    return _merge(deepcopy(model), label) if _is_peft_model(model) else model


def without_adapters_of(base: Any, experts: Sequence[Any]) -> Any:
    """Return a base as it was before peft put adapters into it, where it is also inside of an expert; else itself.

    `get_peft_model(base, ...)` changes the model that it is given: base and expert would give the same logits.
    """
    for expert in _flat(experts):
        if _is_peft_model(expert) and expert.get_base_model() is base:
            return deepcopy(expert).unload()
    return base


def _is_peft_model(model: Any) -> bool:
    return isinstance(model, nn.Module) and hasattr(model, "get_base_model")


def _flat(experts: Sequence[Any]) -> Iterator[Any]:
    for expert in experts:
        yield from expert if isinstance(expert, Sequence) and not isinstance(expert, str) else [expert]


def _merge(model: Any, label: str) -> PreTrainedModel:
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"Expected adapters that can be merged into weights, such as LoRA, but those of {label} are"
            f" {type(model.active_peft_config).__name__}. Fine-tune an expert with LoRA, or as a whole."
        )
    return cast(PreTrainedModel, model.merge_and_unload())
