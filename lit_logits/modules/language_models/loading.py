"""Causal language models of transformers: loaded or made, checked, and split into backbone and output layer.

Letters: B batch, T sequence, d hidden size, V vocabulary.
"""

import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lit_logits.modules.language_models.inspect import is_encoder
from lit_logits.modules.language_models.lora import has_lora
from lit_logits.modules.language_models.probes import (
    OutputRule,
    check_finite_weights,
    num_rows,
    probe_backbone,
    probe_causal_lm,
)
from lit_logits.modules.language_models.quantized import keep_order

__all__ = [
    "CausalBackbone",
    "ModelOrConfig",
    "Models",
    "PlainCausalLM",
    "check_plain_causal_lm",
    "check_trainable",
    "check_transformers_model",
    "is_plain_causal_lm",
    "load_backbone",
    "load_causal_lm",
    "load_plain_causal_lm",
    "make_config",
    "new_causal_lm",
]

# Code may pass a loaded model too. If the types said so at run time, the parser of recipes would offer to make a model
# of any class.
if TYPE_CHECKING:
    ModelOrConfig: TypeAlias = str | dict[str, Any] | PreTrainedModel
    Models: TypeAlias = Mapping[str, str] | Mapping[str, PreTrainedModel] | Mapping[str, str | PreTrainedModel]
else:
    ModelOrConfig, Models = str | dict[str, Any], dict[str, str]


# The common ones, to suggest one in place of a misspelt name.
_PRETRAINED_KWARGS = (
    *("dtype", "device_map", "max_memory", "offload_folder", "quantization_config", "attn_implementation"),
    *("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder", "variant"),
)


class CausalBackbone(NamedTuple):
    """Result of `load_backbone`.

    Attributes:
        model: module whose output has `last_hidden_state` (B, T, d), the input of the output layer.
        output_weight: (V, d) rows of the pretrained output layer, or None for a model that was built from a config.
        output_bias: (V,) bias of the pretrained output layer in nats, the architecture's factor included, or None.
        tied: whether output layer and input embedding were one tensor.
        hidden_size: d of the output layer.
        vocab_size: V of the output layer, padding included.
        generation_config: of the pretrained model, or None.
        rule: how the architecture makes logits. Its factors belong to the hidden states that another head reads, and
            its cap to the head.
    """

    model: PreTrainedModel
    output_weight: Tensor | None
    output_bias: Tensor | None
    tied: bool
    hidden_size: int
    vocab_size: int
    generation_config: Any = None
    rule: OutputRule = OutputRule()


class PlainCausalLM(NamedTuple):
    """Result of `load_plain_causal_lm`: the model, and how it makes logits of its last hidden states."""

    model: PreTrainedModel
    rule: OutputRule


