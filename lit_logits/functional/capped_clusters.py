"""Clusters of bounded size.

Letters: P points, d dimensions, K clusters.
"""

import torch
from torch import Tensor

__all__ = ["capped_assignment"]


def capped_assignment(
    points: Tensor, centroids: Tensor, max_size: int | Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """Assign points to near centroids, `max_size` to each at most.

    Every point asks its nearest centroid. A full one keeps those that it would cost most to send away, in w ‖x − c‖²,
    and the others ask their next nearest, until all are placed (deferred acceptance). If no centroid is over-full, it
    is the nearest assignment.

    Args:
        points: (P, d).
        centroids: (K, d).
        max_size: points a cluster, at least P/K; or of each cluster (K,) int64, in all at least P.
        weights: (P,) non-negative; default all 1.

    Returns:
        (P,) int64.

    Raises:
        ValueError: If the points do not fit.

    Example:
        >>> points = torch.tensor([[0.0], [0.1], [0.2], [9.0]])
        >>> capped_assignment(points, torch.tensor([[0.0], [9.0]]), 2)
        tensor([0, 0, 1, 1])
    """
    num_points, num_clusters = len(points), len(centroids)
    if isinstance(max_size, Tensor):
        room = max_size
        if int(room.sum()) < num_points:
            raise ValueError(
                f"Expected `max_size` to sum to at least {num_points}, the number of points, but got {int(room.sum())}."
            )
    elif max_size * num_clusters >= num_points:
        room = torch.full((num_clusters,), max_size, device=points.device)
    else:
        raise ValueError(
            f"Expected `max_size` to be at least {-(-num_points // num_clusters)}, so that {num_clusters} clusters hold"
            f" {num_points} points, but got {max_size}."
        )
    distances = torch.cdist(points, centroids).square()
    ranked = distances.sort(dim=1)
    weights = points.new_ones(num_points) if weights is None else weights.to(points)
    rank = torch.zeros(num_points, dtype=torch.int64, device=points.device)  # which of its centroids a point asks
    rows = torch.arange(num_points, device=points.device)
    while True:
        asked = ranked.indices[rows, rank]
        # What it costs to send a point on. At its last centroid nothing is left, so it must stay.
        following = (rank + 1).clamp(max=num_clusters - 1)
        regret = weights * (ranked.values[rows, following] - ranked.values[rows, rank])
        regret = torch.where(rank == num_clusters - 1, torch.inf, regret)
        order = regret.argsort(descending=True, stable=True)
        order = order[asked[order].argsort(stable=True)]  # by centroid, and in each by falling regret
        sizes = torch.bincount(asked, minlength=num_clusters)
        place = torch.empty_like(rank)
        place[order] = rows - (sizes.cumsum(0) - sizes)[asked[order]]
        sent_on = place >= room[asked]
        if not bool(sent_on.any()):
            return asked
        rank = torch.where(sent_on, following, rank)
