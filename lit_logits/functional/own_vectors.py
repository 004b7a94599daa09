"""A vector for each token within its cluster, with which training may begin, and the codes that take its place.

    p(v | h) = softmax(h Cᵀ + β)_{M(v)} · exp(⟨h, u_v⟩ + b_v) / Σ_{w: M(w) = M(v)} exp(⟨h, u_w⟩ + b_w)

This is the class-based softmax [0]: its loss takes O(N·(K + m)·d), where a dense layer takes O(N·V·d). In a long
training tokens that share codes learn less than tokens that own vectors. So vectors are trained first, and coded near
the end.

Letters: N tokens, d hidden size, V vocabulary, K clusters, m members of the largest, S stages of L codes, G groups.

References:
    [0]: Classes for fast maximum entropy training (Goodman), 2001. That codes follow is ours.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_logits.functional.hierarchical_vq import ClusterLayout, HierarchicalCodes, cluster_layout, two_level_loss
from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.functional.reductions import Reduction, at_least_float32, soft_cap
from lit_logits.functional.residual_codes import fit_residual_codes, metric_matrix

__all__ = ["VectorCodes", "code_vectors", "own_vector_cross_entropy", "own_vector_layout"]


def own_vector_layout(token_to_cluster: Tensor, num_clusters: int) -> ClusterLayout:
    """Return the tables for `codes` (V, d) that hold a row for each token, cluster after cluster.

    Args:
        token_to_cluster: (V,) int64 in [0, K).
        num_clusters: K.

    Example:
        >>> own_vector_layout(torch.tensor([1, 0, 1]), 2).columns.squeeze(-1)
        tensor([[0, 0],
                [1, 2]])
    """
    rows = torch.empty_like(token_to_cluster)
    rows[token_to_cluster.argsort(stable=True)] = torch.arange(len(rows), device=rows.device)
    return cluster_layout(token_to_cluster, rows.unsqueeze(1), num_clusters, [len(rows)])


def own_vector_cross_entropy(
    hidden: Tensor,
    head: HierarchicalCodes,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the exact cross-entropy −log p(y | h) in nats, each label beside the members of its cluster alone.

    Equal to `hierarchical_cross_entropy` of the same head, which would make logits (N, V).

    Args:
        hidden: (..., d).
        head: its codes are (V, d), in the order of `own_vector_layout`, which is its layout.
        labels: (...) token ids in [0, V) or `ignore_index`.
        ignore_index: label of tokens that do not count.
        reduction: `mean` over the tokens that count (0 if none does), `sum` or `none`.

    Returns:
        Nats, at least float32; a scalar, or (...) for `none`.

    Raises:
        ValueError: If labels have another shape, or one is out of range (checked in host memory only).

    Example:
        >>> layout = own_vector_layout(torch.tensor([1, 0, 1]), 2)
        >>> head = HierarchicalCodes(torch.zeros(2, 4), torch.zeros(3, 4), layout, cluster_bias=torch.zeros(2))
        >>> own_vector_cross_entropy(torch.zeros(2, 4), head, torch.tensor([0, 1]), reduction="none")  # ½ · ½, ½ · 1
        tensor([1.3863, 0.6931])
    """
    layout = head.layout
    is_member = layout.members < len(layout.places)
    sizes = is_member.sum(1).tolist()
    bias = None if head.token_bias is None else head.token_bias[layout.members[is_member]]

    def inner(rows: Tensor, own: Tensor, places: Tensor) -> Tensor:
        order = own.argsort(stable=True)
        counts = torch.bincount(own, minlength=len(sizes)).tolist()
        joined = _OwnLogProbs.apply(rows[order], head.codes, bias, places[order], counts, sizes, head.cap)
        return torch.empty_like(joined).index_copy(0, order, joined)

    width = layout.members.shape[1]
    return two_level_loss(inner, hidden, head, labels, width=width, ignore_index=ignore_index, reduction=reduction)


