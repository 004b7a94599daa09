"""Checks of the arguments of `GLDFusionModule`."""

from collections.abc import Mapping
from typing import Any

from lit_logits.modules.gld_fusion.sources import LogitSource
from lit_logits.storage.logit_cache import LogitCache

__all__ = ["check_options", "check_source"]


def check_source(name: str, source: LogitSource | LogitCache, top_k: int, temperature: float) -> None:
    """Refuse a cache of another temperature, or a source with fewer than `top_k` logits."""
    if isinstance(source, LogitCache):
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
    kd_weight: float,
    gld_weight: float,
) -> dict[str, float]:
    """Return the weight of each source, once all arguments are in range."""
    _check_names(sources, source_weights, source_kwargs, needed=kd_weight > 0)
    if not 0 <= kd_weight <= 1 or not 0 <= gld_weight < float("inf"):
        raise ValueError(f"Expected `kd_weight` in [0, 1] and `gld_weight` ≥ 0, but got {kd_weight} and {gld_weight}.")
    weights = {name: 1 / len(sources) for name in sources} if source_weights is None else dict(source_weights)
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
