"""Vector-quantised logits in two levels: a softmax over clusters, and one over the tokens of a cluster.

A token belongs to a cluster M(v), and owns a code M_s(v) of each of S codebooks that all clusters share:

    l = h Cᵀ + β      z_v = Σ_s ⟨h, C_s[M_s(v)]⟩ + b_v
    p(v | h) = softmax(l)_{M(v)} · exp(z_v) / Σ_{u: M(u) = M(v)} exp(z_u)

Every token has logits of its own, and the loss looks at the members of the label's cluster alone: it takes
O(N·(K + L)·d + N·m·S) time, and makes no tensor of the size (N, V). It is exact for every mapping.

A soft cap c, as of Gemma-2, bounds ⟨h, C_k⟩ and Σ_s ⟨h, C_s[M_s(v)]⟩ each, before the bias of its level is added:
c · tanh(· / c). The two levels stay two softmaxes, so all of this holds with a cap too.

With G groups the d dimensions of C_s are cut into G parts, and a token owns a code of each part: S · G codes instead
of S from as many floats, and G times the sums over them. Each part is a stage below, of logits ⟨h_g, C_{s,g}[·]⟩.

Letters: N tokens, d hidden size, V vocabulary, K clusters, m members of the largest, S stages with L codes in all.

References:
    [0]: Classes for fast maximum entropy training (Goodman), 2001: the two-level softmax. Its shared codes are ours.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_logits.functional.checks import check_labels, check_token_to_code
from lit_logits.functional.chunks import chunked_rows, rows_a_chunk
from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.functional.reductions import Reduction, at_least_float32, reduce_tokens, soft_cap, true_places
from lit_logits.functional.residual_vq import DenseTarget, ResidualVQLosses, check_target
from lit_logits.functional.vq_logits import code_logits

__all__ = [
    "ClusterLayout",
    "HierarchicalCodes",
    "cluster_layout",
    "gather_codes",
    "hierarchical_cross_entropy",
    "hierarchical_log_probs",
    "hierarchical_losses",
    "spread_codes",
]


class ClusterLayout(NamedTuple):
    """The mapping as tables that are read by cluster.

    Attributes:
        token_to_cluster: (V,) int64 in [0, K).
        members: (K, m) int64, the tokens of each cluster in rising order, V after the last.
        columns: (K, m, S · G) int64 in [0, G · L), their codes in all codebooks laid end to end; 0 after the last.
        places: (V,) int64, where in its cluster each token stands.
    """

    token_to_cluster: Tensor
    members: Tensor
    columns: Tensor
    places: Tensor


class HierarchicalCodes(NamedTuple):
    """Two levels of codes.

    Attributes:
        clusters: (K, d) C.
        codes: (L, d), the codebooks C_s laid end to end.
        layout: the mapping; with G groups its stages are those of the first group, then those of the second, etc.
        cluster_bias: (K,) β in nats.
        token_bias: (V,) b in nats; None is 0.
        cap: c of the soft cap of both levels, or None.
        num_groups: G.
    """

    clusters: Tensor
    codes: Tensor
    layout: ClusterLayout
    cluster_bias: Tensor
    token_bias: Tensor | None = None
    cap: float | None = None
    num_groups: int = 1


def cluster_layout(
    token_to_cluster: Tensor, token_codes: Tensor, num_clusters: int, stage_sizes: Sequence[int]
) -> ClusterLayout:
    """Return the tables of a mapping.

    Args:
        token_to_cluster: (V,) int64 in [0, K).
        token_codes: (V, S) int64, of stage s in [0, K_s); (V, G · S) of G groups, one after another.
        num_clusters: K.
        stage_sizes: K_s; G times with groups.

    Raises:
        ValueError: If a cluster or a code is out of range.

    Example:
        >>> layout = cluster_layout(torch.tensor([1, 0, 1]), torch.tensor([[0], [0], [1]]), 2, [2])
        >>> layout.members
        tensor([[1, 3],
                [0, 2]])
    """
    vocab_size, num_stages = token_codes.shape
    check_token_to_code(token_to_cluster, vocab_size, num_clusters)
    for codes, size in zip(token_codes.T, stage_sizes, strict=True):
        check_token_to_code(codes, vocab_size, size)
    sizes = torch.bincount(token_to_cluster, minlength=num_clusters)
    order = token_to_cluster.argsort(stable=True)
    starts = sizes.cumsum(0) - sizes
    places = torch.empty_like(order)
    places[order] = torch.arange(vocab_size, device=order.device) - starts[token_to_cluster[order]]
    members = order.new_full((num_clusters, int(sizes.max())), vocab_size)
    members[token_to_cluster, places] = torch.arange(vocab_size, device=order.device)
    offsets = torch.tensor([0, *stage_sizes[:-1]], device=order.device).cumsum(0)
    columns = order.new_zeros(*members.shape, num_stages)
    columns[token_to_cluster, places] = token_codes + offsets
    return ClusterLayout(token_to_cluster, members, columns, places)


def spread_codes(codes: Tensor, num_groups: int) -> Tensor:
    """Return the codes of each group as vectors (G · L, d) of all dimensions, 0 outside of the group.

    Example:
        >>> spread_codes(torch.tensor([[1.0, 2.0]]), 2)
        tensor([[1., 0.],
                [0., 2.]])
    """
    size, width = codes.shape[1], codes.shape[1] // num_groups
    mask = torch.eye(num_groups, dtype=codes.dtype, device=codes.device).repeat_interleave(width, 1)
    return (codes * mask.unsqueeze(1)).view(-1, size)


def gather_codes(spread: Tensor, num_groups: int) -> Tensor:
    """Return codes (L, d) that `spread_codes` gives; what stands outside of the groups is lost."""
    groups = spread.view(num_groups, -1, spread.shape[1])
    parts = [part.chunk(num_groups, -1)[group] for group, part in enumerate(groups)]
    return torch.cat(parts, -1)


def hierarchical_cross_entropy(
    hidden: Tensor,
    head: HierarchicalCodes,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the exact next-token cross-entropy −log p(y | h) without a tensor of the size (N, V).

    Args:
        hidden: (..., d).
        head: the codes.
        labels: (...) token ids in [0, V) or `ignore_index`.
        ignore_index: label of tokens that do not count.
        reduction: `mean` over the tokens that count (0 if none does), `sum` or `none`.

    Returns:
        Nats, at least float32; a scalar, or (...) for `none`.

    Raises:
        ValueError: If labels have another shape, or one is out of range (checked in host memory only).

    Example:
        >>> layout = cluster_layout(torch.tensor([1, 0, 1]), torch.tensor([[0], [0], [1]]), 2, [2])
        >>> head = HierarchicalCodes(torch.zeros(2, 4), torch.zeros(2, 4), layout, cluster_bias=torch.zeros(2))
        >>> hierarchical_cross_entropy(torch.zeros(2, 4), head, torch.tensor([0, 1]), reduction="none")  # ½ · ½, ½ · 1
        tensor([1.3863, 0.6931])
    """
    layout = head.layout

    def inner(rows: Tensor, own: Tensor, places: Tensor) -> Tensor:
        return member_log_probs(rows, own, head).gather(-1, places.unsqueeze(1)).squeeze(1)

    # Columns and logits of a cluster's members are the largest tensors, and int64 counts twice.
    width = head.num_groups * len(head.codes) + 3 * layout.columns[0].numel()
    return two_level_loss(inner, hidden, head, labels, width=width, ignore_index=ignore_index, reduction=reduction)