def load_causal_lm(name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """Load a pretrained causal language model in float32.

    Args:
        name_or_path: hub id, local folder, or path of a `.gguf` file (needs the extra `gguf`).
        **kwargs: passed to `from_pretrained`.

    Raises:
        ValueError: If there is no such model, or a setting is misspelt or does not fit; the message says what was
            tried.
    """
    given = dict(kwargs)
    # `torch_dtype` is the old name. Without either transformers takes the dtype of the file, often bfloat16.
    kwargs["dtype"] = kwargs.pop("torch_dtype", None) or kwargs.get("dtype") or torch.float32
    path = os.path.expanduser(name_or_path)
    if isinstance(kwargs["dtype"], str) and kwargs["dtype"] != "auto" and not hasattr(torch, kwargs["dtype"]):
        raise ValueError(
            f"Expected `dtype` to be the name of one of torch, such as bfloat16, but got {kwargs['dtype']!r}."
        )
    try:
        if not path.endswith(".gguf"):
            loaded = AutoModelForCausalLM.from_pretrained(path, **kwargs)
            keep_order(loaded)
            return loaded
        model = _load_gguf(path, **kwargs)
    except TypeError as error:  # what `from_pretrained` does not know, it passes on to the class of the model
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in kwargs:
            raise
        raise ValueError(
            f"Expected settings of `from_pretrained` for {name_or_path!r}, but got {unknown[1]!r}"
            f"{_suggest(unknown[1], _PRETRAINED_KWARGS)}"
        ) from error
    except (AttributeError, ImportError, ValueError) as error:  # a package or a choice that a setting lacks
        if not given or str(error).startswith("Expected"):
            raise
        raise ValueError(
            f"Expected settings with which `from_pretrained` can load {name_or_path!r}, but got {given}: {error}"
        ) from error
    except OSError as error:
        raise ValueError(
            "Expected the model to be a hub id, a local folder, the path of a .gguf file or a mapping with"
            f" `model_type`, but got {name_or_path!r}, which could not be loaded: {error}"
        ) from error
    # The weights are dense now; saving and moving to another dtype would refuse otherwise.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    model.config._name_or_path = path  # transformers notes its folder
    return model


def _load_gguf(path: str, **kwargs: Any) -> PreTrainedModel:
    folder, file = os.path.split(path)
    if not os.path.isfile(path):
        raise FileNotFoundError("there is no such file.")
    try:
        return AutoModelForCausalLM.from_pretrained(folder or ".", gguf_file=file, **kwargs)
    except ImportError as error:
        raise ImportError(f'{error} GGUF files need `pip install -e ".[gguf]"` in a checkout of lit-logits.') from error
    except Exception as error:  # the parser raises errors of any kind on a file that is cut off or made up
        raise ValueError(
            f"Expected {path!r} to be the GGUF file of a language model that transformers knows, but reading it failed:"
            f" {type(error).__name__}: {error}"
        ) from error


def new_causal_lm(settings: dict[str, Any], vocab_size: int | None = None) -> PreTrainedModel:
    """Make a causal language model of random weights, output layer included.

    Args:
        settings: config as a mapping with `model_type`, any of transformers such as `llama`.
        vocab_size: V of the tokenizer; settings that have another are refused.

    Raises:
        ValueError: If the type does not have a setting, or is not that of a causal language model.
    """
    return _from_config(AutoModelForCausalLM, _make_causal_config(settings, vocab_size))


def load_plain_causal_lm(
    model: str | dict[str, Any] | PreTrainedModel,
    vocab_size: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> PlainCausalLM:
    """Load or make a causal language model whose logits follow from its output layer of its last hidden states.

    Args:
        model: as for `load_backbone`.
        vocab_size: V of the tokenizer, as there.
        kwargs: for `from_pretrained`, of a model that is named by its hub id or path.

    Raises:
        ValueError: If the model cannot be loaded or made, `check_plain_causal_lm` refuses it, or its training needs
            more than the cross-entropy; if there are settings and nothing to load by them.
    """
    if kwargs and not isinstance(model, str):
        raise ValueError(
            f"Expected settings of `from_pretrained` for a model that is named by its hub id or path, but got"
            f" {dict(kwargs)} for {'a config' if isinstance(model, dict) else type(model).__name__}. Leave them out."
        )
    if isinstance(model, dict):
        loaded = new_causal_lm(model, vocab_size)
        vocab_size = None  # the config has taken it over
    else:
        loaded = load_causal_lm(model, **(kwargs or {})) if isinstance(model, str) else model
        check_transformers_model(loaded)
        check_finite_weights(loaded)
    rule = check_plain_causal_lm(loaded, vocab_size=vocab_size)
    check_trainable(loaded.config)
    return PlainCausalLM(loaded, rule)


def load_backbone(backbone: str | dict[str, Any] | PreTrainedModel, *, vocab_size: int | None = None) -> CausalBackbone:
    """Split a causal language model into its backbone and its output layer.

    Args:
        backbone: hub id, local folder, `.gguf` path, a loaded model, or a config as a mapping with `model_type` (any
            of transformers, such as `llama`), which gives a model of random weights.
        vocab_size: V of the tokenizer. A config takes it over; a pretrained model must have at least as many rows (its
            table may be padded).

    Raises:
        ValueError: If the model cannot be loaded, has no output layer, changes the logits after it by more than a
            factor and a soft cap, or sees the tokens that follow; a mapping has no `model_type`, or the vocabulary does
            not fit.
    """
    if isinstance(backbone, dict):
        config = _make_causal_config(backbone, vocab_size)
        check_trainable(config)
        model = _from_config(AutoModel, config)
        rule, hidden_size, vocab_size = probe_backbone(model)
        return CausalBackbone(model, None, None, False, hidden_size, vocab_size, rule=rule)
    causal_lm, rule = load_plain_causal_lm(backbone, vocab_size)
    if causal_lm.config.model_type == "vq_logits":
        raise ValueError(
            "Expected an original model, whose output layer another head is to take the place of, but this one has a"
            " compressed head already. Train it further with `CausalLM`, go on from the checkpoint of the run that"
            " compressed it (`ckpt_path`), or compress its original again."
        )
    if has_lora(causal_lm):
        raise ValueError(
            f"Expected a backbone without adapters, but {type(causal_lm).__name__} has some, which an exported model"
            " could not hold. Merge them into the weights first, as peft's `merge_and_unload` and `save_merged` do."
        )
    output, table = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    weight = output.weight.detach()
    bias = getattr(output, "bias", None)
    if bias is not None and rule.cap is not None:
        raise ValueError(
            f"Expected an output layer without a bias, because {type(causal_lm).__name__} caps its logits at"
            f" {rule.cap:g}, bias included, while other heads add theirs after the cap."
        )
    return CausalBackbone(
        model=cast(PreTrainedModel, causal_lm.base_model),
        output_weight=weight,
        output_bias=None if bias is None else bias.detach() * rule.logit_scale,
        tied=output.weight is table.weight,
        hidden_size=weight.shape[1],
        vocab_size=weight.shape[0],
        generation_config=getattr(causal_lm, "generation_config", None),
        rule=rule,
    )


def check_plain_causal_lm(model: Any, *, vocab_size: int | None = None) -> OutputRule:
    """Return how a model makes logits of its last hidden states; raise unless its output layer does.

    Args:
        model: causal language model of transformers.
        vocab_size: V of the tokenizer; the output layer must have at least as many rows.

    Raises:
        ValueError: If the model has an encoder or no output layer, sees the tokens that follow, transforms hidden
            states before it or logits after it (but for a factor and a soft cap), or has too few rows.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"Expected a decoder-only language model, but {name} has an encoder. Take a causal one.")
    output = model.get_output_embeddings()
    if output is None:
        raise ValueError(f"Expected a causal language model with an output layer, but {name} has none.")
    rule = probe_causal_lm(model)
    rows = num_rows(output)
    if vocab_size is not None and vocab_size > rows:
        raise ValueError(
            f"Expected a backbone of at least {vocab_size} tokens, the vocabulary of the tokenizer, but its output"
            f" layer has {rows} rows. Use the tokenizer that belongs to the model."
        )
    return rule


def is_plain_causal_lm(model: Any) -> bool:
    """Return whether a model's logits are its output layer of its last hidden states, with no factor and no cap."""
    try:
        return check_plain_causal_lm(model) == OutputRule()
    except ValueError:
        return False


def check_transformers_model(model: Any) -> None:
    """Raise unless a model that was given as an object is one of transformers, not a wrapper around one.

    Raises:
        ValueError: If it is not.
    """
    if hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"Expected a model of transformers, but {type(model).__name__} is peft's wrapper around one. Pass"
            " `model.merge_and_unload()`; `GLDFusionModule` trains adapters by its argument `lora`."
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            "Expected a hub id, a folder, a `.gguf` path, a mapping with `model_type` or a model of transformers, but"
            f" got {type(model).__name__}."
        )


def check_trainable(config: Any) -> None:
    """Raise if training a model of this config needs more than the cross-entropy.

    Raises:
        ValueError: If its routers are to be trained by an auxiliary loss.
    """
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            f"Expected `output_router_logits: false`, but {config.model_type!r} sets it: the auxiliary loss of its"
            " routers is not part of the loss here. Set it to false in the config (`model.config` of a loaded model)."
        )


