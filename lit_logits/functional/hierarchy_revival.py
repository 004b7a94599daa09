"""Revival of dead clusters and codes of two-level heads: each gets one half of what costs most.

Around h = 0 the probability of a token is linear in h but for a common term,

    log p(v | h) ≈ a_v + ⟨h, r_v⟩ + const      a_v = log p(v | 0)      r_v = C_{M(v)} + w_v − w̄_{M(v)}

with w_v = Σ_s C_s[M_s(v)] and w̄ its mean over a cluster, weighted by the shares of tokens in it at h = 0. When tokens
change their cluster, its vector and bias are set to what keeps value and slope of log p there; further from 0 the two
softmaxes differ in second order, as one vector cannot be the log-sum of several.

Letters: d hidden size, V vocabulary, K clusters, S stages with L codes in all, D dead codes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.capped_clusters import capped_assignment
from lit_logits.functional.code_assignment import split_heavy_codes
from lit_logits.functional.hierarchical_vq import HierarchicalCodes
from lit_logits.functional.kmeans import nearest_centroids
from lit_logits.functional.reductions import at_least_float32
from lit_logits.functional.vq_logits import code_log_mass

__all__ = ["RevivedHierarchy", "TokenSlopes", "regroup_tokens", "revive_hierarchy", "token_slopes"]


class TokenSlopes(NamedTuple):
    """What the probability of each token is around h = 0; see the module.

    Attributes:
        log_probs: (V,) a in nats, up to a common constant.
        rows: (V, d) r.
    """

    log_probs: Tensor
    rows: Tensor


class RevivedHierarchy(NamedTuple):
    """Result of `revive_hierarchy`: tensors of a head, those that nothing changed as they were.

    Attributes:
        token_to_cluster: (V,) int64.
        token_codes: (V, S) int64, of stage s in [0, K_s).
        clusters: (K, d).
        codes: (L, d).
        cluster_bias: (K,).
        token_bias: (V,), or None.
    """

    token_to_cluster: Tensor
    token_codes: Tensor
    clusters: Tensor
    codes: Tensor
    cluster_bias: Tensor
    token_bias: Tensor | None


def token_slopes(head: HierarchicalCodes) -> TokenSlopes:
    """Return value and slope of log p(v | h) at h = 0, up to what all tokens have in common.

    Example:
        >>> from lit_logits.functional.hierarchical_vq import cluster_layout
        >>> layout = cluster_layout(torch.tensor([0, 0, 1]), torch.tensor([[0], [1], [0]]), 2, [2])
        >>> vectors = torch.tensor([[1.0], [5.0]])
        >>> token_slopes(HierarchicalCodes(vectors, vectors, layout, torch.zeros(2))).rows.T
        tensor([[-1.,  3.,  5.]])
    """
    owner, num_clusters = head.layout.token_to_cluster, len(head.clusters)
    columns = head.layout.columns[owner, head.layout.places]
    rows = at_least_float32(head.codes[columns[:, 0]])
    for stage in columns.T[1:]:
        rows = rows + head.codes[stage]
    bias = rows.new_zeros(len(owner)) if head.token_bias is None else head.token_bias.to(rows.dtype)
    inside = bias - code_log_mass(owner, num_clusters, bias)[owner]
    means = rows.new_zeros(num_clusters, rows.shape[1]).index_add_(0, owner, rows * inside.exp().unsqueeze(1))
    return TokenSlopes(head.cluster_bias[owner] + inside, rows + (head.clusters - means)[owner])


def regroup_tokens(tokens: TokenSlopes, token_to_cluster: Tensor, num_clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return vectors (K, d), biases (K,) of clusters and biases (V,) of tokens that keep `tokens` in other clusters.

    The value of every log p(v | 0) is kept, and the slope of the sum over each cluster. A token keeps its own slope
    where its neighbours come from the same cluster. A cluster without tokens gets 0 and −inf.
    """
    cluster_bias = code_log_mass(token_to_cluster, num_clusters, tokens.log_probs)
    token_bias = tokens.log_probs - cluster_bias[token_to_cluster]
    vectors = tokens.rows.new_zeros(num_clusters, tokens.rows.shape[1])
    vectors.index_add_(0, token_to_cluster, tokens.rows * token_bias.exp().unsqueeze(1))
    return vectors, cluster_bias, token_bias


