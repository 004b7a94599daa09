"""Checks of the arguments of `GLDFusionModule`."""

from collections.abc import Mapping
from typing import Any, get_args

from lit_logits.modules.gld_fusion.sources import LogitSource
from lit_logits.modules.gld_fusion.weights import SourceRouting
from lit_logits.modules.schedules import StepValue
from lit_logits.storage.logit_cache import LogitCache

__all__ = ["check_options", "check_source"]


def check_source(name: str, source: LogitSource | LogitCache, top_k: int, temperature: StepValue) -> None:
    """Refuse a cache of another temperature, or a source with fewer than `top_k` logits."""
    if isinstance(source, LogitCache):
        if callable(temperature):
            raise ValueError(
                f"Expected `temperature` to be a number for the logit cache of {name!r}, which was written at"
                f" {source.temperature}, but got a function of the step."
            )
        if source.temperature != temperature:
            raise ValueError(
                f"Expected the logit cache of {name!r} at temperature {temperature}, but it was written at"
                f" {source.temperature}. Pass that `temperature`, or write another cache."
            )
        if source.top_k < top_k:
            raise ValueError(
                f"Expected the logit cache of {name!r} to hold `top_k`={top_k} logits a position, but it holds"
                f" {source.top_k}. Lower `top_k`, or write another cache."
            )
    elif top_k > source.vocab_size:
        raise ValueError(
            f"Expected `top_k` to be in [1, {source.vocab_size}], the vocabulary of source {name!r}, but got {top_k}."
        )


def check_options(
    sources: Mapping[str, Any],
    source_weights: Mapping[str, float] | None,
    source_kwargs: Mapping[str, Any] | None,
    kd_weight: StepValue,
    *,
    source_routing: SourceRouting | None,
) -> dict[str, float]:
    """Return the weight of each source, once names and weights are in order.

    Without `source_weights` it is 1/S, or 1 where a routing shares each sample out among the sources.
    """
    if source_routing not in (None, *get_args(SourceRouting)):
        raise ValueError(
            f"Expected `source_routing` to be None or one of {list(get_args(SourceRouting))}, but got"
            f" {source_routing!r}."
        )
    _check_names(sources, source_weights, source_kwargs, needed=kd_weight != 0)
    share = 1 / max(1, len(sources)) if source_routing is None else 1.0
    weights = dict.fromkeys(sources, share) if source_weights is None else dict(source_weights)
    if missing := sorted(set(sources) - set(weights)):
        raise ValueError(f"Expected `source_weights` for every source, but got none for {missing}.")
    if any(not 0 <= weight < float("inf") for weight in weights.values()):
        raise ValueError(f"Expected `source_weights` to be at least 0 and finite, but got {weights}.")
    return weights


def _check_names(
    sources: Mapping[str, Any],
    source_weights: Mapping[str, float] | None,
    source_kwargs: Mapping[str, Any] | None,
    *,
    needed: bool,
) -> None:
    """Refuse names that cannot be used, and weights or settings of sources that do not exist."""
    if not isinstance(sources, dict) or (not sources and needed):
        raise ValueError(f"Expected `sources` to map names to models, at least one for λ > 0, but got {sources!r}.")
    # Names become parts of log keys and of paths in a cache.
    wrong = sorted(name for name in sources if not name or not set(name).isdisjoint("./"))
    if wrong:
        raise ValueError(f"Expected names of sources without '.' and '/', but got {wrong}.")
    for argument, given in (("source_weights", source_weights or {}), ("source_kwargs", source_kwargs or {})):
        if unknown := sorted(set(given) - set(sources)):
            raise ValueError(f"Expected `{argument}` for the sources {sorted(sources)}, but got {unknown}.")
