"""Weighted k-means in chunks, on any device.

Letters: P points, d dimensions, K clusters.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lit_logits.functional.checks import check_finite
from lit_logits.functional.reductions import at_least_float32

__all__ = ["KMeansResult", "kmeans", "nearest_centroids"]

_CHUNK_ELEMENTS = 1 << 23  # distances a chunk: 32 MiB in float32
_SEEDING_ROUNDS = 8
_OVERSAMPLING = 4  # candidates a cluster, from which the seeds are chosen
_MIN_CANDIDATES = 64


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

    Four times as many points as clusters are drawn with probability proportional to w_p·D²(p), in a few rounds, so that
    this is a few matrix products (k-means‖ [0]). Each stands for the points nearest to it, and greedy k-means++ [1]
    chooses K of them as seeds. A cluster that runs empty restarts at the point that contributes most to the objective.
    Stops early when no assignment changes. Points of weight 0 are assigned but pull nothing.

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
        [1]: k-means++: the advantages of careful seeding, 2007, SODA.

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
    """Draw K distinct points: more than K at first, of which greedy k-means++ keeps the best."""
    count = min(points.shape[0], max(_OVERSAMPLING * num_clusters, _MIN_CANDIDATES))
    if num_clusters == points.shape[0]:
        return points
    candidates, mass = _draw_candidates(points, count, weights, generator)
    return candidates[_greedy_seeds(candidates, num_clusters, mass, generator)]


def _draw_candidates(
    points: Tensor, count: int, weights: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw points with odds of weight times squared distance to those so far, and sum the weights nearest to each."""
    if count == points.shape[0]:
        return points, weights
    drawn = _draw_distinct(weights, 1, None, generator)
    distances, owners = torch.full_like(weights, torch.inf), torch.zeros_like(weights, dtype=torch.int64)
    fresh = drawn
    # Points of one round do not see each other, so some lie close together; the choice among them mends that.
    round_size = -(-count // _SEEDING_ROUNDS)
    while fresh.numel():
        # Distances to earlier ones are known, so each round looks at the new ones only: O(P·K·d) for all rounds.
        nearest = nearest_centroids(points, points[fresh])
        found = _squared_distances(points, points[fresh], nearest)
        owners = torch.where(found < distances, nearest + (drawn.numel() - fresh.numel()), owners)
        distances = torch.minimum(distances, found)
        fresh = _draw_distinct(weights * distances, min(round_size, count - drawn.numel()), drawn, generator)
        drawn = torch.cat([drawn, fresh])
    return points[drawn], torch.zeros_like(weights[:count]).index_add_(0, owners, weights)


def _greedy_seeds(points: Tensor, num_clusters: int, weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return indices of K points by greedy k-means++: each is the one of a few draws that lowers the objective most."""
    num_trials = min(2 + int(math.log(num_clusters)), points.shape[0])
    centred = points - points.mean(dim=0)
    norms = centred.square().sum(dim=1)
    chosen, odds = torch.empty(0, dtype=torch.int64, device=points.device), weights
    distances = torch.full_like(weights, torch.inf)
    for seed in range(num_clusters):
        trials = _draw_distinct(odds, min(num_trials, points.shape[0] - seed), chosen, generator)
        found = torch.addmm(norms, centred[trials], centred.T, alpha=-2) + norms[trials].unsqueeze(1)
        found = found.clamp(min=0).minimum(distances)
        best = (found @ weights).argmin()
        distances = found[best]
        odds = weights * distances
        chosen = torch.cat([chosen, trials[best].unsqueeze(0)])
    return chosen


def _draw_distinct(odds: Tensor, size: int, taken: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Draw `size` distinct indices that are not in `taken`, with the given odds, and where these are all 0, any others.

    By Gumbel top-k: `torch.multinomial` stops at 2²⁴ categories.
    """
    # −log of an exponential variate is a Gumbel variate. Odds of 0 come last, before those that are taken: there may be
    # fewer distinct points than clusters.
    tiny = torch.finfo(odds.dtype).tiny
    noise = torch.empty_like(odds).exponential_(generator=generator).clamp_(min=tiny)
    keys = odds.clamp(min=tiny).log_() - noise.log_()
    if taken is not None:
        keys[taken] = -torch.inf
    return keys.topk(size).indices


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
