"""Criterion of graph-on-logits distillation: compares a student with a source that it learns from.

Letters: B batch, T positions of the student, U positions of the source, k `top_k`.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_logits.functional.checks import may_read
from lit_logits.functional.gld_fusion import (
    GraphNodes,
    graph_strengths,
    matched_graph_bound,
    sorted_gw_bound,
    top_k_uld,
)
from lit_logits.functional.reductions import sample_means
from lit_logits.functional.top_k_logits import LogitValues, SourceLogits, TopKLogits, gather_positions, top_k_values
from lit_logits.modules.gld_fusion.alignment import SourceAlignment, align_source

__all__ = ["GLDCriterion", "GraphAlignment", "GraphPair", "SourceTerms", "check_scale", "without_scale"]


class GraphPair(NamedTuple):
    """What one call of `GraphAlignment` compared, without gradients.

    Attributes:
        name: of the source.
        student: (B, T, k).
        source: (B, U, k).
        student_mask: (B, T) positions that count.
        source_mask: (B, U) positions that count.
    """

    name: str
    student: TopKLogits
    source: TopKLogits
    student_mask: Tensor
    source_mask: Tensor


class GraphAlignment(nn.Module):
    """Bound between the co-activation graphs of a student and a source, per sample.

    Over ranks and over the ids of each vocabulary it is the sorted Gromov–Wasserstein bound; over `matched` ids node
    strengths are compared token by token, see `matched_graph_bound`.

    Args:
        values: values that the graphs are made of, see `top_k_values`.
        nodes: `rank`, `vocabulary` or `matched`.

    References:
        [0]: InfiGFusion: graph-on-logits distillation, 2025, arXiv 2505.13893.

    Example:
        >>> from lit_logits.functional import top_k_logits
        >>> top = top_k_logits(torch.randn(2, 5, 30), 4)
        >>> mask = torch.ones(2, 5, dtype=torch.bool)
        >>> GraphAlignment()(top, top, mask, mask)
        tensor([0., 0.])
    """

    def __init__(self, *, values: LogitValues = "standardize", nodes: GraphNodes = "rank") -> None:
        super().__init__()
        if values not in get_args(LogitValues) or nodes not in get_args(GraphNodes):
            raise ValueError(
                f"Expected `graph_values` to be one of {get_args(LogitValues)} and `nodes` of {get_args(GraphNodes)},"
                f" but got {values!r} and {nodes!r}."
            )
        self.values, self.nodes = values, nodes
        self._graph_hooks: dict[int, Callable[[GraphPair], None]] = OrderedDict()  # handles keep weak references to it

    def register_graph_hook(self, hook: Callable[[GraphPair], None]) -> RemovableHandle:
        """Call `hook` with what each forward pass compares, until the handle is removed.

        A monitor thus sees what training computes anyway, and no model runs twice.

        Returns:
            A handle whose `remove()` ends it.
        """
        handle = RemovableHandle(self._graph_hooks)
        self._graph_hooks[handle.id] = hook
        return handle

    def forward(
        self,
        student: TopKLogits,
        source: TopKLogits,
        student_mask: Tensor,
        source_mask: Tensor,
        *,
        name: str = "source",
        source_to_student: Tensor | None = None,
    ) -> Tensor:
        """Return the bound of each sample.

        Args:
            student: (B, T, k).
            source: (B, U, k); the larger k is cut to the smaller. No gradient reaches it.
            student_mask: (B, T) positions that count.
            source_mask: (B, U) positions that count.
            name: of the source, by which graph hooks tell several apart.
            source_to_student: (W,) of `match_vocabularies`, for `matched` nodes; None is one vocabulary.

        Returns:
            (B,), in units of the graphs; 0 where either side has no position that counts.
        """
        for hook in self._graph_hooks.values():
            hook(GraphPair(name, _detach(student), _detach(source), student_mask, source_mask))
        size = min(student.log_probs.shape[-1], source.log_probs.shape[-1])
        own, theirs = (top_k_values(top, self.values)[..., :size] for top in (student, source))
        own_ids, their_ids = (top.token_ids[..., :size] for top in (student, source))
        if self.nodes == "matched":
            masks, table = (student_mask, source_mask), source_to_student
            bound = matched_graph_bound(own, own_ids, theirs, their_ids, *masks, source_to_student=table)
        else:
            mine = graph_strengths(own, own_ids, student_mask, nodes=self.nodes)
            other = graph_strengths(theirs.detach(), their_ids, source_mask, nodes=self.nodes)
            num_nodes = None if self.nodes == "rank" else torch.minimum(mine.num_nodes, other.num_nodes)
            bound = sorted_gw_bound(mine.strengths, other.strengths, num_nodes)
        return bound.masked_fill(~(student_mask.any(-1) & source_mask.any(-1)), 0.0)


def _detach(top: TopKLogits) -> TopKLogits:
    return TopKLogits(*(tensor.detach() for tensor in top))


class SourceTerms(NamedTuple):
    """Result of `GLDCriterion`, scalars before weighting.

    Attributes:
        uld: token-wise loss, mean over samples of the mean over aligned positions.
        gld: bound between the graphs, mean over samples.
        aligned: share of the student's positions that predict a label at which the source has read the same text.
    """

    uld: Tensor
    gld: Tensor
    aligned: Tensor


class GLDCriterion(nn.Module):
    """Compare a student with one source: token by token where both have read the same text, and by graphs [0].

    Args:
        uld_values: values that the token-wise loss compares, see `top_k_values`.
        graph_values: values that the graphs are made of.
        nodes: nodes of the graphs, see `GraphAlignment`.

    Raises:
        ValueError: If an option is not one of these.

    References:
        [0]: InfiGFusion: graph-on-logits distillation, 2025, arXiv 2505.13893.
    """

    def __init__(
        self,
        *,
        uld_values: LogitValues = "softmax",
        graph_values: LogitValues = "standardize",
        nodes: GraphNodes = "rank",
    ) -> None:
        super().__init__()
        if uld_values not in get_args(LogitValues):
            raise ValueError(f"Expected `uld_values` to be one of {get_args(LogitValues)}, but got {uld_values!r}.")
        self.uld_values = uld_values
        self._checked: set[tuple[str, str]] = set()
        self.graphs = GraphAlignment(values=graph_values, nodes=nodes)

    def forward(
        self,
        student: TopKLogits,
        source: SourceLogits,
        mask: Tensor,
        ends: Tensor | None = None,
        *,
        name: str = "source",
    ) -> SourceTerms:
        """Compare the positions that lie where both tokenisations reach.

        Args:
            student: (B, T, k).
            source: (B, U, k); no gradient reaches it.
            mask: (B, T) positions of the student that predict a label.
            ends: (B, T) how much of the response the student has read, −1 where none; None if both read the same
                tokens, whose n-th positions belong together. See `align_source`.
            name: of the source, for messages and graph hooks.

        Raises:
            ValueError: If logits are to be standardised whose moments tokens that are ruled out have made useless.
        """
        alignment = align_source(source, mask, ends)
        uld, gld = self.compare(student, source, alignment, name=name).values()
        return SourceTerms(uld.mean(), gld.mean(), alignment.aligned)

    def compare(
        self,
        student: TopKLogits,
        source: SourceLogits,
        alignment: SourceAlignment,
        *,
        terms: Collection[str] = ("uld", "gld"),
        name: str = "source",
        source_to_student: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compare positions that are aligned already; arguments and errors as those of a call and of `graphs`.

        Returns:
            Of `uld` and `gld`, those that are among the `terms`: (B,) each, one value a sample.
        """
        found, partner = {}, alignment.partner
        if "uld" in terms:
            self._check_scale(self.uld_values, source, name)
            aligned = gather_positions(source.top_k, partner.clamp(min=0))
            found["uld"] = sample_means(top_k_uld(student, aligned, values=self.uld_values), partner >= 0)
        if "gld" in terms:
            self._check_scale(self.graphs.values, source, name)
            masks = alignment.student_mask, alignment.source_mask
            found["gld"] = self.graphs(student, source.top_k, *masks, name=name, source_to_student=source_to_student)
        return found

    def _check_scale(self, values: LogitValues, source: SourceLogits, name: str) -> None:
        """Check it in every batch where that is free, on an accelerator in the first of each source."""
        if may_read(source.top_k.std) or (name, values) not in self._checked:
            check_scale(values, source, name)
            self._checked.add((name, values))


def check_scale(values: LogitValues, source: SourceLogits, name: str) -> None:
    """Raise if logits are compared of which not enough is known.

    Raises:
        ValueError: If the source has log-probabilities alone, or logits are to be standardised whose moments tokens
            that are ruled out have made useless.
    """
    if values != "softmax" and bool(source.top_k.std.isnan().any()):
        raise without_scale(name)
    if values == "standardize" and not bool((source.top_k.std < 1e4).all()):
        raise ValueError(
            f"Expected the logits of source {name!r} to be of one scale, to be standardised, but some are −inf or"
            " huge, as of tokens that are ruled out. Use `graph_values: softmax` (and `uld_values: softmax`)."
        )


def without_scale(name: str) -> ValueError:
    """Return the error for a source of which log-probabilities alone are known, and for which logits are needed."""
    return ValueError(
        f"Expected the logits of source {name!r} to be known, to be standardised or compared as they are, but its cache"
        " holds log-probabilities that were served, and no more. Use `graph_values: softmax` and `uld_values: softmax`."
    )