@torch.no_grad()
def revive_hierarchy(
    head: HierarchicalCodes,
    token_codes: Tensor,
    stage_sizes: Sequence[int],
    *,
    dead_clusters: Tensor,
    dead_codes: Sequence[Tensor],
    token_counts: Tensor,
    max_cluster_size: int,
    generator: torch.Generator | None = None,
) -> RevivedHierarchy:
    """Give each dead cluster, and in every stage each dead code, one half of the one that costs most.

    What a cluster or code costs, and how it is halved, is that of `split_heavy_codes` with the rows r_v. First the
    tokens of dead ones move to living ones: to the cluster whose vector is nearest to their row, and has room, or to
    the code of the stage that is nearest to theirs. Clusters whose tokens find no room stay as they are.

    Both halves of a code have its vector, so no logit changes. Both halves of a cluster get vector and bias by
    `regroup_tokens`.

    Args:
        head: the codes.
        token_codes: (V, S) int64, of stage s in [0, K_s).
        stage_sizes: K_s.
        dead_clusters: (D,) int64.
        dead_codes: of each stage, (D_s,) int64.
        token_counts: (V,), how often each token was a target.
        max_cluster_size: tokens a cluster.
        generator: source of randomness, on the device of the head.
    """
    owner, tokens = head.layout.token_to_cluster, token_slopes(head)
    clusters, cluster_bias, token_bias = head.clusters, head.cluster_bias, head.token_bias
    grouped = owner
    if dead_clusters.numel():
        dead, emptied = _empty_clusters(owner, clusters, dead_clusters, tokens.rows, max_cluster_size)
        grouped = split_heavy_codes(
            emptied, len(clusters), dead, token_counts=token_counts, vectors=tokens.rows, generator=generator
        ).token_to_code
        # Only clusters whose tokens have changed; those that are left without keep what they had.
        moved = owner != grouped
        changed = torch.zeros_like(cluster_bias, dtype=torch.bool)
        changed[owner[moved]] = changed[grouped[moved]] = True
        changed &= torch.bincount(grouped, minlength=len(clusters)) > 0
        found = regroup_tokens(tokens, grouped, len(clusters))
        clusters = torch.where(changed.unsqueeze(1), found[0].to(clusters.dtype), clusters)
        cluster_bias = torch.where(changed, found[1].to(cluster_bias.dtype), cluster_bias)
        if token_bias is not None:
            token_bias = torch.where(changed[grouped], found[2].to(token_bias.dtype), token_bias)
    stages = []
    for codes, vectors, dead in zip(token_codes.T, head.codes.split(list(stage_sizes)), dead_codes, strict=True):
        stages.append(_revive_stage(codes, vectors, dead, token_counts, tokens.rows, generator))
    assignments, vectors = zip(*stages, strict=True)
    return RevivedHierarchy(
        grouped, torch.stack(assignments, 1), clusters, torch.cat(vectors), cluster_bias, token_bias
    )


def _empty_clusters(
    owner: Tensor, clusters: Tensor, dead: Tensor, rows: Tensor, max_size: int
) -> tuple[Tensor, Tensor]:
    """Move the tokens of dead clusters to near ones with room; return which could be emptied, and the mapping."""
    sizes = torch.bincount(owner, minlength=len(clusters))
    is_living = sizes > 0
    is_living[dead] = False
    living = is_living.nonzero().squeeze(1)
    room = (max_size - sizes[living]).clamp(min=0)
    smallest = dead[sizes[dead].argsort(stable=True)]
    dead = smallest[sizes[smallest].cumsum(0) <= room.sum()]
    stranded = torch.isin(owner, dead)
    emptied = owner.clone()
    if bool(stranded.any()):
        emptied[stranded] = living[capped_assignment(rows[stranded], at_least_float32(clusters[living]), room)]
    return dead, emptied


def _revive_stage(
    codes: Tensor,
    vectors: Tensor,
    dead: Tensor,
    token_counts: Tensor,
    rows: Tensor,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Return the codes (V,) of a stage and their vectors (K_s, d) after the revival of dead ones."""
    if dead.numel() == 0:
        return codes, vectors
    is_living = torch.bincount(codes, minlength=len(vectors)) > 0
    is_living[dead] = False
    living = is_living.nonzero().squeeze(1)
    nearest = torch.arange(len(vectors), device=codes.device)
    nearest[dead] = living[nearest_centroids(at_least_float32(vectors[dead]), at_least_float32(vectors[living]))]
    emptied = nearest[codes]
    split = split_heavy_codes(emptied, len(vectors), dead, token_counts=token_counts, vectors=rows, generator=generator)
    # All tokens of a revived code had the same code before, whose vector it takes.
    origins = torch.arange(len(vectors), device=codes.device)
    origins[split.token_to_code] = emptied
    return split.token_to_code, vectors[origins]
