"""Properties of a loaded transformers model: its layers, its output layer, its end tokens, its digest.

Letters: V vocabulary.
"""

import hashlib
import json
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_logits.modules.language_models.probes import check_causal, num_rows

__all__ = [
    "check_causal_lm",
    "digest_model",
    "eos_token_ids",
    "find_layers",
    "freeze_first_layers",
    "freeze_tables",
    "is_encoder",
    "model_label",
    "num_embeddings",
    "num_logits",
    "trained_model_name",
]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # of as many bytes


def eos_token_ids(model: PreTrainedModel) -> set[int]:
    """Return the ids that end the model's texts; empty if its configs name none."""
    config = model.generation_config
    ids = config.eos_token_id if config is not None else None
    if ids is None:
        ids = getattr(model.config.get_text_config(), "eos_token_id", None)
    return set() if ids is None else {int(i) for i in (ids if isinstance(ids, list) else [ids])}


def digest_model(model: PreTrainedModel) -> str:
    """Return a name for the model: 16 hexadecimal digits from its config and from every bit of every tensor.

    Of a tensor the bits of its values are summed over rows and over columns, as integers, whose sums depend neither on
    the order nor on the device: each value is part of two of them.
    """
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta":  # accelerate keeps these weights elsewhere
            bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
            table = bits.reshape(bits.shape[0] if bits.ndim else 1, -1)
            for dim in (0, 1):
                sha.update(table.sum(dim, dtype=torch.int64).cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def check_causal_lm(model: Any, label: str) -> None:
    """Raise unless `model`, called `label` in the error, is a causal decoder of transformers with its output layer.

    See `check_causal` for what it costs.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(model, nn.Module) and any("quantized.dynamic" in type(part).__module__ for part in model.modules()):
        raise ValueError(
            f"Expected {label} to be a causal language model, but torch has quantised it dynamically: scales are of a"
            " whole text, so that tokens depend on those that follow. Leave it dense, or load it by bitsandbytes"
            " (`quantization_config` of `from_pretrained`)."
        )
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ValueError(
            f"Expected {label} to be a causal language model of transformers, or the name of one, but got"
            f" {model_label(model)}."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"Expected {label} to be decoder-only, but {type(model).__name__} has an encoder.")
    # In 8 bits bitsandbytes leaves columns dense that are large anywhere in a text: what follows is seen a little.
    if not _is_8bit(model):
        check_causal(model, label)


def _is_8bit(model: PreTrainedModel) -> bool:
    settings = getattr(model.config, "quantization_config", None) or {}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    return bool(settings.get("load_in_8bit"))


def model_label(model: Any) -> str:
    """Return what errors call a model that was given: its name, or its class."""
    return repr(model) if isinstance(model, str) else type(model).__name__


def num_logits(model: PreTrainedModel) -> int:
    """Return the number of rows of the output layer, padding included."""
    return num_rows(model.get_output_embeddings())


def num_embeddings(model: PreTrainedModel) -> int:
    """Return the number of rows of the input table, padding included; token ids are below it."""
    return int(cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0])


_ENCODERS = {"bert", "roberta", "electra", "xlm-roberta", "camembert", "rembert", "roformer", "megatron-bert", "ernie"}


def find_layers(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """Find the layers of a backbone, its longest `nn.ModuleList`.

    Returns:
        The module that holds the list, and the list, which is empty if the backbone has none.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Identity(), nn.Identity()]))
        >>> parent, layers = find_layers(model)
        >>> parent is model, len(layers)
        (True, 2)
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    name, layers = max(lists, key=lambda item: len(item[1]), default=("", nn.ModuleList()))
    return model.get_submodule(name.rpartition(".")[0]), layers


def freeze_first_layers(model: nn.Module, num_trainable: int) -> list[nn.Module]:
    """Freeze all but the last layers and the norm after them; with 0 layers, the norm too.

    Args:
        model: backbone; see `find_layers`.
        num_trainable: how many of the last layers to train; 0 freezes everything.

    Returns:
        Modules that are frozen as a whole, to be kept in `eval` mode: no dropout where nothing learns.

    Raises:
        ValueError: If there are fewer layers, or the model has no list of layers.
    """
    parent, layers = find_layers(model)
    if not 0 <= num_trainable <= len(layers):
        raise ValueError(
            f"Expected `num_trainable_layers` to be in [0, {len(layers)}], the layers of {type(model).__name__}, but"
            f" got {num_trainable}."
        )
    model.requires_grad_(False)
    if num_trainable == 0:
        return [model]
    frozen = list(layers[: len(layers) - num_trainable])
    layers[len(layers) - num_trainable :].requires_grad_(True)
    for name, child in parent.named_children():
        if child is layers:
            continue
        # The norm beside the layers is the last one; that of an embedding comes before them.
        if "norm" in type(child).__name__.lower() and "emb" not in name:
            child.requires_grad_(True)
        else:
            frozen.append(child)
    return frozen


def freeze_tables(model: PreTrainedModel) -> None:
    """Freeze the input table and the output layer, which may be one."""
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.requires_grad_(False)


def is_encoder(config: Any) -> bool:
    """Return whether a model of this config reads in both directions: BERT and its like, unless `is_decoder` is set."""
    return config.model_type in _ENCODERS and not getattr(config, "is_decoder", False)


def trained_model_name(module: nn.Module) -> str | None:
    """Return the name of the model of transformers in a module that is trained, or None if there is none.

    It has an output layer, and is the first in the order of `modules()` with parameters in training, or else the first.
    """
    found = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, PreTrainedModel) and (part.can_generate() or part.base_model is not part)
    }
    trained = [name for name, model in found.items() if any(p.requires_grad for p in model.parameters())]
    return next(iter([*trained, *found]), None)
