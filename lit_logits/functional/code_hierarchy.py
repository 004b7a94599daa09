"""Two levels of codes of vectors: clusters of bounded size, then codes of what the clusters leave, stage by stage.

Letters: d dimensions, V vocabulary, K clusters, S stages of K_s codes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.capped_clusters import capped_assignment
from lit_logits.functional.code_assignment import code_means, metric_rows
from lit_logits.functional.kmeans import kmeans

__all__ = ["CodeHierarchy", "kmeans_hierarchy", "weighted_kmeans_hierarchy"]


class CodeHierarchy(NamedTuple):
    """Result of `kmeans_hierarchy`.

    Attributes:
        token_to_cluster: (V,) int64 in [0, K).
        token_codes: (V, S) int64, of stage s in [0, K_s).
        clusters: (K, d), the weighted mean of each cluster.
        codes: (Σ K_s, d), the codebooks of the stages one after another.
    """

    token_to_cluster: Tensor
    token_codes: Tensor
    clusters: Tensor
    codes: Tensor


def kmeans_hierarchy(
    vectors: Tensor,
    codebook_sizes: Sequence[int],
    *,
    weights: Tensor,
    max_cluster_size: int,
    generator: torch.Generator | None = None,
    progress_bar: bool = False,
) -> CodeHierarchy:
    """Fit clusters to vectors by weighted k-means, and the codes of each stage to what is left of all of them.

    Args:
        vectors: (V, d).
        codebook_sizes: number of clusters, and of the codes of each further stage.
        weights: (V,), non-negative.
        max_cluster_size: tokens a cluster.
        generator: source of randomness, on the device of `vectors`.
        progress_bar: show one line of progress on a terminal.

    Example:
        >>> vectors = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> found = kmeans_hierarchy(vectors, (2, 2), weights=torch.ones(4), max_cluster_size=2)
        >>> found.clusters.sort(0).values.T, found.codes.sort(0).values.T
        (tensor([[ 0.5000, 10.5000]]), tensor([[-0.5000,  0.5000]]))
    """
    num_clusters, *stage_sizes = codebook_sizes
    centroids = kmeans(vectors, num_clusters, weights=weights, generator=generator, progress_bar=progress_bar).centroids
    token_to_cluster = capped_assignment(vectors, centroids, max_cluster_size, weights=weights)
    means, _ = code_means(vectors, token_to_cluster, num_clusters, weights)
    rest, stages = vectors - means[token_to_cluster], []
    for size in stage_sizes:
        found = kmeans(rest, size, weights=weights, generator=generator, progress_bar=progress_bar)
        stages.append(found)
        rest = rest - found.centroids[found.assignments]
    token_codes = torch.stack([stage.assignments for stage in stages], 1)
    return CodeHierarchy(token_to_cluster, token_codes, means, torch.cat([stage.centroids for stage in stages]))


def weighted_kmeans_hierarchy(
    weight: Tensor,
    codebook_sizes: Sequence[int],
    *,
    token_counts: Tensor,
    hidden_second_moment: Tensor,
    max_cluster_size: int,
    power: float = 0.75,
    generator: torch.Generator | None = None,
    progress_bar: bool = False,
) -> CodeHierarchy:
    """Fit two levels of codes to the rows of a dense output layer, in what an error costs; see `weighted_kmeans`.

    The row of a token is then nearly that of its cluster plus those of its codes.

    Args:
        weight: (V, d) rows of the output (or tied input) embedding.
        codebook_sizes: number of clusters, and of the codes of each further stage.
        token_counts: (V,), how often each token occurs; a count below ½ weighs as ½.
        hidden_second_moment: (d, d) E[h hᵀ].
        max_cluster_size: tokens a cluster.
        power: exponent of the counts.
        generator: source of randomness, on the device of `weight`.
        progress_bar: show one line of progress on a terminal.

    Raises:
        ValueError: If counts or second moment do not fit `weight` or are not finite.
    """
    rows = metric_rows(weight, token_counts=token_counts, hidden_second_moment=hidden_second_moment, power=power)
    found = kmeans_hierarchy(
        rows.points,
        codebook_sizes,
        weights=rows.weights,
        max_cluster_size=max_cluster_size,
        generator=generator,
        progress_bar=progress_bar,
    )
    return found._replace(clusters=rows.back(found.clusters), codes=rows.back(found.codes))
