"""Graph-on-logits distillation: graphs of which logits are large together, and losses that compare them unmatched.

The k largest logits ẑ_t ∈ R^k of the T positions of a response make its co-activation graph C [0],

    C = (1/T) Σ_t ẑ_t ẑ_tᵀ,         f(i) = (1/n) Σ_j C_ij,          GW~(C, D) = Σ_i |f_C↓(i) − f_D↓(i)|

with the node strengths f, which need no graph: f = Ẑᵀ(Ẑ1)/(nT). GW~ is the sorted Gromov–Wasserstein bound.

Letters: B samples, T positions (U of a source), k `top_k`, n nodes, V and W vocabularies of student and source. A node
is a rank (the i-th largest logit; n = k), or an id of the vocabulary (n ≤ T·k, those that some position kept).

References:
    [0]: InfiGFusion: graph-on-logits distillation, 2025, arXiv 2505.13893.
    [1]: Universal logit distillation, 2024, arXiv 2402.12030.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_logits.functional.checks import may_read
from lit_logits.functional.reductions import Reduction, at_least_float32, reduce_tokens, sums_by_id
from lit_logits.functional.top_k_logits import LogitValues, TopKLogits, top_k_logits, top_k_values

__all__ = [
    "GraphNodes",
    "NodeStrengths",
    "VocabularyGraph",
    "co_activation_graph",
    "graph_strengths",
    "matched_graph_bound",
    "node_strengths",
    "sorted_gw_bound",
    "top_k_uld",
    "uld_loss",
    "vocabulary_graph",
    "vocabulary_strengths",
]

GraphNodes = Literal["rank", "vocabulary", "matched"]


class VocabularyGraph(NamedTuple):
    """Result of `vocabulary_graph`.

    Attributes:
        graph: (n, n) co-activation of the ids that some position kept.
        node_ids: (n,) those ids, ascending.
    """

    graph: Tensor
    node_ids: Tensor


class NodeStrengths(NamedTuple):
    """Strengths of graphs that may differ in size.

    Attributes:
        strengths: (..., n_max), descending; zeros after the nodes of a smaller graph.
        num_nodes: (...) nodes n of each graph.
    """

    strengths: Tensor
    num_nodes: Tensor


# ---------------------------------------------------------------------- graphs: readable, and slow


def co_activation_graph(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the co-activation graph over ranks, C = (1/T) Σ_t ẑ_t ẑ_tᵀ.

    Args:
        values: (..., T, k), descending along k; see `top_k_values`.
        mask: (..., T) positions that count; None is all.

    Returns:
        (..., k, k), at least float32; zeros if no position counts.

    Example:
        >>> co_activation_graph(torch.tensor([[2.0, 1.0], [4.0, 0.0]]))
        tensor([[10.0000,  1.0000],
                [ 1.0000,  0.5000]])
    """
    values, count = _counted(values, mask)
    return (values.unsqueeze(-1) * values.unsqueeze(-2)).sum(-3) / count.unsqueeze(-1).unsqueeze(-1)


def vocabulary_graph(values: Tensor, token_ids: Tensor, mask: Tensor | None = None) -> VocabularyGraph:
    """Compute the co-activation graph over token ids of one sample: ẑ_t[i] ẑ_t[j] is added at the ids of i and j.

    Args:
        values: (T, k).
        token_ids: (T, k), k different ids at each position.
        mask: (T,) positions that count; None is all.

    Example:
        >>> values, ids = torch.tensor([[2.0, 1.0], [3.0, 1.0]]), torch.tensor([[7, 5], [5, 9]])
        >>> vocabulary_graph(values, ids).graph
        tensor([[5.0000, 1.0000, 1.5000],
                [1.0000, 2.0000, 0.0000],
                [1.5000, 0.0000, 0.5000]])
    """
    if mask is not None:
        values, token_ids = values[mask], token_ids[mask]
    values = at_least_float32(values)
    node_ids, nodes = token_ids.unique(return_inverse=True)
    dense = values.new_zeros(len(values), len(node_ids)).scatter(1, nodes, values)
    products = dense.unsqueeze(2) * dense.unsqueeze(1)
    return VocabularyGraph(products.sum(0) / max(1, len(values)), node_ids)


# ---------------------------------------------------------------------- node strengths: never the graph


