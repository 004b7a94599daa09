"""Calling models of transformers by the names that their `forward` has.

The key–value cache has two: `cache` since transformers 5.24, `past_key_values` before and in models of others.

Letters: B batch, T sequence.
"""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["CACHE_NAMES", "OUTPUT_CACHE_NAME", "accepted_inputs", "cache_argument", "read_with_cache"]

CACHE_NAMES = ("cache", "past_key_values")

# Outputs are classes of transformers, so the installed version alone decides.
OUTPUT_CACHE_NAME = next(
    name for name in CACHE_NAMES if name in {field.name for field in fields(CausalLMOutputWithPast)}
)


def accepted_inputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that the model's `forward` names, on its device; None is left out.

    For what a model may do without, such as position ids, which some find by themselves. A cache is not among that: see
    `cache_argument`.
    """
    known = _parameters(model)
    chosen = {name: value for name, value in inputs.items() if name in known and value is not None}
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in chosen.items()}


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """A key–value cache under the name that the model's `forward` has for it.

    Raises:
        ValueError: for a model that takes none.
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
    """Let a model read on from where its cache ends.

    Args:
        model: of transformers.
        inputs: `input_ids` (B, T) of the tokens to read, and whatever else the model may take.
        cache: of the tokens before, as the last call gave it; None at the start.
        num_read: how many tokens a sequence the cache holds in the end, padding included.

    Returns:
        The model's output, and its cache.

    Raises:
        ValueError: for a model that takes or gives no cache, or whose cache does not hold what was read: its next token
            would come from a part of the text alone.
    """
    given = cache
    output = model(**accepted_inputs(model, {**inputs, "use_cache": True}), **cache_argument(model, given))
    cache = getattr(output, OUTPUT_CACHE_NAME, None)
    if cache is None:
        raise ValueError(
            f"Expected {type(model).__name__} to give a key–value cache, but its output has {list(output)}. Decode"
            " with a model that has one, or with `use_cache=False` where that is offered."
        )
    length = _length(cache)
    if length not in (None, num_read) or (length is None and given is not None and given is not cache):
        raise ValueError(
            f"Expected the key–value cache of {type(model).__name__} to hold the {num_read} tokens that were read, but"
            f" it holds {'those of the last call' if length is None else length}. Decode with `use_cache=False` where"
            " that is offered, and report the model."
        )
    return output, cache


def _length(cache: Any) -> int | None:
    """How many tokens a cache holds; None where it does not know, as one of recurrent layers alone."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        return None


def _parameters(model: nn.Module) -> set[str]:
    # Adapters of peft pass on whatever they do not name themselves.
    unwrap = getattr(model, "get_base_model", None)
    inner: Any = model if unwrap is None else unwrap()
    return set(inspect.signature(inner.forward).parameters)
