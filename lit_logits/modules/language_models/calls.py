"""Calls of transformers' models by the argument names that their `forward` has.

The key–value cache has two names: `cache` since transformers 5.24; `past_key_values` before, and in other models.

Letters: B batch, T sequence, N positions that predict a token that counts, d hidden size.
"""

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lit_logits.functional.labels import next_token_labels
from lit_logits.functional.reductions import true_places

__all__ = [
    "CACHE_NAMES",
    "OUTPUT_CACHE_NAME",
    "CountedStates",
    "accepted_inputs",
    "cache_argument",
    "check_left_padding",
    "counted_states",
    "read_with_cache",
    "takes_positions",
    "text_inputs",
]

CACHE_NAMES = ("cache", "past_key_values")

# Outputs are classes of transformers, so the installed version alone decides.
OUTPUT_CACHE_NAME = next(
    name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)}
)


def accepted_inputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that the model's `forward` has arguments for, on its device; None is left out.

    It is meant for inputs that a model can do without, such as position ids, which some models find by themselves. A
    cache is not one of them; see `cache_argument`.
    """
    known = _parameters(model)
    chosen = {name: value for name, value in inputs.items() if name in known and value is not None}
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in chosen.items()}


def text_inputs(model: Any, attention_mask: Tensor | None, position_ids: Tensor | None) -> dict[str, Any]:
    """Return the inputs of a model that reads whole texts, beside their ids; on its device, and without a cache.

    Several texts may be packed into a row, told apart by position ids that begin anew. transformers then keeps them
    apart where no mask is given, so one of ones is left out. A warning tells of models that would mix them.

    Args:
        model: of transformers.
        attention_mask: (B, T), 0 at padding; None is all 1.
        position_ids: (B, T), or None.
    """
    if position_ids is not None:
        attends = "position_ids" in _parameters(model) and not getattr(model, "_is_stateful", False)
        if not attends and bool(((position_ids[:, 1:] == 0) & (position_ids[:, :-1] > 0)).any()):
            warnings.warn(
                f"Several texts are packed into a row, but {type(model).__name__} reads a row as one text: it takes no"
                " position ids, or remembers what it read. Give each text a row of its own.",
                stacklevel=2,
            )
        if attends and attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
    given = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
    return accepted_inputs(model, given)


class CountedStates(NamedTuple):
    """Result of `counted_states`.

    Attributes:
        mask: (B, T) positions that predict a token that counts.
        hidden: (N, d) last hidden states there.
        labels: (N,) int64 the tokens to predict.
    """

    mask: Tensor
    hidden: Tensor
    labels: Tensor


def counted_states(model: PreTrainedModel, batch: Mapping[str, Any]) -> CountedStates:
    """Run a causal language model up to its output layer, and keep the positions that predict a token that counts.

    The output layer is left to the caller, who can apply it in chunks, so that (B, T, V) logits are never whole.

    Args:
        model: causal language model.
        batch: `input_ids` and `labels` (B, T), optionally `attention_mask` and `position_ids` (B, T), which a model
            without an argument for them does not get, and `correct` (B,).
    """
    backbone = cast(PreTrainedModel, model.base_model)
    inputs = text_inputs(backbone, batch.get("attention_mask"), batch.get("position_ids"))
    output = backbone(**accepted_inputs(backbone, {"input_ids": batch["input_ids"]}), **inputs)
    # A batch of multiple-choice questions holds every choice; only the right ones are learned.
    labels, mask = next_token_labels(batch["labels"], keep=batch.get("correct"))
    rows = true_places(mask)  # once, as the host waits to learn how many there are
    hidden = output.last_hidden_state.flatten(0, 1)
    return CountedStates(mask, hidden[rows.to(hidden.device)], labels.flatten()[rows].long())


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return a key–value cache under the name that the model's `forward` has for it.

    Raises:
        ValueError: If the model takes no cache.
    """
    known = _parameters(model)
    for name in CACHE_NAMES:
        if name in known:
            return {name: cache}
    raise ValueError(
        f"Expected a model whose `forward` takes a key–value cache, as `cache` or `past_key_values`, but that of"
        f" {type(model).__name__} takes {sorted(known)}. Decode with a model that has one, or with `use_cache=False`"
        " where that is offered."
    )


