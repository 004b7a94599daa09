"""Weights in files of several formats, read as data."""

import argparse
import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["read_weights", "with_metadata"]

# Keys under which training loops save a state dict, in the order in which they are tried.
_WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "net", "student", "weights")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file by name: `.safetensors`, or a file of `torch.save`, of which only data is unpickled.

    Raises:
        ValueError: If there is no such file, it holds no tensors, or unpickling it would run code.
    """
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise ValueError(
            f"Expected a file of weights, but {str(path)!r} is not there. A teacher is trained with `method: ce`, as in"
            " dual_head_kd_teacher.yaml."
        )
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options that hand-written loops save
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Expected {str(path)!r} to hold tensors and plain data, but loading it would run code of its author. If"
            f" you trust it, load it with `weights_only=False` and save its `state_dict` again. {error}"
        ) from error
    except (EOFError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(
            f"Expected {str(path)!r} to be a file of `torch.save`, but reading it failed: {error}"
        ) from error
    # Dicts are entered before tensors are looked for: beside the weights there may be an accuracy that is a tensor.
    while isinstance(loaded, dict):
        inner = next((key for key in _WEIGHT_KEYS if isinstance(loaded.get(key), dict)), None)
        if inner is None:
            tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
            if tensors:
                return with_metadata(tensors, getattr(loaded, "_metadata", {}))
            break
        loaded = loaded[inner]
    raise ValueError(f"Expected {str(path)!r} to hold a state dict, but found {type(loaded).__name__} without tensors.")


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Expected {str(file)!r} to be a file of safetensors, but reading it failed: {error}"
        ) from error


def with_metadata(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors as a state dict that tells versions: by them some modules know how to read their tensors."""
    state = OrderedDict(tensors)
    state._metadata = metadata  # type: ignore[attr-defined]
    return state
