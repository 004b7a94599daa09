"""Weighted k-means in chunks, on any device.

Letters: P points, d dimensions, K clusters.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lit_logits.functional.checks import check_finite
from lit_logits.functional.reductions import at_least_float32

__all__ = ["KMeansResult", "kmeans", "nearest_centroids"]

_CHUNK_ELEMENTS = 1 << 23  # distances a chunk: 32 MiB in float32
_SEEDING_ROUNDS = 32


class KMeansResult(NamedTuple):
    """Result of `kmeans`.

    Attributes:
        centroids: (K, d), the weighted mean of the points of each cluster.
        assignments: (P,) int64, the nearest centroid of each point (the lowest index among equals).
        inertia: scalar, Σ_p w_p ‖x_p − c_{a(p)}‖².
    """

    centroids: Tensor
    assignments: Tensor
    inertia: Tensor


def nearest_centroids(points: Tensor, centroids: Tensor) -> Tensor:
    """Find the centroid nearest to each point in Euclidean distance, in chunks of points.

    Args:
        points: (P, d).
        centroids: (K, d).

    Returns:
        (P,) int64 indices in [0, K).

    Example:
        >>> nearest_centroids(torch.tensor([[0.0], [0.9]]), torch.tensor([[0.0], [1.0]]))
        tensor([0, 1])
    """
    # ½‖x − c‖² less ½‖x‖², which is the same for all centroids, is ½‖c‖² − x·c: one matrix product, nothing of the size
    # (P, K, d). Centred first, as for points far from 0 the differences of distances would drown in the norms.
    origin = centroids.mean(dim=0)
    centred = centroids - origin
    half_norms = 0.5 * centred.square().sum(dim=1)
    chunk_size = max(1, _CHUNK_ELEMENTS // max(centroids.shape))
    return torch.cat(
        [
            torch.addmm(half_norms, chunk - origin, centred.T, alpha=-1).argmin(dim=1)
            for chunk in points.split(chunk_size)
        ]
    )


def kmeans(
    points: Tensor,
    num_clusters: int,
    *,
    weights: Tensor | None = None,
    num_iters: int = 25,
    generator: torch.Generator | None = None,
    progress_bar: bool = False,
) -> KMeansResult:
    """Minimise Σ_p w_p ‖x_p − c_{a(p)}‖² by Lloyd's iterations from D²-sampled seeds.

    Seeds are drawn with probability w_p·D²(p) in rounds of K/32 instead of one by one, so that seeding is a few matrix
    products (the idea of k-means‖ [0]; k-means++ is a round a seed). A cluster that runs empty restarts at the point
    that contributes most to the objective. Stops early when no assignment changes. Points of weight 0 are assigned but
    pull nothing.

    Args:
        points: (P, d) floating point. Half precision is computed in float32.
        num_clusters: K, in [1, P].
        weights: (P,), finite, non-negative, with a positive sum; default all 1.
        num_iters: largest number of Lloyd iterations.
        generator: source of randomness, on the device of `points`.
        progress_bar: show one line of progress on a terminal.

    Raises:
        ValueError: If K is outside [1, P], points or weights are not finite, or weights do not fit.

    References:
        [0]: Scalable K-Means++, 2012, arXiv 1203.6402.

    Example:
        >>> points = torch.tensor([[0.0], [0.2], [5.0]])
        >>> kmeans(points, 2, generator=torch.Generator().manual_seed(0)).inertia
        tensor(0.0200)
    """
    weights = _check_points(points, num_clusters, weights)
    points = at_least_float32(points)
    weights = weights.to(points)
    centroids = _draw_seeds(points, num_clusters, weights, generator)
    assignments = nearest_centroids(points, centroids)
    for _ in tqdm(
        range(num_iters), desc=f"k-means, {num_clusters} clusters", disable=None if progress_bar else True, leave=False
    ):
        # The order leaves assignments and centroids consistent: the former are the nearest of the latter.
        previous = assignments
        centroids = _update(points, weights, assignments, centroids)
        assignments = nearest_centroids(points, centroids)
        if torch.equal(assignments, previous):
            break
    inertia = (weights * _squared_distances(points, centroids, assignments)).sum()
    return KMeansResult(centroids, assignments, inertia)


def _check_points(points: Tensor, num_clusters: int, weights: Tensor | None) -> Tensor:
    if points.ndim != 2 or not points.is_floating_point():
        raise ValueError(
            f"Expected `points` to be floating point of shape (P, d), but got {points.dtype} of shape"
            f" {tuple(points.shape)}."
        )
    if not 1 <= num_clusters <= points.shape[0]:
        raise ValueError(
            f"Expected `num_clusters` to be in [1, {points.shape[0]}], the number of points, but got {num_clusters}."
        )
    check_finite(points, "points")
    if weights is None:
        return points.new_ones(points.shape[0])
    if weights.shape != points.shape[:1]:
        raise ValueError(
            f"Expected `weights` to hold one number for each of the {points.shape[0]} points, but got shape"
            f" {tuple(weights.shape)}."
        )
    check_finite(weights, "weights")
    if bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise ValueError(
            "Expected `weights` to be non-negative with a positive sum, but got"
            f" min {weights.min().item():g} and sum {weights.sum().item():g}."
        )
    return weights


def _draw_seeds(points: Tensor, num_clusters: int, weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw K distinct points with probability proportional to weight times squared distance to the seeds so far."""
    seeds = torch.multinomial(weights, 1, generator=generator)
    distances = torch.full_like(weights, torch.inf)
    fresh = seeds
    # Seeds of one round do not see each other, so some lie close together; Lloyd's iterations mend that.
    round_size = -(-num_clusters // _SEEDING_ROUNDS)
    while seeds.numel() < num_clusters:
        # Distances to earlier seeds are known, so each round looks at the new ones only: O(P·K·d) for all rounds.
        nearest = nearest_centroids(points, points[fresh])
        distances = torch.minimum(distances, _squared_distances(points, points[fresh], nearest))
        distances[seeds] = 0.0  # exactly, so that no seed is drawn twice
        size = min(round_size, num_clusters - seeds.numel())
        odds = weights * distances
        if int((odds > 0).sum()) < size:  # fewer distinct points than clusters: any point that is no seed yet will do
            odds = torch.ones_like(odds).index_fill_(0, seeds, 0.0)
        fresh = _draw_distinct(odds, size, generator)
        seeds = torch.cat([seeds, fresh])
    return points[seeds]


def _draw_distinct(odds: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """Draw `size` distinct indices with the given odds (Gumbel top-k: `torch.multinomial` stops at 2²⁴ categories)."""
    # −log of an exponential variate is a Gumbel variate; log 0 is −inf, so odds of 0 come last.
    noise = torch.empty_like(odds).exponential_(generator=generator)
    return (odds.log() - noise.log()).topk(size).indices


def _squared_distances(points: Tensor, centroids: Tensor, assignments: Tensor) -> Tensor:
    chunk_size = max(1, _CHUNK_ELEMENTS // points.shape[1])
    return torch.cat(
        [
            (chunk - centroids[codes]).square().sum(dim=1)
            for chunk, codes in zip(points.split(chunk_size), assignments.split(chunk_size), strict=True)
        ]
    )


def _update(points: Tensor, weights: Tensor, assignments: Tensor, centroids: Tensor) -> Tensor:
    """Weighted means of the clusters; a cluster without weight restarts at a point that costs much."""
    mass = torch.zeros_like(centroids[:, 0]).index_add_(0, assignments, weights)
    sums = torch.zeros_like(centroids).index_add_(0, assignments, points * weights.unsqueeze(1))
    # A cluster of points of weight 0 keeps its centroid here, and restarts below with the empty ones.
    updated = torch.where((mass > 0).unsqueeze(1), sums / mass.clamp(min=1e-30).unsqueeze(1), centroids)
    empty = (mass == 0).nonzero().squeeze(1)
    if empty.numel():  # each at another point, those of the largest share in the objective first
        costs = weights * _squared_distances(points, centroids, assignments)
        worst = costs.topk(min(empty.numel(), points.shape[0])).indices
        updated[empty[: worst.numel()]] = points[worst]
    return updated