def read_with_cache(model: nn.Module, inputs: Mapping[str, Any], cache: Any, *, num_read: int) -> tuple[Any, Any]:
    """Call a model on further tokens, after those that its cache holds.

    Args:
        model: of transformers.
        inputs: `input_ids` (B, T) of the tokens to read, and other inputs that the model may take.
        cache: of the tokens before, as the last call gave it; None at the start.
        num_read: how many tokens a sequence the cache is to hold after the call, padding included. The mask is (B, that
            number); a cache of recurrent states, which do not know their padding any more, gets its part of new tokens.

    Returns:
        The model's output, and its cache.

    Raises:
        ValueError: If the model takes or gives no cache, is recurrent and gets several tokens at once, or its cache
            does not hold all that was read: the next token would then depend on a part of the text only.
    """
    given = cache
    new = inputs["input_ids"].shape[1]
    if given is not None and _length(given) is None:
        if new > 1:  # mamba would begin anew
            raise ValueError(
                f"Expected one token at a time for {type(model).__name__}, which is recurrent, but got {new}. Decode"
                " without drafts."
            )
        mask = inputs.get("attention_mask")
        inputs = {**inputs, "attention_mask": None if mask is None else mask[:, -new:]}
    output = model(**accepted_inputs(model, {**inputs, "use_cache": True}), **cache_argument(model, given))
    cache = getattr(output, OUTPUT_CACHE_NAME, None)
    if cache is None:
        raise ValueError(
            f"Expected {type(model).__name__} to give a key–value cache, but its output has {list(output)}. Decode"
            " with a model that has one, or with `use_cache=False` where that is offered."
        )
    # A model that ignores the cache it is given returns one of the new tokens only, and would go on without an error. A
    # cache that does not know its length must at least be the object that was passed in, updated in place.
    length = _length(cache)
    if length not in (None, num_read) or (length is None and given is not None and given is not cache):
        raise ValueError(
            f"Expected the key–value cache of {type(model).__name__} to hold the {num_read} tokens that were read, but"
            f" it holds {'those of the last call' if length is None else length}. Decode with `use_cache=False` where"
            " that is offered, and report the model."
        )
    return output, cache


def check_left_padding(attention_mask: Tensor) -> None:
    """Refuse prompts that end with padding, which new tokens would follow.

    Raises:
        ValueError: If the last column of the mask (B, T) has a 0.
    """
    if not bool(attention_mask[:, -1].all()):
        raise ValueError(
            "Expected prompts of different lengths to be padded on the left, as new tokens follow the last one, but"
            f" {int((attention_mask[:, -1] == 0).sum())} of {len(attention_mask)} end with padding. Set"
            " `padding_side='left'` of the tokenizer."
        )


def takes_positions(model: nn.Module) -> bool:
    """Return whether the model's `forward` makes logits of chosen positions only, an index tensor `logits_to_keep`.

    Some models take a number of last positions only. One that accelerate has spread over devices is left whole: the
    index would be on another device than the hidden states.
    """
    argument = _signature(model).get("logits_to_keep")
    devices = set(getattr(model, "hf_device_map", {}).values())
    return argument is not None and "Tensor" in str(argument.annotation) and len(devices) <= 1


def _length(cache: Any) -> int | None:
    """Return how many tokens a cache holds; None if it does not know, as when all layers are recurrent."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return None


def _parameters(model: nn.Module) -> set[str]:
    return set(_signature(model))


def _signature(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    # The `forward` of peft's wrappers is `(*args, **kwargs)`: the names are those of the model inside.
    unwrap = getattr(model, "get_base_model", None)
    inner: Any = model if unwrap is None else unwrap()
    return inspect.signature(inner.forward).parameters