def node_strengths(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the row means f = Ẑᵀ(Ẑ1)/(kT) of `co_activation_graph`, in O(T·k) and without the graph.

    Args:
        values: (..., T, k).
        mask: (..., T) positions that count; None is all.

    Returns:
        (..., k), at least float32, not sorted; zeros if no position counts.

    Example:
        >>> node_strengths(torch.tensor([[2.0, 1.0], [4.0, 0.0]]))
        tensor([5.5000, 0.7500])
    """
    values, count = _counted(values, mask)
    return (values * values.sum(-1, keepdim=True)).sum(-2) / (count.unsqueeze(-1) * values.shape[-1])


def vocabulary_strengths(values: Tensor, token_ids: Tensor, mask: Tensor | None = None) -> NodeStrengths:
    """Compute the row means of `vocabulary_graph` of each sample, sorted, by one scatter-add over sorted ids.

    Nothing of the size of the vocabulary is made, nor does the host wait for the device: O(T·k log(T·k)).

    Args:
        values: (..., T, k).
        token_ids: (..., T, k), k different ids at each position.
        mask: (..., T) positions that count; None is all.

    Example:
        >>> values, ids = torch.tensor([[2.0, 1.0], [3.0, 1.0]]), torch.tensor([[7, 5], [5, 9]])
        >>> vocabulary_strengths(values, ids)
        NodeStrengths(strengths=tensor([2.5000, 1.0000, 0.6667, 0.0000]), num_nodes=tensor(3))
    """
    sums, num_nodes = sums_by_id(*_shares(values, token_ids, torch.ones_like(token_ids, dtype=torch.bool), mask))
    exists = torch.arange(sums.shape[-1], device=sums.device) < num_nodes.unsqueeze(-1)
    # Nodes that do not exist are −inf while sorting, as strengths of standardised logits may be negative.
    strengths = (sums / num_nodes.clamp(min=1).unsqueeze(-1)).masked_fill(~exists, -torch.inf)
    strengths = strengths.sort(-1, descending=True).values
    return NodeStrengths(strengths.masked_fill(~exists, 0.0), num_nodes)


def graph_strengths(
    values: Tensor, token_ids: Tensor | None = None, mask: Tensor | None = None, *, nodes: GraphNodes = "rank"
) -> NodeStrengths:
    """Compute sorted node strengths over either set of nodes.

    Args:
        values: (..., T, k).
        token_ids: (..., T, k); needed for `vocabulary`.
        mask: (..., T) positions that count; None is all.
        nodes: `rank` or `vocabulary`.

    Raises:
        ValueError: If `nodes` is unknown, or is `vocabulary` without ids.

    Example:
        >>> graph_strengths(torch.tensor([[2.0, 1.0], [4.0, 0.0]])).strengths
        tensor([5.5000, 0.7500])
    """
    if nodes == "rank":
        strengths = node_strengths(values, mask).sort(-1, descending=True).values
        return NodeStrengths(strengths, torch.full_like(strengths[..., 0], strengths.shape[-1], dtype=torch.long))
    if nodes != "vocabulary" or token_ids is None:
        raise ValueError(
            f"Expected `nodes` to be 'rank', or 'vocabulary' with `token_ids`, but got {nodes!r}. Compare 'matched'"
            " nodes by `matched_graph_bound`."
        )
    return vocabulary_strengths(values, token_ids, mask)


# ---------------------------------------------------------------------- losses


def sorted_gw_bound(strengths1: Tensor, strengths2: Tensor, num_nodes: Tensor | None = None) -> Tensor:
    """Compute the sorted Gromov–Wasserstein bound GW~ = Σ_i |f↓(i) − g↓(i)| of node strengths, O(n log n).

    For graphs of n nodes each with uniform weights, GW~/n ≤ GW, the root of the squared-loss Gromov–Wasserstein value
    GW² (Jensen and transport on a line: Mémoli's first lower bound in its mean-strength form). GW~ is 0 for isomorphic
    graphs, and not only for those: it cannot tell apart different graphs of equal node strengths.

    Args:
        strengths1: (..., n) row means of a graph, in any order.
        strengths2: (..., m) of the other; graphs of different size are compared through their min(n, m) largest
            strengths, for which the guarantee does not hold.
        num_nodes: (...) how many of the largest strengths to compare, where that differs from graph to graph; both must
            be sorted then, as in `NodeStrengths`.

    Returns:
        (...), in units of the graphs; 0 for equal strengths.

    Example:
        >>> sorted_gw_bound(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.5]))
        tensor(1.5000)
    """
    size = min(strengths1.shape[-1], strengths2.shape[-1])
    if num_nodes is None:
        strengths1, strengths2 = (s.sort(-1, descending=True).values for s in (strengths1, strengths2))
    difference = (strengths1[..., :size] - strengths2[..., :size]).abs()
    if num_nodes is not None:
        difference = difference * (torch.arange(size, device=difference.device) < num_nodes.unsqueeze(-1))
    return difference.sum(-1)


def matched_graph_bound(
    student_values: Tensor,
    student_ids: Tensor,
    source_values: Tensor,
    source_ids: Tensor,
    student_mask: Tensor | None = None,
    source_mask: Tensor | None = None,
    *,
    source_to_student: Tensor | None = None,
) -> Tensor:
    """Compare the node strengths of two co-activation graphs over token ids, each token with itself.

        Σ_v |f_C(v) − f_D(v)|,        (1/n) Σ_v |f_C(v) − f_D(v)| ≤ √( (1/n²) Σ_uv (C_uv − D_uv)² )

    with C and D over the n tokens that either side kept, of those that both vocabularies have. It bounds from below how
    much the edges differ in the matching of each token to itself, and is at least the sorted bound of the two graphs:
    that one does not see which tokens are strong. Nothing of the size of a vocabulary but one mask is made.

    Args:
        student_values: (..., T, k); see `top_k_values`.
        student_ids: (..., T, k), k different ids at each position.
        source_values: (..., U, k). No gradient reaches it.
        source_ids: (..., U, k).
        student_mask: (..., T) positions that count; None is all.
        source_mask: (..., U), in the same way.
        source_to_student: (W,) of `match_vocabularies`: tokens without a partner are left out of both graphs, and
            values of several with one partner are added up. None is one vocabulary.

    Returns:
        (...), in units of the graphs; 0 for equal graphs, and where no token is left.

    Example:
        >>> values, ids = torch.tensor([[2.0, 1.0]]), torch.tensor([[7, 5]])
        >>> matched_graph_bound(values, ids, values, ids), matched_graph_bound(values, ids, values, ids.flip(-1))
        (tensor(0.), tensor(3.))
        >>> matched_graph_bound(values, ids, values, torch.tensor([[1, 0]]), source_to_student=torch.tensor([-1, 7]))
        tensor(0.)
    """
    source_values, is_shared = source_values.detach(), torch.ones_like(student_ids, dtype=torch.bool)
    if source_to_student is not None:
        table = source_to_student.to(source_ids.device)
        source_ids, is_shared = table[source_ids], _is_among(student_ids, table)
    shares, ids, counts = zip(
        _shares(student_values, student_ids, is_shared, student_mask),
        _shares(source_values, source_ids, source_ids >= 0, source_mask),
        strict=True,
    )
    # Each side is summed by itself, so that equal sides are at 0 to the bit, and their gradient is 0.
    both = torch.stack([F.pad(shares[0], (0, shares[1].shape[-1])), F.pad(shares[1], (shares[0].shape[-1], 0))])
    sums, num_nodes = sums_by_id(both, torch.cat(ids, -1), torch.cat(counts, -1))
    return (sums[0] - sums[1]).abs().sum(-1) / num_nodes.clamp(min=1)


def _is_among(ids: Tensor, table: Tensor) -> Tensor:
    """Return which ids are among the values of a table."""
    if may_read(table):  # a mask of the size of the vocabulary, which is faster than sorting
        found = torch.zeros(int(max(table.max(), ids.max())) + 1, dtype=torch.bool, device=table.device)
        found[table[table >= 0]] = True
        return found[ids]
    ordered = table.sort().values
    return ordered[torch.searchsorted(ordered, ids.contiguous()).clamp(max=len(ordered) - 1)] == ids


def top_k_uld(student: TopKLogits, teacher: TopKLogits, *, values: LogitValues = "softmax") -> Tensor:
    """Compute the token-wise loss Σ_i |f_t↓(i) − f_s↓(i)| of positions that are aligned already.

    For probabilities, the tails are compared as one more value. As |tail_t − tail_s| ≤ Σ_{i>k} |p_t↓(i) − p_s↓(i)|, the
    sum stays a lower bound of that over the whole vocabulary, and is equal to it if k is V.

    Args:
        student: (..., k).
        teacher: (..., k) of the same shape; a longer k is cut.
        values: see `top_k_values`.

    Returns:
        (...), for `softmax` in [0, 2].
    """
    f_s, f_t = top_k_values(student, values), top_k_values(teacher, values)
    size = min(f_s.shape[-1], f_t.shape[-1])
    loss = (f_t[..., :size].detach() - f_s[..., :size]).abs().sum(-1)
    if values != "softmax":
        return loss
    # What either model kept beyond the shorter k belongs to its tail.
    left_out = [top.tail + probs[..., size:].sum(-1) for top, probs in ((teacher, f_t.detach()), (student, f_s))]
    return loss + (left_out[0] - left_out[1]).abs()


def uld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    top_k: int | None = None,
    values: LogitValues = "softmax",
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute universal logit distillation [1] of aligned positions: the ℓ1 distance of sorted values.

    The vocabularies may differ.

    Args:
        student_logits: (..., V_s) in nats.
        teacher_logits: (..., V_t) of the same positions; V_t may differ from V_s. No gradient reaches them.
        mask: (...) positions that count; None is all.
        top_k: compare the k largest values, and for `softmax` the tails; None sorts the whole vocabularies, the smaller
            one filled up with probabilities of 0, or both cut to the smaller one for the other `values`.
        values: see `top_k_values`.
        temperature: τ > 0.
        reduction: over positions.

    Returns:
        At least float32; a scalar, or (...) for `none`.

    Raises:
        ValueError: If positions do not agree, or `top_k` is above a vocabulary.

    Example:
        >>> uld_loss(torch.zeros(1, 2), torch.zeros(1, 4))  # |1/2 − 1/4| twice, then |0 − 1/4| twice
        tensor(1.)
        >>> uld_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]]))
        tensor(0.)
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            "Expected `student_logits` and `teacher_logits` of the same positions, but got shapes"
            f" {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}. Align them first."
        )
    sizes = student_logits.shape[-1], teacher_logits.shape[-1]
    kept = sizes if top_k is None else (top_k, top_k)
    student = top_k_logits(student_logits, kept[0], temperature=temperature)
    teacher = top_k_logits(teacher_logits.detach(), kept[1], temperature=temperature)
    if top_k is None and values == "softmax":
        student, teacher = (_filled_up(top, max(sizes)) for top in (student, teacher))
    losses = top_k_uld(student, teacher, values=values)
    return reduce_tokens(losses, torch.ones_like(losses, dtype=torch.bool) if mask is None else mask, reduction)


def _filled_up(top: TopKLogits, size: int) -> TopKLogits:
    """Fill up with tokens that the vocabulary does not have, of probability 0."""
    missing = (0, size - top.log_probs.shape[-1])
    return top._replace(log_probs=F.pad(top.log_probs, missing, value=-torch.inf))


def _shares(values: Tensor, token_ids: Tensor, is_kept: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return what each kept value adds to the row sum of its node, ids, and which of them count: (..., T·k) each."""
    values, count = _counted(values, mask)
    values = values.masked_fill(~is_kept, 0.0)
    shares = values * values.sum(-1, keepdim=True) / count.unsqueeze(-1).unsqueeze(-1)
    counts = is_kept if mask is None else is_kept & mask.unsqueeze(-1)
    return shares.flatten(-2), token_ids.flatten(-2), counts.flatten(-2)


def _counted(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return values in at least float32, 0 where they do not count, and (...) how many positions count, at least 1."""
    values = at_least_float32(values)
    if mask is None:
        return values, torch.full(values.shape[:-2], max(1, values.shape[-2]), device=values.device)
    if mask.shape != values.shape[:-1]:
        raise ValueError(
            f"Expected `mask` of shape {tuple(values.shape[:-1])}, that of the positions, but got {tuple(mask.shape)}."
        )
    return values.masked_fill(~mask.unsqueeze(-1), 0.0), mask.sum(-1).clamp(min=1)
