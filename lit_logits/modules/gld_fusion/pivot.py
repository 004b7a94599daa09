"""The model that learns from sources: loaded, and its logits made a chunk at a time.

Letters: N positions that predict a label, d hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lit_logits.functional.chunk_debiasing import boundary_log_probs
from lit_logits.functional.chunks import chunked_rows
from lit_logits.functional.reductions import at_least_float32
from lit_logits.functional.top_k_kl import KLKind, top_k_kl
from lit_logits.functional.top_k_logits import TopKLogits, top_k_logits
from lit_logits.modules.gld_fusion.comparison import PivotRows, SourceComparison
from lit_logits.modules.language_models.inspect import num_logits
from lit_logits.modules.language_models.loading import PlainCausalLM, load_plain_causal_lm
from lit_logits.modules.language_models.lora import add_lora
from lit_logits.modules.language_models.quantized import quantized_layers

__all__ = ["load_pivot", "num_tokens", "pivot_rows"]


def pivot_rows(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    compared: Sequence[SourceComparison],
    *,
    vocab_size: int,
    top_k: int,
    temperature: float,
    kl: tuple[KLKind, float],
    chunk_size: int,
) -> PivotRows:
    """Make the pivot's logits, a chunk at a time, and of them what the terms need.

    One pass over the chunks serves all: the (N, V) logits are never whole, and each chunk is made once.

    Args:
        head: returns the logits of hidden states.
        hidden: (N, d).
        labels: (N,).
        compared: the sources.
        vocab_size: how many of the logits belong to tokens.
        top_k: k.
        temperature: τ.
        kl: kind and β of `top_k_kl`.
        chunk_size: rows a chunk.
    """
    targets = [target for one in compared for target in one.targets.values()]
    boundary = next((one.debias.pivot_boundary for one in compared if one.debias is not None), None)
    needs_top = any(term in ("uld", "gld") for one in compared for term in one.terms)
    options: dict[str, Any] = {"kind": kl[0], "beta": kl[1], "temperature": temperature, "reduction": "none"}

    def make(rows: Tensor, labels: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        logits = head(rows)
        ce, own = F.cross_entropy(at_least_float32(logits), labels, reduction="none"), logits[:, :vocab_size]
        triples = zip(*(parts[start::3] for start in range(3)), strict=True)
        divergences = [top_k_kl(own, ids, log_probs, tail=tail, **options) for ids, log_probs, tail in triples]
        bounds = () if boundary is None else (boundary_log_probs(logits, boundary),)
        top = top_k_logits(own, top_k, temperature=temperature) if needs_top else ()
        return (ce, *divergences, *bounds, *top)

    parts = [part for target in targets for part in target]
    ce, *found = chunked_rows(make, hidden, labels, *parts, chunk_size=chunk_size)
    divergences, rest = found[: len(targets)], found[len(targets) :]
    bounds = None if boundary is None else rest.pop(0)
    return PivotRows(ce, divergences, TopKLogits(*rest) if needs_top else None, bounds)


def load_pivot(
    pivot: Any,
    vocab_size: int | None,
    lora: Mapping[str, Any] | None,
    gradient_checkpointing: bool,
    kwargs: Mapping[str, Any] | None = None,
) -> PlainCausalLM:
    """Load or make the model that learns, with adapters of its own if there are settings for them.

    Raises:
        ValueError: If it cannot be loaded, or has quantised weights and no adapters to train.
    """
    model, rule = load_plain_causal_lm(pivot, vocab_size, kwargs)
    if lora is None and quantized_layers(model):
        raise ValueError(
            "Expected `lora` for a pivot with quantised weights, which cannot be trained themselves, but got None. Add"
            " for example `lora: {r: 16, target_modules: all-linear}`."
        )
    if lora is not None:
        model = add_lora(model, lora)
    if gradient_checkpointing:
        # The reentrant kind needs inputs that require a gradient, which frozen embeddings under LoRA do not give.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return PlainCausalLM(model.train(), rule)  # `from_pretrained` leaves it in eval mode


def num_tokens(pivot: PreTrainedModel, vocab_size: int | None, top_k: int) -> int:
    """Return how many logits of the pivot belong to tokens; the others are padding of its table."""
    rows = num_logits(pivot)
    size = min(rows, vocab_size or rows)
    if top_k > size:
        raise ValueError(f"Expected `top_k` to be in [1, {size}], the pivot's vocabulary, but got {top_k}.")
    return size
