"""Vector-quantised logits in two levels: a softmax over clusters, and one over the tokens of a cluster.

A token belongs to a cluster M(v), and owns a code M_s(v) of each of S codebooks that all clusters share:

    l = h Cᵀ + β      z_v = Σ_s ⟨h, C_s[M_s(v)]⟩ + b_v
    p(v | h) = softmax(l)_{M(v)} · exp(z_v) / Σ_{u: M(u) = M(v)} exp(z_u)

Every token has logits of its own, and the loss looks at the members of the label's cluster alone: it takes
O(N·(K + L)·d + N·m·S) time, and makes no tensor of the size (N, V). It is exact for every mapping.

Letters: N tokens, d hidden size, V vocabulary, K clusters, m members of the largest, S stages with L codes in all.

References:
    [0]: Classes for fast maximum entropy training (Goodman), 2001: the two-level softmax. Its shared codes are ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_logits.functional.checks import check_labels, check_token_to_code
from lit_logits.functional.chunks import chunked_rows, rows_a_chunk
from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.functional.reductions import Reduction, reduce_tokens
from lit_logits.functional.vq_logits import code_logits

__all__ = [
    "ClusterLayout",
    "cluster_layout",
    "hierarchical_cross_entropy",
    "hierarchical_greedy",
    "hierarchical_log_probs",
    "hierarchical_sample",
]

_CLUSTERS_AT_ONCE = 8


class ClusterLayout(NamedTuple):
    """The mapping as tables that are read by cluster.

    Attributes:
        token_to_cluster: (V,) int64 in [0, K).
        members: (K, m) int64, the tokens of each cluster in rising order, V after the last.
        columns: (K, m, S) int64 in [0, L), their codes in all codebooks laid end to end; 0 after the last.
        places: (V,) int64, where in its cluster each token stands.
    """

    token_to_cluster: Tensor
    members: Tensor
    columns: Tensor
    places: Tensor


def cluster_layout(
    token_to_cluster: Tensor, token_codes: Tensor, num_clusters: int, stage_sizes: Sequence[int]
) -> ClusterLayout:
    """Return the tables of a mapping.

    Args:
        token_to_cluster: (V,) int64 in [0, K).
        token_codes: (V, S) int64, of stage s in [0, K_s).
        num_clusters: K.
        stage_sizes: K_s.

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


