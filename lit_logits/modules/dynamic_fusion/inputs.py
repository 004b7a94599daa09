"""What fused models are given: prompts in the forms of transformers, ids and lengths that all models can take, weights.

Letters: B batch, T sequence, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

__all__ = [
    "check_context",
    "check_generation",
    "check_ids",
    "check_static_alpha",
    "context_of",
    "given_prompts",
    "prompt_mask",
]

_STRETCHED = ("linear", "dynamic")  # kinds of scaled positions whose config still tells the length before


def given_prompts(input_ids: Any, attention_mask: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return ids and mask of the prompts of a `generate`, in whatever form of transformers they came.

    Args:
        input_ids: (B, T), or a mapping with them, as tokenizers return; None if they are called `inputs`.
        attention_mask: (B, T) or None; a `GenerationConfig` in its place, as `generate` takes it, moves to `kwargs`.
        kwargs: of `generate`; `inputs` is taken out.

    Raises:
        ValueError: If there are no prompts, or two.
    """
    inputs = kwargs.pop("inputs", None)
    if (input_ids is None) == (inputs is None):
        number = "none" if inputs is None else "both"
        raise ValueError(f"Expected prompts as `input_ids` or as `inputs`, but got {number}.")
    given = inputs if input_ids is None else input_ids
    if isinstance(attention_mask, GenerationConfig):
        kwargs["generation_config"], attention_mask = attention_mask, None
    if isinstance(given, Mapping):
        attention_mask = given.get("attention_mask") if attention_mask is None else attention_mask
        given = given["input_ids"]
    return given, attention_mask


def prompt_mask(inputs: Mapping[str, Any], prompts: Tensor) -> Tensor:
    """Return the mask (B, P) of prompts as `generate` has it, which infers it from padding where none is given.

    A prompt of padding alone is taken as it is.

    Args:
        inputs: arguments of a call of the large model within `generate`.
        prompts: (B, P) ids.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(prompts)
    mask = mask[:: len(mask) // len(prompts), : prompts.shape[1]]
    return torch.where(mask.any(1, keepdim=True), mask, 1)


def check_generation(config: Any, generation: Mapping[str, Any]) -> None:
    """Refuse names that `generate` would ignore, before anything runs.

    Raises:
        ValueError: If there is one that the config of `generate` does not have.
    """
    known = config.to_dict()
    for name in generation:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"Expected `generation` to hold arguments of `generate`, but got {name!r}.{hint}")


def check_ids(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> Tensor:
    """Return the mask (B, T), default all 1; refuse ids and shapes that do not fit.

    Raises:
        ValueError: If shapes differ, there is no text, one is empty or an id is not below `vocab_size`.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"Expected `input_ids` of shape (B, T), but got {tuple(input_ids.shape)}.")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"Expected `attention_mask` of the shape of `input_ids`, {tuple(input_ids.shape)}, but got"
            f" {tuple(mask.shape)}."
        )
    if len(input_ids) == 0:
        raise ValueError(f"Expected at least one text, but got `input_ids` of shape {tuple(input_ids.shape)}.")
    empty = mask.sum(1) == 0
    if input_ids.numel() == 0 or bool(empty.any()):
        row = int(empty.nonzero()[0]) if input_ids.numel() else 0
        raise ValueError(f"Expected texts of at least one token, but text {row} of the batch is empty.")
    highest = int(input_ids.max())
    if highest >= vocab_size:
        raise ValueError(f"Expected `input_ids` below {vocab_size}, the common vocabulary, but got {highest}.")
    return mask


def check_context(models: Mapping[str, PreTrainedModel], mask: Tensor, new_tokens: int = 0) -> None:
    """Raise for texts that a model cannot read to their end.

    Args:
        models: by what errors call them.
        mask: (B, T), 0 at padding.
        new_tokens: how many are to be added.

    Raises:
        ValueError: If a text is longer than the context of a model; it names both.
    """
    lengths = mask.sum(1)
    row, longest = int(lengths.argmax()), int(lengths.max())
    for label, model in models.items():
        context = context_of(model.config)
        if context is not None and context < longest + new_tokens:
            raise ValueError(
                f"Expected at most {context} tokens, the context of the {label}, but text {row} of the batch"
                f" has {longest}" + (f" and {new_tokens} are to be added." if new_tokens else ".")
            )


def context_of(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model can read, or None if its config does not tell."""
    config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int) or context <= 0:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    return int(context * float(scaling.get("factor", 1.0))) if kind in _STRETCHED else context


def check_static_alpha(alpha: float | Sequence[float] | None, num_experts: int) -> list[float] | None:
    """Return fixed weights, one for each expert, of a number for all or a list; None stays None.

    Raises:
        ValueError: If one is not finite, or their number is another.
    """
    if alpha is None:
        return None
    values = [float(alpha)] * num_experts if isinstance(alpha, int | float) else [float(value) for value in alpha]
    if len(values) != num_experts or not all(abs(value) < float("inf") for value in values):
        raise ValueError(
            f"Expected `static_alpha` to be a finite number, or one for each of {num_experts} expert(s), but got"
            f" {alpha}."
        )
    return values
