"""The sources of a pivot, by name: loaded when they are first needed, run, and aligned with it.

Letters: B batch, T positions of the pivot.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_logits.functional.matched_tokens import UnmatchedTokens, check_unmatched
from lit_logits.functional.top_k_logits import SourceLogits
from lit_logits.modules.gld_fusion.alignment import align_source
from lit_logits.modules.gld_fusion.cached import read_cached
from lit_logits.modules.gld_fusion.checks import check_source
from lit_logits.modules.gld_fusion.comparison import SourceComparison
from lit_logits.modules.gld_fusion.debiasing import ChunkDebias, check_chunk_debias, find_boundary, without_boundary
from lit_logits.modules.gld_fusion.sources import LogitSource, Model, ends_to_align, load_source
from lit_logits.modules.gld_fusion.token_terms import (
    check_same_vocabulary,
    has_same_vocabulary,
    match_source,
    token_targets,
)
from lit_logits.modules.schedules import StepValue, value_at
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
        unmatched: what the term `matched` does with tokens without a partner, see `match_vocabularies`.
        matched_graphs: whether graphs are compared token by token.
        chunk_debias: γ of `merge_cuts`, for the term `chunk`; None compares chunks as they are.

    Raises:
        ValueError: If `unmatched` is unknown, γ out of range, or a model that was given is not fit; others raise when
            they are loaded.
    """

    def __init__(
        self,
        sources: Mapping[str, Model],
        source_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        top_k: int,
        temperature: StepValue = 1.0,
        pivot: nn.Module | None = None,
        unmatched: UnmatchedTokens = "tail",
        matched_graphs: bool = False,
        chunk_debias: float | None = None,
    ) -> None:
        check_unmatched(unmatched)
        check_chunk_debias(chunk_debias)
        self.given, self.source_kwargs = dict(sources), dict(source_kwargs or {})
        self.top_k, self.temperature, self.pivot = top_k, temperature, pivot
        self.unmatched, self.matched_graphs, self.chunk_debias = unmatched, matched_graphs, chunk_debias
        self._loaded: dict[str, LogitSource | LogitCache] = {}
        self._told: set[str] = set()
        self._tables: dict[tuple[str, UnmatchedTokens], Tensor] = {}
        self._boundaries: dict[str, Tensor] = {}
        self._own_boundary: Tensor | None = None
        for name, source in self.given.items():
            if not isinstance(source, str):
                self.load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return the settings that the top-k logits of each source depend on.

        Raises:
            ValueError: If the logits of a source are in a cache already, τ changes, or `chunk_debias` needs to know the
                tokenizer of a source.
        """
        loaded = {name: self.load(name) for name in self.given}
        models = {name: source for name, source in loaded.items() if isinstance(source, LogitSource)}
        if not models or len(models) < len(loaded):
            raise ValueError(
                "Expected `sources` to be models, whose logits are to be cached, but got caches:"
                f" {sorted(set(loaded) - set(models))}."
            )
        if callable(self.temperature):
            raise ValueError(
                "Expected `temperature` to be a number to write logits at, but got a function of the step."
            )
        settings = {name: source.settings(self.top_k, self.temperature) for name, source in models.items()}
        for name in settings if self.chunk_debias is not None else ():
            self._boundary(name)
            settings[name]["boundary"] = True
        return settings

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

    def logits(
        self, name: str, batch: Mapping[str, Any], step: int = 0, *, with_boundary: bool | None = None
    ) -> SourceLogits:
        """Return the top-k logits of a source, from the model itself or from its cache.

        Args:
            name: of the source.
            batch: see `LogitSource`; for a cache with `sample_ids` and the ends of responses.
            step: at which a temperature that changes is taken.
            with_boundary: whether a model gives the log-probability of a new word; default with `chunk_debias`.

        Raises:
            ValueError: If the batch lacks what the source needs, or its tokens are others.
        """
        source = self.load(name)
        if isinstance(source, LogitSource):
            is_wanted = self.chunk_debias is not None if with_boundary is None else with_boundary
            boundary = self._boundary(name) if is_wanted else None
            return source(batch, self.top_k, value_at(self.temperature, step), boundary)
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
            pivot_tokens: returns what each token of the pivot stands for, which `matched` terms and graphs need, and
                `chunk_debias`.
            step: at which a temperature that changes is taken.

        Raises:
            ValueError: If the batch or the source lacks what a term needs.
        """
        source = self.load(name)
        ends = ends_to_align(name, source, batch)
        # Of the same tokens, likelihoods of chunks say the same as they are.
        gamma = self.chunk_debias if "chunk" in terms and ends is not None else None
        logits, debias = self.logits(name, batch, step, with_boundary=gamma is not None), None
        if gamma is not None:
            if logits.boundary_log_probs is None:
                raise without_boundary(name, source)
            debias = ChunkDebias(gamma, self._pivot_boundary(pivot_tokens, vocab_size, mask.device))
        alignment, targets, graph_table = align_source(logits, mask, ends), {}, None
        if "kl" in terms:
            check_same_vocabulary(name, source, batch)
            targets["kl"] = token_targets(logits, alignment, mask, vocab_size)
        if "matched" in terms:
            table = self._table(name, self.unmatched, pivot_tokens)
            targets["matched"] = token_targets(logits, alignment, mask, vocab_size, table)
        if "gld" in terms and self.matched_graphs and not has_same_vocabulary(name, source, batch):
            graph_table = self._table(name, "tail", pivot_tokens)
        return SourceComparison(name, terms, logits, alignment, targets, ends is None, graph_table, debias)

    def try_compare(
        self, name: str, terms: list[str], *, tell: Callable[[str], None], **shown: Any
    ) -> SourceComparison | None:
        """Compare as `compare` does, or say once why that cannot be, and return None.

        Args:
            name: of the source; one that is not loaded is not loaded for this.
            terms: that it is compared by.
            tell: takes the sentence.
            **shown: see `compare`.
        """
        reason = f"The source {name!r} is loaded to train and to predict alone."
        try:
            if name in self._loaded:
                return self.compare(name, terms, **shown)
        except ValueError as error:
            reason = str(error)
        if name not in self._told:
            self._told.add(name)
            tell(f"val/loss_* of source {name!r} leave out what it cannot be compared in. {reason}")
        return None

    def _table(self, name: str, unmatched: UnmatchedTokens, pivot_tokens: Callable[[], Tokens]) -> Tensor:
        """Return the pivot's tokens of a source's; made once."""
        if (name, unmatched) not in self._tables:
            self._tables[name, unmatched] = match_source(name, self.load(name), pivot_tokens(), unmatched)
        return self._tables[name, unmatched]

    def _boundary(self, name: str) -> Tensor:
        """Return the tokens of a source, a model, that a boundary begins; found once."""
        if name not in self._boundaries:
            source = self.load(name)
            self._boundaries[name] = find_boundary(f"source {name!r}", source.tokens, source.vocab_size)
        return self._boundaries[name]

    def _pivot_boundary(self, pivot_tokens: Callable[[], Tokens], vocab_size: int, device: torch.device) -> Tensor:
        """Return the tokens of the pivot that a boundary begins, on its device; found once."""
        if self._own_boundary is None:
            self._own_boundary = find_boundary("the pivot", pivot_tokens(), vocab_size)
        self._own_boundary = self._own_boundary.to(device)
        return self._own_boundary