def make_config(settings: Mapping[str, Any]) -> Any:
    """Make a transformers config from a mapping with `model_type`.

    Special tokens outside the vocabulary are left out: a small vocabulary need not hold the type's default ids.

    Raises:
        ValueError: If there is no `model_type`, transformers does not know it, or it does not have a setting, which
            transformers would accept silently.

    Example:
        >>> make_config({"model_type": "llama", "hiden_size": 8})
        Traceback (most recent call last):
        ...
        ValueError: Expected settings of 'llama', but got 'hiden_size'. Did you mean 'hidden_size'?
    """
    own = dict(settings)
    model_type = own.pop("model_type", None)
    if model_type is None:
        raise ValueError(
            f"Expected a mapping with the key `model_type` (such as llama, gpt2, vit), but got the keys {sorted(own)}."
        )
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"Expected a `model_type` of transformers, but got {model_type!r}{_suggest(model_type, CONFIG_MAPPING)}"
        )
    config_class = CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), *getattr(config_class, "attribute_map", {}), *PreTrainedConfig().to_dict()}
    known |= {"num_labels", "id2label", "label2id"}
    for name in own:
        if name not in known:
            raise ValueError(f"Expected settings of {model_type!r}, but got {name!r}{_suggest(name, known)}")
    config = config_class(**own)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if hasattr(part, "vocab_size"):
            _leave_out_unknown_tokens(part)
    return config


