"""The sources of a pivot, by name: loaded when they are first needed, run, and aligned with it.

Letters: B batch, T positions of the pivot.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lit_logits.functional.top_k_logits import SourceLogits
from lit_logits.modules.gld_fusion.alignment import align_source
from lit_logits.modules.gld_fusion.cached import read_cached
from lit_logits.modules.gld_fusion.checks import check_source
from lit_logits.modules.gld_fusion.comparison import SourceComparison
from lit_logits.modules.gld_fusion.sources import LogitSource, Model, ends_to_align, load_source
from lit_logits.modules.gld_fusion.token_terms import check_same_vocabulary, match_source, token_targets
from lit_logits.modules.gld_fusion.weights import StepValue, value_at
from lit_logits.storage.logit_cache import LogitCache

__all__ = ["SourceSet"]

Tokens = list[bytes | None] | None


class SourceSet:
    """Sources by name. Those that are given by a path are loaded when they are first needed.

    So a pivot can be evaluated, or loaded from its checkpoint, where the sources are not. It is no `nn.Module`, as
    sources belong into neither checkpoint nor optimizer.

    Args:
        sources: see `load_source`.
        source_kwargs: by name, for `from_pretrained`.
        top_k: k.
        temperature: τ.
        pivot: a model that is no source.

    Raises:
        ValueError: If a model that was given is not fit; the others raise when they are loaded.
    """

    def __init__(
        self,
        sources: Mapping[str, Model],
        source_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        top_k: int,
        temperature: StepValue = 1.0,
        pivot: nn.Module | None = None,
    ) -> None:
        self.given, self.source_kwargs = dict(sources), dict(source_kwargs or {})
        self.top_k, self.temperature, self.pivot = top_k, temperature, pivot
        self._loaded: dict[str, LogitSource | LogitCache] = {}
        self._tables: dict[str, Tensor] = {}
        for name, source in self.given.items():
            if not isinstance(source, str):
                self.load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def load(self, name: str) -> LogitSource | LogitCache:
        """Return a source; the first call loads it.

        Raises:
            ValueError: If it cannot be loaded, or does not fit k, τ or the pivot.
        """
        if name not in self._loaded:
            source = load_source(self.given[name], name, self.source_kwargs.get(name))
            check_source(name, source, self.top_k, self.temperature)
            if self.pivot is not None and getattr(source, "model", None) is self.pivot:
                raise ValueError(f"Expected other models as sources, but {name!r} is the pivot, which it would freeze.")
            self._loaded[name] = source
        return self._loaded[name]

    def logits(self, name: str, batch: Mapping[str, Any], step: int = 0) -> SourceLogits:
        """Return the top-k logits of a source, from the model itself or from its cache.

        Args:
            name: of the source.
            batch: see `LogitSource`; for a cache with `sample_ids` and the ends of responses.
            step: at which a temperature that changes is taken.

        Raises:
            ValueError: If the batch lacks what the source needs, or its tokens are others.
        """
        source = self.load(name)
        if isinstance(source, LogitSource):
            return source(batch, self.top_k, value_at(self.temperature, step))
        return read_cached(name, source, batch, self.top_k)

    def compare(
        self,
        name: str,
        terms: list[str],
        *,
        batch: Mapping[str, Any],
        mask: Tensor,
        vocab_size: int,
        pivot_tokens: Callable[[], Tokens],
        step: int = 0,
    ) -> SourceComparison:
        """Run a source, or read its cache, and prepare what the pivot is compared with.

        Args:
            name: of the source.
            terms: that it is compared by.
            batch: see `logits`.
            mask: (B, T) positions of the pivot that predict a label.
            vocab_size: V of the pivot.
            pivot_tokens: returns what each token of the pivot stands for, which the term `matched` needs.
            step: at which a temperature that changes is taken.

        Raises:
            ValueError: If the batch or the source lacks what a term needs.
        """
        source = self.load(name)
        ends, logits = ends_to_align(name, source, batch), self.logits(name, batch, step)
        alignment, targets = align_source(logits, mask, ends), {}
        if "kl" in terms:
            check_same_vocabulary(name, source, batch)
            targets["kl"] = token_targets(logits, alignment, mask, vocab_size)
        if "matched" in terms:
            if name not in self._tables:
                self._tables[name] = match_source(name, source, pivot_tokens())
            targets["matched"] = token_targets(logits, alignment, mask, vocab_size, self._tables[name])
        return SourceComparison(name, terms, logits, alignment, targets, ends is None)
