"""A source beside the pivot, for a batch: what it says, where, and the terms that follow.

Letters: B batch, T positions of the pivot, N of them that predict a label.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.reductions import sample_mean, sample_means
from lit_logits.functional.source_routing import response_nll, route_by_nll
from lit_logits.functional.top_k_logits import SourceLogits, TopKLogits, place_rows
from lit_logits.modules.gld_fusion.alignment import SourceAlignment
from lit_logits.modules.gld_fusion.criterion import GLDCriterion, SourceTerms
from lit_logits.modules.gld_fusion.debiasing import ChunkDebias
from lit_logits.modules.gld_fusion.token_terms import TokenTargets, chunk_terms

__all__ = ["GLDLosses", "PivotRows", "SourceComparison", "collect_losses", "column_shares", "nll_shares", "place"]


class GLDLosses(NamedTuple):
    """Terms of the loss before weighting: means over samples of the mean over the positions that count in a sample.

    Attributes:
        ce: cross-entropy of the next tokens of responses, in nats.
        sources: `uld`, `gld` (0 where they are not among the terms) and the aligned share of each source.
        terms: of each source by their names: (B,), one value a sample.
        shares: (B,) of each source in teaching each sample; empty without `source_routing`.
        matched: of each source, the probability that found a token of the pivot, where `matched` is among the terms.
        chunks: of each source whose chunks are debiased, the share of them that is left.
        nll: (N,) cross-entropy of each label, in nats.
    """

    ce: Tensor
    sources: dict[str, SourceTerms]
    terms: dict[str, dict[str, Tensor]]
    shares: dict[str, Tensor]
    matched: dict[str, Tensor]
    chunks: dict[str, Tensor]
    nll: Tensor

    def logged(self, name: str) -> dict[str, Tensor]:
        """Return what is logged of a source, before weighting, by names."""
        values = {f"loss_{term}": value.mean() for term, value in self.terms[name].items()}
        values["aligned"] = self.sources[name].aligned
        for key, found in (("matched", self.matched), ("chunks", self.chunks)):
            if name in found:
                values[key] = found[name]
        if name in self.shares:
            values["share"] = self.shares[name].mean()
        return values


class SourceComparison(NamedTuple):
    """One source, before the pivot's logits are made.

    Attributes:
        name: of the source.
        terms: that it is compared by.
        logits: what it says.
        alignment: of the pivot's positions with its own.
        targets: of the terms `kl` and `matched`, as far as they are among the terms.
        same_tokens: whether it reads the pivot's own tokens.
        graph_table: (W,) the pivot's tokens of its own, by which graphs are compared; None for one vocabulary.
        debias: how chunks are compared together with a new word behind them; None as they are.
    """

    name: str
    terms: Collection[str]
    logits: SourceLogits
    alignment: SourceAlignment
    targets: dict[str, TokenTargets]
    same_tokens: bool
    graph_table: Tensor | None = None
    debias: ChunkDebias | None = None


class PivotRows(NamedTuple):
    """What the pivot says, made of its logits a chunk of rows at a time.

    Attributes:
        ce: (N,) cross-entropy of the labels, in nats.
        divergences: (N,) each, of the targets of all comparisons, in their order.
        top: top-k logits of the N rows, or None if no term needs them.
        boundary: (N,) log-probability of a boundary, in nats, or None if no term needs it.
    """

    ce: Tensor
    divergences: Sequence[Tensor]
    top: TopKLogits | None
    boundary: Tensor | None = None


def collect_losses(
    compared: Sequence[SourceComparison],
    rows: PivotRows,
    criterion: GLDCriterion,
    mask: Tensor,
    shares: dict[str, Tensor],
    *,
    chunk_temperature: float,
) -> GLDLosses:
    """Return all terms of all sources.

    Args:
        compared: the sources.
        rows: what the pivot says.
        criterion: of sorted values and graphs.
        mask: (B, T) the N positions.
        shares: (B,) of each source; empty without routing.
        chunk_temperature: τ of the chunks.
    """
    student = None if rows.top is None else place_rows(rows.top, mask)
    divergences, ce = iter(rows.divergences), sample_mean(place(rows.ce, mask), mask)
    losses = GLDLosses(ce, {}, {}, shares, {}, {}, rows.ce)
    for one in compared:
        is_aligned = one.alignment.partner >= 0
        terms = losses.terms[one.name] = {}
        if student is not None:
            options: dict[str, Any] = {"terms": one.terms, "name": one.name, "source_to_student": one.graph_table}
            terms |= criterion.compare(student, one.logits, one.alignment, **options)
        for term in one.targets:
            terms[term] = sample_means(place(next(divergences), mask), is_aligned)
        if "chunk" in one.terms:
            options = {"temperature": chunk_temperature, "same_tokens": one.same_tokens, "name": one.name}
            if one.debias is not None and rows.boundary is not None:
                options |= {"threshold": one.debias.threshold, "boundary_log_probs": place(rows.boundary, mask)}
            found = chunk_terms(place(-rows.ce, mask), one.logits, one.alignment, **options)
            terms["chunk"] = found.losses
            if one.debias is not None:
                losses.chunks[one.name] = found.share
        if "matched" in one.targets:
            losses.matched[one.name] = sample_mean(place(1 - one.targets["matched"].tail, mask), is_aligned)
        zero = torch.zeros_like(losses.ce, requires_grad=False)
        uld, gld = (terms[term].mean() if term in terms else zero for term in ("uld", "gld"))
        losses.sources[one.name] = SourceTerms(uld, gld, one.alignment.aligned)
    return losses


def place(rows: Tensor, mask: Tensor) -> Tensor:
    """Put (N,) values at the positions that count: (B, T), 0 elsewhere."""
    return rows.new_zeros(mask.shape).masked_scatter(mask, rows)


def nll_shares(comparisons: Sequence[SourceComparison], temperature: float) -> dict[str, Tensor]:
    """Return the share (B,) of each source in teaching each sample, by how well it explains the response."""
    if not comparisons:
        return {}
    shares = route_by_nll(torch.stack([response_nll(one.logits) for one in comparisons], -1), temperature)
    return {one.name: shares[:, number] for number, one in enumerate(comparisons)}


def column_shares(batch: Mapping[str, Any], names: Collection[str]) -> dict[str, Tensor]:
    """Return the share (B,) of each source in teaching each sample, by the names that the data give.

    Sources that teach none of the samples are left out.

    Raises:
        ValueError: If the batch has no names, or one of no source.
    """
    teachers = batch.get("teachers")
    if teachers is None:
        raise ValueError(
            "Expected batches with `teachers`, the name of a source for each sample, for `source_routing: column`, but"
            f" got {sorted(batch)}. Name the column in the data: `source: {{path: ..., teacher_column: ...}}`."
        )
    if unknown := sorted(set(teachers) - set(names)):
        raise ValueError(f"Expected `teachers` to be of the sources {sorted(names)}, but got {unknown}.")
    device = batch["labels"].device
    chosen = [name for name in names if name in teachers]
    return {name: torch.tensor([float(one == name) for one in teachers], device=device) for name in chosen}
