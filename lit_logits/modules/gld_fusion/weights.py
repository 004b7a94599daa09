"""How much each term of each source weighs, at each step."""

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

from lit_logits.modules.schedules import StepValue, value_at

__all__ = ["TERMS", "SourceRouting", "TermWeights", "check_terms"]

Terms: TypeAlias = Mapping[str, StepValue | Mapping[str, StepValue]]

SourceRouting = Literal["column", "nll"]

TERMS = ("uld", "gld", "kl", "matched", "chunk")


class TermWeights:
    """Weights of the terms of the loss.

    Args:
        kd_weight: λ.
        source_weights: ω_s by name.
        terms: weight by name of the term; or, for a term, by name of the source, which then is 0 for the others.

    Raises:
        ValueError: If a term or a source is unknown, or a weight out of range.
    """

    def __init__(self, kd_weight: StepValue, source_weights: Mapping[str, float], terms: Terms) -> None:
        check_terms(terms, source_weights)
        self.kd_weight, self.source_weights, self.terms = kd_weight, dict(source_weights), dict(terms)
        if not callable(kd_weight):
            self.kd_weight_at(0)

    def kd_weight_at(self, step: int) -> float:
        """Return λ at a step."""
        weight = value_at(self.kd_weight, step)
        if not 0 <= weight <= 1:
            raise ValueError(f"Expected `kd_weight` in [0, 1], but got {weight} at step {step}.")
        return weight

    def at(self, step: int) -> dict[str, dict[str, float]]:
        """Return the weights of the terms by source, λ and ω_s not among them.

        Sources of which nothing weighs anything are left out. Of the others each named term is there, to be logged.
        """
        if self.kd_weight_at(step) == 0:
            return {}
        found = {}
        for name, omega in self.source_weights.items():
            weights = {term: _checked(term, value_at(value, step)) for term, value in self.of(name).items()}
            if omega > 0 and any(weights.values()):
                found[name] = weights
        return found

    @property
    def used_sources(self) -> list[str]:
        """Sources that weigh something at some step, as far as numbers tell."""
        if self.kd_weight == 0:
            return []
        return [name for name, omega in self.source_weights.items() if omega > 0 and any(self.of(name).values())]

    @property
    def used_terms(self) -> dict[str, list[str]]:
        """The terms that are named for each of these sources."""
        return {name: list(self.of(name)) for name in self.used_sources}

    def suffix(self, name: str) -> str:
        """Return what log names of a source end in: its name if there are several."""
        return f"/{name}" if len(self.used_sources) > 1 else ""

    def of(self, name: str) -> dict[str, StepValue]:
        """Return the weights of a source by term, of those that are named for it."""
        own = {term: value.get(name) if isinstance(value, Mapping) else value for term, value in self.terms.items()}
        return {term: value for term, value in own.items() if value is not None}


def check_terms(terms: Terms, sources: Mapping[str, object]) -> None:
    """Raise unless terms and sources are known, and numbers among the weights at least 0 and finite.

    Raises:
        ValueError: If they are not.
    """
    if unknown := sorted(set(terms) - set(TERMS)):
        raise ValueError(f"Expected `terms` to be of {list(TERMS)}, but got {unknown}.")
    for term, value in terms.items():
        by_source = value if isinstance(value, Mapping) else {}
        if unknown := sorted(set(by_source) - set(sources)):
            raise ValueError(f"Expected the term {term!r} for the sources {sorted(sources)}, but got {unknown}.")
        for weight in by_source.values() if isinstance(value, Mapping) else [value]:
            if not callable(weight):
                _checked(term, weight)


def _checked(term: str, weight: float) -> float:
    if not 0 <= weight < math.inf:
        raise ValueError(f"Expected the weight of the term {term!r} to be at least 0 and finite, but got {weight}.")
    return weight