def hierarchical_cross_entropy(
    hidden: Tensor,
    clusters: Tensor,
    codes: Tensor,
    layout: ClusterLayout,
    labels: Tensor,
    *,
    cluster_bias: Tensor,
    token_bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the exact next-token cross-entropy −log p(y | h) without a tensor of the size (N, V).

    Args:
        hidden: (..., d).
        clusters: (K, d) C.
        codes: (L, d), the codebooks C_s laid end to end.
        layout: the mapping.
        labels: (...) token ids in [0, V) or `ignore_index`.
        cluster_bias: (K,) β in nats.
        token_bias: (V,) b in nats; default 0.
        ignore_index: label of tokens that do not count.
        reduction: `mean` over the tokens that count (0 if none does), `sum` or `none`.

    Returns:
        Nats, at least float32; a scalar, or (...) for `none`.

    Raises:
        ValueError: If labels have another shape, or one is out of range (checked in host memory only).

    Example:
        >>> layout = cluster_layout(torch.tensor([1, 0, 1]), torch.tensor([[0], [0], [1]]), 2, [2])
        >>> zeros = torch.zeros(2, 4)
        >>> hierarchical_cross_entropy(zeros, zeros, zeros, layout, torch.tensor([0, 1]), cluster_bias=torch.zeros(2),
        ...     reduction="none")  # ½ · ½ and ½ · 1
        tensor([1.3863, 0.6931])
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"Expected `labels` to have shape {tuple(hidden.shape[:-1])}, one for each hidden state, but got"
            f" {tuple(labels.shape)}."
        )
    check_labels(labels, len(layout.places), ignore_index=ignore_index)
    mask = labels != ignore_index
    bias = _padded_bias(layout, token_bias, clusters)

    def losses(rows: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        own = layout.token_to_cluster[tokens]
        outer = _cluster_log_probs(rows, clusters, cluster_bias, layout).gather(-1, own.unsqueeze(1))
        inner = F.log_softmax(_member_logits(code_logits(rows, codes), own, layout, bias), -1)
        return (-(outer + inner.gather(-1, layout.places[tokens].unsqueeze(1))).squeeze(1),)

    rows, tokens = hidden.reshape(-1, hidden.shape[-1]), labels.masked_fill(~mask, 0).reshape(-1)
    # Columns and logits of a cluster's members are the largest tensors, and int64 counts twice.
    chunk_size = rows_a_chunk(len(clusters) + len(codes) + 3 * layout.columns[0].numel())
    (values,) = chunked_rows(losses, rows, tokens, chunk_size=chunk_size)
    return reduce_tokens(values.reshape(labels.shape), mask, reduction)


def hierarchical_log_probs(
    hidden: Tensor,
    clusters: Tensor,
    codes: Tensor,
    layout: ClusterLayout,
    *,
    cluster_bias: Tensor,
    token_bias: Tensor | None = None,
) -> Tensor:
    """Return log p(v | h) of all tokens (..., V), in nats. Arguments as in `hierarchical_cross_entropy`.

    It is what other output layers give as logits, and already normalised.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    outer = _cluster_log_probs(rows, clusters, cluster_bias, layout)
    stages, bias = code_logits(rows, codes), _padded_bias(layout, token_bias, clusters)
    # By cluster, padding with it, so that the inner softmax is along a dimension; then back into the order of tokens.
    inner = sum(stages[:, columns] for columns in layout.columns.unbind(-1)) + bias[layout.members]
    # A cluster without members has a softmax of NaN, which is not read; the mask keeps it from the gradients.
    padding = layout.members == len(layout.places)
    joint = outer.unsqueeze(-1) + F.log_softmax(inner.masked_fill(padding, -torch.inf), -1)
    values = joint[:, layout.token_to_cluster, layout.places]
    return values.reshape(*hidden.shape[:-1], -1)


@torch.no_grad()
def hierarchical_greedy(
    hidden: Tensor,
    clusters: Tensor,
    codes: Tensor,
    layout: ClusterLayout,
    *,
    cluster_bias: Tensor,
    token_bias: Tensor | None = None,
) -> Tensor:
    """Return the most likely tokens (...), exactly, without logits of all tokens.

    No token is likelier than its cluster, so clusters are opened from the likeliest on, until the best token found is
    as likely as the next cluster. Arguments as in `hierarchical_cross_entropy`; ties go to the likelier cluster, and in
    it to the lower id.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    outer = _cluster_log_probs(rows, clusters, cluster_bias, layout)
    bounds, order = outer.sort(dim=-1, descending=True, stable=True)
    stages, bias = code_logits(rows, codes), _padded_bias(layout, token_bias, clusters)
    best = rows.new_full((len(rows),), -torch.inf, dtype=outer.dtype)
    tokens = order.new_zeros(len(rows))
    open_rows = torch.arange(len(rows), device=rows.device)
    for start in range(0, len(clusters), _CLUSTERS_AT_ONCE):
        chosen = order[open_rows, start : start + _CLUSTERS_AT_ONCE]
        width = chosen.shape[1]
        inner = _member_logits(stages[open_rows].repeat_interleave(width, 0), chosen.reshape(-1), layout, bias)
        inside, places = F.log_softmax(inner, -1).nan_to_num(nan=-torch.inf).max(-1)  # NaN of clusters without members
        joint = bounds[open_rows, start : start + width] + inside.view(-1, width)
        values, at = joint.max(-1)
        better = values > best[open_rows]
        found = layout.members[chosen, places.view(-1, width)].gather(1, at.unsqueeze(1)).squeeze(1)
        best[open_rows] = torch.where(better, values, best[open_rows])
        tokens[open_rows] = torch.where(better, found, tokens[open_rows])
        if start + width >= len(clusters):
            break
        open_rows = open_rows[best[open_rows] < bounds[open_rows, start + width]]
        if len(open_rows) == 0:
            break
    return tokens.reshape(hidden.shape[:-1])


@torch.no_grad()
def hierarchical_sample(
    hidden: Tensor,
    clusters: Tensor,
    codes: Tensor,
    layout: ClusterLayout,
    *,
    cluster_bias: Tensor,
    token_bias: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return tokens (...) drawn from p(v | h): a cluster, then a token of it. Arguments as in the loss."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    outer = _cluster_log_probs(rows, clusters, cluster_bias, layout)
    drawn = torch.multinomial(outer.exp(), 1, generator=generator).squeeze(1)
    bias = _padded_bias(layout, token_bias, clusters)
    inner = F.softmax(_member_logits(code_logits(rows, codes), drawn, layout, bias), -1)
    places = torch.multinomial(inner, 1, generator=generator).squeeze(1)
    return layout.members[drawn, places].reshape(hidden.shape[:-1])


def _cluster_log_probs(rows: Tensor, clusters: Tensor, cluster_bias: Tensor, layout: ClusterLayout) -> Tensor:
    """Return log softmax(l) (N, K); clusters without members have none of the probability."""
    empty = layout.members[:, 0] == len(layout.places)
    return F.log_softmax(code_logits(rows, clusters, cluster_bias.masked_fill(empty, -torch.inf)), -1)


def _member_logits(stages: Tensor, own: Tensor, layout: ClusterLayout, bias: Tensor) -> Tensor:
    """Return z (N, m) of the members of one cluster a row, −inf after the last, from the logits (N, L) of all codes."""
    columns = layout.columns[own]
    picked = stages.gather(1, columns.flatten(1)).view(columns.shape)
    return picked.sum(-1) + bias[layout.members[own]]


def _padded_bias(layout: ClusterLayout, token_bias: Tensor | None, like: Tensor) -> Tensor:
    """Return the bias (V + 1,) with −inf for the token V, which stands where clusters have no more members."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    none = torch.full((1,), -torch.inf, dtype=dtype, device=like.device)
    if token_bias is None:
        return torch.cat([none.new_zeros(len(layout.places)), none])
    return torch.cat([token_bias.to(dtype), none])
