"""Low-rank adapters (LoRA) in a causal language model of transformers, and their sum with the weights that they adapt.

These may be quantised to 4 bits by bitsandbytes (QLoRA); in the sum they are dense again.

Letters: W weight of a layer, A (r, in) and B (out, r) its adapter, s its scaling.
"""

import copy
import re
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_logits.functional.reductions import at_least_float32
from lit_logits.modules.language_models.quantized import dense_weights, keep_out_of_checkpoints, quantized_layers

__all__ = ["add_lora", "has_lora", "merged_state_dict", "save_merged"]

# Settings of peft's LoraConfig whose adapters can be merged: W + s·B·A is a weight of the same architecture.
_SETTINGS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
)

# Prefixes that FSDP and activation checkpointing put into the names of modules, but not into those of state dicts.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def add_lora(model: PreTrainedModel, settings: Mapping[str, Any]) -> PreTrainedModel:
    """Put LoRA adapters [0] into the layers of a model, in place, and train nothing else.

    y = W x + s·B·A·dropout(x); B starts at zero, so the model computes what it did before. It stays the same object
    with the same `base_model`, `get_output_embeddings` and `generate`. Its state dict has other names, which
    `merged_state_dict` turns back, and lacks weights that are quantised: these are loaded with the model.

    Args:
        model: causal language model of transformers; frozen but for the adapters.
        settings: of peft's `LoraConfig`: `r`, `lora_alpha` (s = lora_alpha / r), `lora_dropout`, `target_modules` (ends
            of the names of layers, a pattern, or `all-linear`; default peft's choice for the architecture),
            `exclude_modules`, `layers_to_transform`, `layers_pattern`, `rank_pattern`, `alpha_pattern`, `use_rslora`,
            `init_lora_weights`.

    Returns:
        The model.

    Raises:
        ValueError: If a setting is unknown, peft is missing, the model has adapters already, or a target does not
            exist, is neither linear nor an embedding, or has a weight that is tied to another layer's.

    References:
        [0]: LoRA: low-rank adaptation of large language models, 2021, arXiv 2106.09685.

    Example:
        >>> from lit_logits.modules import new_causal_lm
        >>> small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> llama = new_causal_lm({"model_type": "llama", "vocab_size": 9, **small})
        >>> add_lora(llama, {"lora_aplha": 8})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: Expected `lora` to have the settings ['r', ...], but got 'lora_aplha'. Did you mean 'lora_alpha'?
    """
    for name in settings:
        if name not in _SETTINGS:
            close = get_close_matches(name, _SETTINGS, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"Expected `lora` to have the settings {list(_SETTINGS)}, but got {name!r}.{hint}")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            "Expected peft, which `lora` needs, but it is missing. Install it in a checkout of lit-logits: pip install"
            ' -e ".[peft]"'
        ) from error
    if has_lora(model):
        raise ValueError(f"Expected a model without adapters, but {type(model).__name__} has some.")
    tied = _tied_names(model)
    # transformers' own `add_adapter` would make `save_pretrained` write the adapters alone.
    _check_targets(model, settings.get("target_modules"))
    try:
        inject_adapter_in_model(LoraConfig(**settings), model)
    except ValueError as error:  # without `target_modules`, or none that `exclude_modules` and such leave
        raise ValueError(
            f"Expected `lora` to name layers of {type(model).__name__}, which has {_layer_names(model)}, but got"
            f" {dict(settings)}: {error}"
        ) from error
    _check_layers(model, tied)
    keep_out_of_checkpoints(model)
    return model


def has_lora(model: nn.Module) -> bool:
    """Return whether there are adapters in a model.

    Example:
        >>> has_lora(nn.Linear(2, 2))
        False
    """
    return bool(_adapted_layers(model))


def merged_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the state dict of a model's plain architecture, with adapters added to the weights: W + s·B·A.

    The model stays as it is. A merged weight is summed in float32 at least, layer by layer, has W's dtype and is on the
    CPU; so is one that was quantised. All others are the model's own tensors.

    Args:
        model: with or without adapters, also inside FSDP's wrappers.
        state_dict: the weights, if a strategy gathered them; None takes the model's.

    Raises:
        ValueError: If the model has adapters that `add_lora` does not make.
    """
    _check_layers(model)
    layers = _adapted_layers(model)
    merged: dict[str, Tensor] = {}
    adapters: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for key, value in (model.state_dict() if state_dict is None else state_dict).items():
        layer, rest = _split(key, layers)
        if not layer:
            merged[key] = value
        elif rest.startswith("base_layer."):
            merged[f"{layer}.{rest.removeprefix('base_layer.')}"] = value
        else:
            adapters[layer][rest] = value
    merged |= dense_weights(model)
    for name, layer in layers.items():
        merged[f"{name}.weight"] = _merge(layer, merged[f"{name}.weight"], adapters[name])
    return merged


def save_merged(model: PreTrainedModel, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write a model in its plain architecture, for `from_pretrained`; adapters are merged into the weights.

    Args:
        model: with or without adapters; stays as it is.
        folder: to write to.
        state_dict: the weights, if a strategy gathered them; None takes the model's.

    Raises:
        ValueError: If the model has adapters that `add_lora` does not make.
    """
    saved: Any = model
    if has_lora(model):
        state_dict = merged_state_dict(model, state_dict)
        saved = copy.copy(model)
        saved._hf_peft_config_loaded = False  # set by transformers' `add_adapter`; it would save the adapters alone
        if quantized_layers(model):
            saved.config, saved.hf_quantizer = copy.copy(model.config), None
            del saved.config.quantization_config
    saved.save_pretrained(folder, state_dict=state_dict)


