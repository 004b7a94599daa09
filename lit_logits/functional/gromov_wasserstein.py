"""Squared-loss Gromov–Wasserstein distance of small graphs: the exact objective, and a bound from below.

With uniform weights on the n nodes of both graphs,

    GW²(C1, C2) = min_P Σ_ijkl (C1_ij − C2_kl)² P_ik P_jl,      P ≥ 0 with rows and columns that sum to 1/n.

Co-activation graphs are Gram matrices. For those the objective is concave in P, so that a permutation attains the
minimum, and trying them all is exact.

Letters: n, m nodes.

References:
    [0]: Gromov–Wasserstein distances and the metric approach to object matching, 2011, Mémoli, Sec. 6.
"""

from itertools import permutations

import torch
from torch import Tensor

__all__ = ["edge_gw_bound", "gw_objective", "gw_over_permutations"]

_MAX_NODES = 9  # 362,880 permutations


def gw_objective(C1: Tensor, C2: Tensor, plan: Tensor) -> Tensor:
    """Compute the squared-loss objective Σ_ijkl (C1_ij − C2_kl)² P_ik P_jl of a coupling, in O(n²m + nm²).

    Args:
        C1: (n, n), symmetric.
        C2: (m, m), symmetric.
        plan: (n, m) coupling P ≥ 0 of mass 1.

    Returns:
        A scalar, in squared units of the graphs; of the best coupling it is GW², whose root is the distance.

    Example:
        >>> C = torch.tensor([[2.0, 1.0], [1.0, 0.0]])
        >>> gw_objective(C, C, torch.eye(2) / 2), gw_objective(C, C, torch.eye(2).flip(0) / 2)
        (tensor(0.), tensor(2.))
    """
    # The square expanded: its pure terms see P only through its marginals, its mixed term is two matrix products.
    p, q = plan.sum(1), plan.sum(0)
    first = p @ C1.square() @ p + q @ C2.square() @ q
    return first - 2 * (C1 @ plan @ C2 * plan).sum()


def gw_over_permutations(C1: Tensor, C2: Tensor) -> Tensor:
    """Compute GW² of two graphs of n nodes by trying all n! matchings: exact for Gram matrices, else an upper bound.

    Args:
        C1: (n, n), symmetric, n at most 9.
        C2: (n, n), symmetric.

    Raises:
        ValueError: If graphs are too large, or differ in size.

    Example:
        >>> C = torch.tensor([[2.0, 1.0], [1.0, 0.0]])
        >>> gw_over_permutations(C, C.flip(0, 1))
        tensor(0.)
    """
    if C1.shape != C2.shape or C1.ndim != 2 or len(C1) > _MAX_NODES:
        raise ValueError(
            f"Expected two graphs of one size, at most {_MAX_NODES} nodes, but got shapes {tuple(C1.shape)} and"
            f" {tuple(C2.shape)}."
        )
    orders = torch.tensor(list(permutations(range(len(C1)))), device=C1.device)
    best = C1.new_tensor(torch.inf)
    for part in orders.split(4096):  # a part permutes C2 into (4096, n, n)
        permuted = C2[part.unsqueeze(2), part.unsqueeze(1)]
        best = torch.minimum(best, (C1 - permuted).square().mean((1, 2)).min())
    return best


def edge_gw_bound(C1: Tensor, C2: Tensor) -> Tensor:
    """Bound GW from below by all edges: √(1/n² Σ (sorted C1 − sorted C2)²), Mémoli's second lower bound [0].

    It compares the distributions of edge weights, and so tells apart graphs whose node strengths agree. O(n² log n).

    Args:
        C1: (..., n, n).
        C2: (..., n, n).

    Returns:
        (...), in units of the graphs.

    Example:
        >>> edge_gw_bound(torch.eye(2), torch.eye(2).flip(0)), edge_gw_bound(torch.eye(2), torch.zeros(2, 2))
        (tensor(0.), tensor(0.7071))
    """
    edges1, edges2 = C1.flatten(-2).sort(-1).values, C2.flatten(-2).sort(-1).values
    return (edges1 - edges2).square().mean(-1).sqrt()