def _leave_out_unknown_tokens(config: Any) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(config, name, None)
        if isinstance(given, list | tuple):
            kept: Any = [token for token in given if token < config.vocab_size] or None
        else:
            kept = None if isinstance(given, int) and given >= config.vocab_size else given
        if kept != given:
            try:
                setattr(config, name, kept)
            except StrictDataclassFieldValidationError:  # some types must have one
                setattr(config, name, 0)


def _from_config(kind: Any, config: Any) -> PreTrainedModel:
    """Make a model of random weights; settings that do not make one are told."""
    try:
        return kind.from_config(config)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected settings that make a model, but those of {config.model_type!r} do not: {type(error).__name__}:"
            f" {error}"
        ) from error


def _suggest(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), 1)
    return f". Did you mean {close[0]!r}?" if close else "."


def _make_causal_config(backbone: dict[str, Any], vocab_size: int | None) -> Any:
    settings = dict(backbone)
    known = CONFIG_MAPPING[settings["model_type"]] if settings.get("model_type") in CONFIG_MAPPING else None
    if vocab_size is not None and known is not None:
        own = settings
        if "text_config" in known.sub_configs and not hasattr(known(), "vocab_size"):  # text is a part of the model
            settings["text_config"] = own = dict(settings.get("text_config") or {})
        if own.get("vocab_size", vocab_size) != vocab_size:
            raise ValueError(
                f"Expected `backbone.vocab_size` to be the tokenizer's {vocab_size}, but got"
                f" {own['vocab_size']}. Leave it out."
            )
        own["vocab_size"] = vocab_size
    config = make_config(settings)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"Expected the `model_type` of a causal language model (such as llama, gpt2, qwen2), but got"
            f" {config.model_type!r}, which has an encoder."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and config.get_text_config() is not config:
        raise ValueError(
            f"Expected the `model_type` of a causal language model of text alone (such as llama, gpt2, qwen2), but got"
            f" {config.model_type!r}. That of its text is {config.get_text_config().model_type!r}."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or is_encoder(config):
        raise ValueError(
            f"Expected the `model_type` of a causal language model (such as llama, gpt2, qwen2), but got"
            f" {config.model_type!r}, whose tokens see those that follow. A BERT with `is_decoder: true` has another"
            " output layer; `bert-generation` with it is a causal language model."
        )
    return config
