"""Re-assignment of tokens to codes by the loss itself, from sums over one pass through the text.

Where the vector of token v moves by Δ, and its bias by −⟨Δ, h̄⟩ so that its mean logit stays, the loss changes by about

    ⟨g_v, Δ⟩ + ½ m_v Δᵀ Σ Δ
    g_v = Σ_n (p_nv − [y_n = v]) (h_n − h̄)      m_v = max(Σ_n p_nv (1 − p_nv), c_v (1 − c_v / N))

The sums are over the positions where v competes: all of them with one level of codes, those whose target is in its
cluster with two. There are N of them, v is the target of c_v, h̄ is the mean of their hidden states, and Σ the
covariance, of which clusters share one. The first term is exact, the second as far as p and h are independent; the
counts bound it where the model does not expect v yet. A dense layer would take the Newton step Δ = −Σ⁻¹ g_v / m_v; here
Δ is the difference between codes, and the best one is taken.

Letters: N positions, d hidden size, V vocabulary, K codes or clusters, S stages with L codes in all.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.checks import check_not_negative, check_token_to_code
from lit_logits.functional.chunks import rows_a_chunk
from lit_logits.functional.distributed import all_reduce_sum_
from lit_logits.functional.hierarchical_vq import HierarchicalCodes, member_log_probs
from lit_logits.functional.vq_logits import code_log_mass, code_logits

__all__ = [
    "CodeReassignment",
    "TokenStatistics",
    "hierarchical_token_statistics",
    "reassign_by_loss",
    "vq_token_statistics",
]

Positions = Iterable[tuple[Tensor, Tensor]]
"""Hidden states (N, d) and the tokens (N,) that follow them, a batch at a time."""


class TokenStatistics(NamedTuple):
    """Sums over all positions of all ranks, where p is the probability of a token among those of its group.

    Tokens of one group compete with each other: they are all tokens, or those of a cluster.

    Attributes:
        gradient: (V, d) Σ_n (p_nv − [y_n = v]) h_n, the gradient of the loss with respect to each token's own vector.
        mass: (V,) Σ_n p_nv, the targets that the model expects.
        variance: (V,) Σ_n p_nv (1 − p_nv).
        counts: (V,) #{y_n = v}, those that came.
        groups: (V,) int64, the group of each token.
        hidden_sum: (G, d) Σ_n h_n over the positions whose target is in the group.
        hidden_moment: (d, d) Σ_n h_n h_nᵀ over all.
    """

    gradient: Tensor
    mass: Tensor
    variance: Tensor
    counts: Tensor
    groups: Tensor
    hidden_sum: Tensor
    hidden_moment: Tensor


class CodeReassignment(NamedTuple):
    """Result of `reassign_by_loss`.

    Attributes:
        token_codes: (V, S) int64.
        bias_shift: (V,) nats to add to each token's bias.
        gain: (V,) by how many nats the loss, summed over positions, is expected to fall through each token.
    """

    token_codes: Tensor
    bias_shift: Tensor
    gain: Tensor


@torch.no_grad()
def vq_token_statistics(
    positions: Positions,
    codebook: Tensor,
    token_to_code: Tensor,
    token_bias: Tensor | None = None,
    *,
    cap: float | None = None,
) -> TokenStatistics:
    """Return the sums for one level of codes, where each token competes with all others.

    Every rank must call it. The slope of a cap, which is near 1 for logits well under it, is taken as 1.

    Args:
        positions: hidden states and targets.
        codebook: (K, d).
        token_to_code: (V,) int64.
        token_bias: (V,) in nats; default 0.
        cap: c of the soft cap of the code logits, or None.
    """
    sums = _zeros(torch.zeros_like(token_to_code), 1, codebook)
    log_mass = code_log_mass(token_to_code, len(codebook), token_bias)
    by_code = torch.zeros_like(codebook, dtype=torch.float32)
    code_mass, code_squares = torch.zeros_like(log_mass), torch.zeros_like(log_mass)
    for hidden, labels in positions:
        probs = code_logits(hidden, codebook, log_mass, cap=cap).softmax(-1)
        by_code.addmm_(probs.T, hidden.float())
        code_mass += probs.sum(0)
        code_squares += probs.square().sum(0)
        _add_targets(sums, hidden.float(), labels)
    # A token's share of its code does not depend on h.
    shares = (-log_mass[token_to_code] if token_bias is None else token_bias - log_mass[token_to_code]).exp()
    sums.gradient.add_(shares.unsqueeze(1) * by_code[token_to_code])
    sums.mass.add_(shares * code_mass[token_to_code])
    sums.variance.add_(sums.mass - shares.square() * code_squares[token_to_code])
    return _over_ranks(sums)


@torch.no_grad()
def hierarchical_token_statistics(positions: Positions, head: HierarchicalCodes) -> TokenStatistics:
    """Return the sums for two levels of codes, where each token competes with those of its cluster.

    Every rank must call it. The slope of a cap, which is near 1 for logits well under it, is taken as 1.

    Args:
        positions: hidden states and targets.
        head: the codes.
    """
    members = head.layout.members
    sizes = (members < len(head.layout.places)).sum(1).tolist()
    sums = _zeros(head.layout.token_to_cluster, len(head.clusters), head.clusters)
    for hidden, labels in positions:
        _add_targets(sums, hidden.float(), labels)
        order = head.layout.token_to_cluster[labels].argsort()
        hidden, labels = hidden[order], labels[order]
        clusters, lengths = head.layout.token_to_cluster[labels].unique_consecutive(return_counts=True)
        groups = zip(clusters.tolist(), hidden.split(lengths.tolist()), strict=True)
        for cluster, rows in groups:  # tokens of one cluster compete, so each product is small
            tokens = members[cluster, : sizes[cluster]]
            own = torch.full((len(rows),), cluster, device=rows.device)
            probs = member_log_probs(rows, own, head)[:, : len(tokens)].exp()
            sums.gradient.index_add_(0, tokens, probs.T @ rows.float())
            sums.mass.index_add_(0, tokens, probs.sum(0))
            sums.variance.index_add_(0, tokens, (probs * (1 - probs)).sum(0))
    return _over_ranks(sums)


@torch.no_grad()
def reassign_by_loss(
    statistics: TokenStatistics,
    codebooks: Sequence[Tensor],
    token_codes: Tensor,
    *,
    has_bias: bool = True,
    min_gain: float = 2.0,
    num_sweeps: int = 2,
    damping: float = 1.0,
) -> CodeReassignment:
    """Give each token the codes that lower the loss most, one stage after another.

    Args:
        statistics: of the present codes.
        codebooks: (K_s, d) for each stage, whose vectors are added.
        token_codes: (V, S) int64, the present codes.
        has_bias: whether the bias of a token can keep its mean logit where it was.
        min_gain: nats, summed over the positions, that a change must gain: a few, as the sums are of a sample.
        num_sweeps: how often the stages are gone through.
        damping: factor of m_v, above 1 for shorter steps: p and h are not independent, and where they are not the step
            of 1 goes too far.

    Raises:
        ValueError: If a code is out of range, or an argument is.

    Example:
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(50, 1)  # the first is followed by 0, the second by 1
        >>> wrong = torch.tensor([1, 0])
        >>> sums = vq_token_statistics([(hidden, torch.tensor([0, 1]).repeat(50))], torch.eye(2), wrong)
        >>> reassign_by_loss(sums, [torch.eye(2)], wrong.unsqueeze(1)).token_codes.squeeze(1)
        tensor([0, 1])
    """
    check_not_negative(min_gain=min_gain, damping=damping)
    if num_sweeps < 1:
        raise ValueError(f"Expected `num_sweeps` to be at least 1, but got {num_sweeps}.")
    for codes, codebook in zip(token_codes.T, codebooks, strict=True):
        check_token_to_code(codes, len(token_codes), len(codebook))
    hidden_sum, groups = statistics.hidden_sum, statistics.groups
    sizes = torch.zeros_like(hidden_sum[:, 0]).index_add_(0, groups, statistics.counts).clamp(min=1)
    means = hidden_sum / sizes.unsqueeze(1)
    moment, gradient = statistics.hidden_moment, statistics.gradient
    if has_bias:
        moment = moment - hidden_sum.T @ means
        gradient = gradient - (statistics.mass - statistics.counts).unsqueeze(1) * means[groups]
    moment = moment / statistics.counts.sum().clamp(min=1)
    expected = statistics.counts * (1 - statistics.counts / sizes[groups])
    weight = damping * torch.maximum(statistics.variance, expected)
    parts = []
    rows = rows_a_chunk(max(len(codebook) for codebook in codebooks))
    stages = [codebook.float() for codebook in codebooks]
    for chunk in zip(gradient.split(rows), weight.split(rows), token_codes.split(rows), strict=True):
        parts.append(_best_codes(*chunk, stages, moment, min_gain, num_sweeps))
    codes, change, gain = (torch.cat(part) for part in zip(*parts, strict=True))
    shift = -(change * means[groups]).sum(1) if has_bias else torch.zeros_like(gain)
    return CodeReassignment(codes, shift, gain)


def _best_codes(
    gradient: Tensor,
    weight: Tensor,
    codes: Tensor,
    stages: list[Tensor],
    moment: Tensor,
    min_gain: float,
    num_sweeps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes, the change Δ of each token's vector and its gain."""
    codes, change, gain = codes.clone(), torch.zeros_like(gradient), torch.zeros_like(weight)
    for stage in list(range(len(stages))) * num_sweeps:
        codebook, present = stages[stage], codes[:, stage]
        rest = change - codebook[present]
        # ½ m ‖rest + C‖²_Σ + ⟨g, rest + C⟩ without what is equal for all codes of the stage.
        stretched = codebook @ moment
        cost = (gradient + weight.unsqueeze(1) * (rest @ moment)) @ codebook.T
        cost += 0.5 * weight.unsqueeze(1) * (stretched * codebook).sum(1)
        lowest, best = cost.min(1)
        found = cost.gather(1, present.unsqueeze(1)).squeeze(1) - lowest
        moves = found > min_gain
        codes[:, stage] = torch.where(moves, best, present)
        change = rest + codebook[codes[:, stage]]
        gain += found * moves
    return codes, change, gain


def _zeros(groups: Tensor, num_groups: int, like: Tensor) -> TokenStatistics:
    vocab_size, d = len(groups), like.shape[1]
    gradient = torch.zeros(vocab_size, d, device=like.device)
    mass, variance, counts = gradient.new_zeros(3, vocab_size)
    hidden_sum, moment = gradient.new_zeros(num_groups, d), gradient.new_zeros(d, d)
    return TokenStatistics(gradient, mass, variance, counts, groups, hidden_sum, moment)


def _add_targets(sums: TokenStatistics, hidden: Tensor, labels: Tensor) -> None:
    sums.gradient.index_add_(0, labels, hidden, alpha=-1)
    sums.counts.index_add_(0, labels, torch.ones_like(labels, dtype=sums.counts.dtype))
    sums.hidden_sum.index_add_(0, sums.groups[labels], hidden)
    sums.hidden_moment.addmm_(hidden.T, hidden)


def _over_ranks(sums: TokenStatistics) -> TokenStatistics:
    for tensor in (sums.gradient, sums.mass, sums.variance, sums.counts, sums.hidden_sum, sums.hidden_moment):
        all_reduce_sum_(tensor)
    return sums
