"""Weights that bitsandbytes has quantised: found, left out of checkpoints, and made dense to be saved."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["dense_weights", "keep_order", "keep_out_of_checkpoints", "quantized_layers"]

_KINDS = ("Params4bit", "Int8Params")


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose weights are quantised, by their names."""
    weights = ((name, layer, layer._parameters.get("weight")) for name, layer in model.named_modules())
    return {name: layer for name, layer, weight in weights if type(weight).__name__ in _KINDS}


def keep_order(model: nn.Module) -> None:
    """Keep bitsandbytes from re-ordering weights of 4 bits when a model is evaluated on a CPU.

    Of release 0.50 the order is not undone rightly where a processor has AVX-512 for bfloat16: weights change.
    """
    for layer in quantized_layers(model).values():
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@torch.no_grad()
def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of layers of 4 bits, as dense as they were, on the CPU, by the names of the plain model."""
    layers = quantized_layers(model)
    return {f"{name.removesuffix('.base_layer')}.weight": _dense(layer) for name, layer in layers.items()}


def keep_out_of_checkpoints(model: nn.Module) -> None:
    """Leave quantised weights, which do not change, out of the state dict of a model, and take its own when it loads.

    bitsandbytes writes them in a form that a loaded model does not read.
    """
    for layer in quantized_layers(model).values():
        layer.register_state_dict_post_hook(_leave_out)
        layer.register_load_state_dict_pre_hook(_put_in)


def _leave_out(layer: nn.Module, state_dict: dict[str, Any], prefix: str, _: Mapping[str, Any]) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}weight")]:
        del state_dict[key]


def _put_in(layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict[f"{prefix}weight"] = layer.weight.data


def _dense(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).cpu()