def hierarchical_log_probs(hidden: Tensor, head: HierarchicalCodes) -> Tensor:
    """Return log p(v | h) of all tokens (..., V), in nats, of hidden states (..., d).

    It is what other output layers give as logits, and already normalised.
    """
    layout, rows = head.layout, hidden.reshape(-1, hidden.shape[-1])
    outer, stages = cluster_log_probs(rows, head), stage_logits(rows, head)
    # By cluster, padding with it, so that the inner softmax is along a dimension; then back into the order of tokens.
    # `index_select` has a faster backward than an index.
    picked = sum(stages.index_select(1, columns.flatten()) for columns in layout.columns.unbind(-1))
    inner = soft_cap(cast(Tensor, picked), head.cap).view(-1, *layout.members.shape) + padded_bias(head)[layout.members]
    # A cluster without members has a softmax of NaN, which is not read; the mask keeps it from the gradients.
    padding = layout.members == len(layout.places)
    joint = outer.unsqueeze(-1) + F.log_softmax(inner.masked_fill(padding, -torch.inf), -1)
    values = joint.flatten(1).index_select(1, layout.token_to_cluster * padding.shape[1] + layout.places)
    return values.reshape(*hidden.shape[:-1], len(layout.places))


def hierarchical_losses(
    hidden: Tensor,
    head: HierarchicalCodes,
    labels: Tensor,
    *,
    target: DenseTarget | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> ResidualVQLosses:
    """Compute cross-entropy and divergence from a dense output layer, exactly, in memory that does not grow with N·V.

    The divergence needs all log-probabilities, ours and the target's. They are made for a chunk of tokens at a time,
    and again in backward. The target gets no gradient.

    Args:
        hidden: (..., d).
        head: the codes.
        labels: (...) token ids in [0, V) or `ignore_index`.
        target: what to measure the divergence from; None leaves it out, and then no (N, V) tensor is made at all.
        ignore_index: label of tokens that do not count.

    Raises:
        ValueError: If labels or target have another shape, or a label is out of range (checked in host memory only).

    Example:
        >>> layout = cluster_layout(torch.tensor([1, 0, 1]), torch.tensor([[0], [0], [1]]), 2, [2])
        >>> head = HierarchicalCodes(torch.zeros(2, 4), torch.zeros(2, 4), layout, cluster_bias=torch.zeros(2))
        >>> target = DenseTarget(torch.zeros(1, 4), torch.zeros(3, 4), torch.tensor([0.25, 0.5, 0.25]).log())
        >>> hierarchical_losses(torch.zeros(1, 4), head, torch.tensor([1]), target=target)
        ResidualVQLosses(cross_entropy=tensor([0.6931]), divergence=tensor([0.]), target_cross_entropy=tensor([0.6931]))
    """
    if target is None:
        values = hierarchical_cross_entropy(hidden, head, labels, ignore_index=ignore_index, reduction="none")
        return ResidualVQLosses(values, torch.zeros_like(values), torch.zeros_like(values))
    layout = head.layout
    _check_labels(hidden, labels, layout, ignore_index)
    check_target(target, labels, len(layout.places))

    def losses(rows: Tensor, target_rows: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        ours, own = hierarchical_log_probs(rows, head), tokens.unsqueeze(1)
        with torch.no_grad():
            theirs = F.log_softmax(_dense_logits(target_rows, target), -1)
        divergence = (theirs.exp() * (theirs - ours)).sum(-1)
        return -ours.gather(1, own).squeeze(1), divergence, -theirs.gather(1, own).squeeze(1)

    # Ignored tokens are dropped before the products, and put back as zeros.
    mask = (labels != ignore_index).flatten()
    where = true_places(mask)  # once, as the host waits to learn how many there are
    counted = [tensor.reshape(-1, tensor.shape[-1])[where] for tensor in (hidden, target.hidden)]
    chunk_size = rows_a_chunk(4 * len(layout.places) + 4 * layout.members.numel())
    found = chunked_rows(losses, *counted, labels.flatten()[where], chunk_size=chunk_size)
    return ResidualVQLosses(
        *(values.new_zeros(mask.shape).index_copy(0, where, values).view(labels.shape) for values in found)
    )


# ---------------------------------------------------------------------- parts


def two_level_loss(
    inner: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    head: HierarchicalCodes,
    labels: Tensor,
    *,
    width: int,
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    """Reduce −log p(cluster | h) − log p(token | cluster, h) over labels, in chunks of rows.

    Args:
        inner: takes rows (N, d), the clusters (N,) of their labels and places (N,) in these, and returns the log of the
            second probability (N,).
        hidden: (..., d).
        head: the codes.
        labels: (...), see `hierarchical_cross_entropy`.
        width: values a row that `inner` makes.
        ignore_index: label of tokens that do not count.
        reduction: see `hierarchical_cross_entropy`.
    """
    layout = head.layout
    _check_labels(hidden, labels, layout, ignore_index)
    mask = labels != ignore_index

    def losses(rows: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        own = layout.token_to_cluster[tokens]
        outer = cluster_log_probs(rows, head).gather(-1, own.unsqueeze(1)).squeeze(1)
        return (-(outer + inner(rows, own, layout.places[tokens])),)

    rows, tokens = hidden.reshape(-1, hidden.shape[-1]), labels.masked_fill(~mask, 0).reshape(-1)
    (values,) = chunked_rows(losses, rows, tokens, chunk_size=rows_a_chunk(len(head.clusters) + width))
    return reduce_tokens(values.reshape(labels.shape), mask, reduction)


def _check_labels(hidden: Tensor, labels: Tensor, layout: ClusterLayout, ignore_index: int) -> None:
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"Expected `labels` to have shape {tuple(hidden.shape[:-1])}, one for each hidden state, but got"
            f" {tuple(labels.shape)}."
        )
    check_labels(labels, len(layout.places), ignore_index=ignore_index)


def cluster_log_probs(rows: Tensor, head: HierarchicalCodes) -> Tensor:
    """Return log softmax(l) (N, K); clusters without members have none of the probability."""
    empty = head.layout.members[:, 0] == len(head.layout.places)
    bias = head.cluster_bias.masked_fill(empty, -torch.inf)
    return F.log_softmax(code_logits(rows, head.clusters, bias, cap=head.cap), -1)


def stage_logits(rows: Tensor, head: HierarchicalCodes) -> Tensor:
    """Return the logits (N, G · L) of the codes of all stages, group after group."""
    groups = zip(rows.chunk(head.num_groups, -1), head.codes.chunk(head.num_groups, -1), strict=True)
    return torch.cat([code_logits(part, codes) for part, codes in groups], -1)


def member_log_probs(hidden: Tensor, own: Tensor, head: HierarchicalCodes) -> Tensor:
    """Return log p(v | own cluster, h) (N, m) of the members of one cluster a row; −inf after the last."""
    return F.log_softmax(member_logits(stage_logits(hidden, head), own, head, padded_bias(head)), -1)


def member_logits(stages: Tensor, own: Tensor, head: HierarchicalCodes, bias: Tensor) -> Tensor:
    """Return z (N, m) of the members of one cluster a row, −inf after the last, from the logits (N, G · L) of codes."""
    columns = head.layout.columns[own]
    picked = stages.gather(1, columns.flatten(1)).view(columns.shape)
    return soft_cap(picked.sum(-1), head.cap) + bias[head.layout.members[own]]


def padded_bias(head: HierarchicalCodes) -> Tensor:
    """Return the bias (V + 1,) with −inf for the token V, which stands where clusters have no more members."""
    dtype = torch.promote_types(head.clusters.dtype, torch.float32)
    none = torch.full((1,), -torch.inf, dtype=dtype, device=head.clusters.device)
    if head.token_bias is None:
        return torch.cat([none.new_zeros(len(head.layout.places)), none])
    return torch.cat([head.token_bias.to(dtype), none])


def _dense_logits(rows: Tensor, target: DenseTarget) -> Tensor:
    """Return the target's logits (N, V), at least float32."""
    logits = soft_cap(at_least_float32(F.linear(rows, target.weight.to(rows.dtype))), target.cap)
    return logits if target.bias is None else logits + target.bias