class _OwnLogProbs(torch.autograd.Function):
    """log p(token | its cluster, h) (N,) of rows that stand cluster after cluster, as the vectors (V, d) do.

    Each cluster is a product of two matrices. A Function of its own, as it writes the gradient (V, d) in place, and
    autograd would make the parts of all clusters and join them: twice the memory, and most of the time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        vectors: Tensor,
        bias: Tensor | None,
        places: Tensor,
        counts: list[int],
        sizes: list[int],
        cap: float | None,
    ) -> Tensor:
        dtype = F.linear(rows[:0], vectors[:0]).dtype  # what autocast makes of them
        rows = rows.to(dtype)
        ctx.counts, ctx.sizes, ctx.cap = counts, sizes, cap
        values = rows.new_empty(len(rows), dtype=torch.promote_types(dtype, torch.float32))
        logits = []
        for some, tokens in _clusters(counts, sizes):
            found = soft_cap(at_least_float32(F.linear(rows[some], vectors[tokens].to(dtype))), cap)
            shifted = found if bias is None else found + bias[tokens]
            values[some] = shifted.gather(1, places[some].unsqueeze(1)).squeeze(1) - shifted.logsumexp(-1)
            logits.append(found)
        ctx.save_for_backward(rows, vectors, bias, places, *logits)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, vectors, bias, places, *logits = ctx.saved_tensors
        grad_rows = torch.empty_like(rows)
        grad_vectors = torch.empty_like(vectors) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.zeros_like(bias)
        end = 0
        for (some, tokens), found in zip(_clusters(ctx.counts, ctx.sizes), logits, strict=True):
            level = grad[some].unsqueeze(1)
            step = torch.softmax(found if bias is None else found + bias[tokens], -1) * -level
            step.scatter_add_(1, places[some].unsqueeze(1), level)
            if grad_bias is not None:
                grad_bias[tokens] = step.sum(0)
            if ctx.cap is not None:
                step = step * (1 - (found / ctx.cap) ** 2)
            step = step.to(rows.dtype)
            grad_rows[some] = step @ vectors[tokens].to(rows.dtype)
            if grad_vectors is not None:
                grad_vectors[end : tokens.start] = 0  # clusters without a label
                if grad_vectors.dtype == rows.dtype:
                    torch.mm(step.T, rows[some], out=grad_vectors[tokens])
                else:
                    grad_vectors[tokens] = step.T @ rows[some]
                end = tokens.stop
        if grad_vectors is not None:
            grad_vectors[end:] = 0
        return grad_rows, grad_vectors, grad_bias, None, None, None, None


def _clusters(counts: list[int], sizes: list[int]) -> Iterator[tuple[slice, slice]]:
    """Yield where the rows of each cluster that has any stand, and where its tokens do."""
    row = token = 0
    for count, size in zip(counts, sizes, strict=True):
        if count:
            yield slice(row, row + count), slice(token, token + size)
        row, token = row + count, token + size


class VectorCodes(NamedTuple):
    """Result of `code_vectors`.

    Attributes:
        codes: (S · L, d), the codebooks of the stages one after another.
        token_codes: (V, G · S) int64 in [0, L): the stages of the first group, then of the second, etc.
        bias_shift: (V,) nats to add to the token bias, for the mean of the hidden states.
        error: share of the weighted variance of the logits within clusters that is lost.
    """

    codes: Tensor
    token_codes: Tensor
    bias_shift: Tensor
    error: float


def code_vectors(
    vectors: Tensor,
    token_to_cluster: Tensor,
    num_clusters: int,
    *,
    codebook_size: int,
    num_stages: int,
    num_groups: int,
    token_weights: Tensor,
    hidden_mean: Tensor,
    hidden_second_moment: Tensor,
    has_bias: bool = True,
    shift: bool = True,
    generator: torch.Generator | None = None,
    progress_bar: bool = False,
) -> VectorCodes:
    """Fit shared codes to vectors of tokens, in what an error of their logits costs; see `fit_residual_codes`.

    A bias takes up the mean of an error, so that its spread over hidden states is what counts: the metric is their
    covariance, or E[h hᵀ] without a bias. What all vectors of a cluster have in common cancels in its softmax, and is
    left out.

    Args:
        vectors: (V, d), in the order of tokens.
        token_to_cluster: (V,) int64 in [0, K).
        num_clusters: K.
        codebook_size: L, codes a stage, which every group has.
        num_stages: S.
        num_groups: G, a divisor of d.
        token_weights: (V,) what an error costs, non-negative.
        hidden_mean: (d,) E[h].
        hidden_second_moment: (d, d) E[h hᵀ].
        has_bias: whether tokens have a bias.
        shift: leave out the mean of a cluster; not under a cap, where it does not cancel.
        generator: source of randomness, on the device of `vectors`.
        progress_bar: show one line of progress on a terminal.

    Raises:
        ValueError: See `fit_residual_codes`.

    Example:
        >>> vectors, moment = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0]]), torch.eye(2)
        >>> found = code_vectors(vectors, torch.tensor([0, 0, 0]), 1, codebook_size=2, num_stages=1, num_groups=2,
        ...     token_weights=torch.ones(3), hidden_mean=torch.zeros(2), hidden_second_moment=moment)
        >>> found.codes.shape, found.token_codes.shape, round(found.error, 4)
        (torch.Size([2, 2]), torch.Size([3, 2]), 0.0)
    """
    weights = token_weights.to(vectors)
    if shift:
        mass = weights.new_zeros(num_clusters).index_add_(0, token_to_cluster, weights)
        sums = vectors.new_zeros(num_clusters, vectors.shape[1])
        sums.index_add_(0, token_to_cluster, weights.unsqueeze(1) * vectors)
        tiny = torch.finfo(weights.dtype).tiny
        vectors = vectors - (sums / mass.clamp(min=tiny).unsqueeze(1))[token_to_cluster]
    mean, moment = hidden_mean.double(), hidden_second_moment.double()
    moment = metric_matrix(moment - torch.outer(mean, mean) if has_bias else moment, "full", num_groups)
    found = fit_residual_codes(
        vectors,
        codebook_size,
        num_groups=num_groups,
        token_stages=torch.full((len(vectors),), num_stages, device=vectors.device),
        token_weights=weights,
        metric=moment,
        num_sweeps=_NUM_SWEEPS,
        generator=generator,
        progress_bar=progress_bar,
    )
    token_codes = found.codes.view(num_stages, len(vectors), num_groups).permute(1, 2, 0)
    which = torch.arange(num_groups, device=vectors.device)
    rows = sum(found.codebooks[stage, which, token_codes[..., stage]].flatten(1) for stage in range(num_stages))
    error = rows - vectors
    total = _weighted_square(vectors, weights, moment)
    return VectorCodes(
        found.codebooks.transpose(1, 2).flatten(2).flatten(0, 1),
        token_codes.flatten(1),
        -(error @ mean.to(error)) if has_bias else torch.zeros_like(weights),
        _weighted_square(error, weights, moment) / total if total else 0.0,
    )


_NUM_SWEEPS = 8


def _weighted_square(vectors: Tensor, weights: Tensor, metric: Tensor) -> float:
    vectors = vectors.double()
    return float((weights.double() * ((vectors @ metric) * vectors).sum(-1)).sum())