# ---------------------------------------------------------------------- adapted layers


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers of peft by their names in a state dict."""
    if "peft" not in sys.modules:  # then there are no adapters, and its slow import is not worth the wait
        return {}
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ImportError:
        return {}
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return {_plain(name): module for name, module in model.named_modules() if isinstance(module, kinds)}


def _layer_names(model: nn.Module) -> list[str]:
    """Return the last parts of the names of the layers that may have adapters, in their order."""
    from peft.tuners.lora import layer as lora

    kinds = (nn.Linear, nn.Embedding, lora.Conv1D)
    return list(dict.fromkeys(name.rpartition(".")[2] for name, one in model.named_modules() if isinstance(one, kinds)))


def _check_targets(model: nn.Module, targets: Any) -> None:
    """Raise if one of the targets is no module: peft raises only if none of them is.

    Raises:
        ValueError: If there is such a target.
    """
    if targets is None or targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    for target in [targets] if isinstance(targets, str) else targets:
        ends = [name for name in names if name == target or name.endswith(f".{target}")]
        if not ends and not (isinstance(targets, str) and any(re.fullmatch(target, name) for name in names)):
            known = _layer_names(model)
            close = get_close_matches(target, known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"Expected `target_modules` to be of the layers {known} of {type(model).__name__}, or 'all-linear', but"
                f" got {target!r}.{hint}"
            )


def _plain(name: str) -> str:
    name = f"{name}."
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name[:-1]


def _split(key: str, layers: Mapping[str, Any]) -> tuple[str, str]:
    """Split a name of a state dict into the adapted layer that it belongs to, or "", and the rest."""
    parts = key.split(".")
    for at in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:at])
        if name in layers:
            return name, ".".join(parts[at:])
    return "", key


@torch.no_grad()
def _merge(layer: Any, weight: Tensor, adapters: Mapping[str, Tensor]) -> Tensor:
    """Return W + s·B·A of the active adapters; embeddings and GPT-2's layers hold W transposed, so they add (B·A)ᵀ."""
    total = at_least_float32(weight)
    for name in layer.active_adapters:
        if name in layer.merged_adapters:  # peft has added it to W already
            continue
        is_embedding = f"lora_embedding_A.{name}" in adapters
        a = adapters[f"lora_embedding_A.{name}" if is_embedding else f"lora_A.{name}.weight"]
        b = adapters[f"lora_embedding_B.{name}" if is_embedding else f"lora_B.{name}.weight"]
        product = b.to(total) @ a.to(total)
        total = total + layer.scaling[name] * (product.T if is_embedding or layer.fan_in_fan_out else product)
    return total.to(weight.dtype).cpu()


def _tied_names(model: PreTrainedModel) -> set[str]:
    """Return the names of modules that share their weight with another."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _check_layers(model: nn.Module, tied: set[str] | frozenset[str] = frozenset()) -> None:
    """Refuse adapters that cannot be added to one weight."""
    layers = _adapted_layers(model)
    if not layers:
        return
    from peft.tuners.lora import layer as lora

    for name, layer in layers.items():
        has_more = any(getattr(layer, more, None) for more in ("lora_variant", "lora_magnitude_vector"))  # DoRA's
        has_more = has_more or any(getattr(layer, "lora_bias", {}).values())
        is_4bit = type(layer).__name__ == "Linear4bit"
        if (type(layer) not in (lora.Linear, lora.Embedding) and not is_4bit) or has_more:  # such as experts
            raise ValueError(
                f"Expected LoRA on linear layers and embeddings, W + s·B·A, but {name!r} is {type(layer).__name__} with"
                " something else, which could not be merged. Choose other `target_modules`."
            )
        if name in tied:
            raise ValueError(
                f"Expected `target_modules` to leave out weights that two layers share, but got {name!r}, whose adapter"
                " could not be merged into both."
            )
