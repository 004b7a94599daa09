"""Comparison of two co-activation graphs: bounds of the Gromov–Wasserstein distance, from below and from above.

Letters: T positions, k `top_k`, n nodes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.gld_fusion import sorted_gw_bound
from lit_logits.functional.gromov_wasserstein import edge_gw_bound

__all__ = ["GWComparison", "NodeValues", "compare_graphs", "gw_upper_bound", "load_pot", "node_values"]


class GWComparison(NamedTuple):
    """Result of `compare_graphs`, in units of the graphs: `sorted_bound` ≤ GW, `edge_bound` ≤ GW, GW ≤ `exact`.

    Attributes:
        sorted_bound: GW~/n = mean |f↓ − g↓| of the node strengths.
        exact: root of the squared-loss objective at the best matching that was found.
        edge_bound: see `edge_gw_bound`.
    """

    sorted_bound: float
    exact: float
    edge_bound: float

    @property
    def ratio(self) -> float:
        """Bound / exact, in [0, 1]; 1 where both are 0, as the bound is tight there."""
        return self.sorted_bound / self.exact if self.exact > 0 else 1.0


class NodeValues(NamedTuple):
    """Result of `node_values`.

    Attributes:
        values: (T, n) of the positions that count; their `co_activation_graph` is the graph.
        node_ids: (n,) ranks from 0, or ids of the vocabulary.
    """

    values: Tensor
    node_ids: Tensor


def node_values(values: Tensor, token_ids: Tensor | None = None, *, max_nodes: int) -> NodeValues:
    """Return what each position contributes to the largest nodes, without the whole (n, n) graph.

    Args:
        values: (T, k), descending along k.
        token_ids: (T, k), k different ids at each position; None is nodes that are ranks.
        max_nodes: the first ranks, or the ids of largest strength in the whole `vocabulary_graph`, the largest first.

    Example:
        >>> values, ids = torch.tensor([[2.0, 1.0], [3.0, 1.0]]), torch.tensor([[7, 5], [5, 9]])
        >>> node_values(values, ids, max_nodes=2)  # of the ids 5, 7 and 9
        NodeValues(values=tensor([[1., 2.],
                [3., 0.]]), node_ids=tensor([5, 7]))
    """
    if token_ids is None:
        return NodeValues(values[:, :max_nodes], torch.arange(values.shape[1])[:max_nodes])
    node_ids, nodes = token_ids.unique(return_inverse=True)
    # Strengths as in `vocabulary_strengths`, up to a factor; they choose the nodes before anything dense is made.
    shares = values * values.sum(-1, keepdim=True)
    strengths = values.new_zeros(len(node_ids)).scatter_add(0, nodes.flatten(), shares.flatten())
    largest = strengths.argsort(descending=True, stable=True)[:max_nodes]
    column = torch.full_like(node_ids, len(largest))  # one more, for all that is left out
    column[largest] = torch.arange(len(largest))
    dense = values.new_zeros(len(values), len(largest) + 1).scatter(1, column[nodes], values)
    return NodeValues(dense[:, :-1], node_ids[largest])


def compare_graphs(
    C1: Tensor, C2: Tensor, *, num_starts: int = 5, generator: torch.Generator | None = None
) -> GWComparison:
    """Compute the sorted and the edge bound of two Gram matrices, and the best upper bound that is found.

    Args:
        C1: (n, n) float64.
        C2: (n, n) float64.
        num_starts: see `gw_upper_bound`.
        generator: see `gw_upper_bound`.
    """
    sorted_bound = float(sorted_gw_bound(C1.mean(1), C2.mean(1))) / len(C1)
    exact = float(gw_upper_bound(C1, C2, num_starts=num_starts, generator=generator))
    if exact <= 1e-12 * float(C1.abs().max()):
        return GWComparison(0.0, 0.0, 0.0)  # one graph, up to the rounding of sums in another order
    return GWComparison(sorted_bound, exact, float(edge_gw_bound(C1, C2)))


def gw_upper_bound(C1: Tensor, C2: Tensor, *, num_starts: int = 5, generator: torch.Generator | None = None) -> Tensor:
    """Bound the Gromov–Wasserstein distance of two Gram matrices from above, by the best matching that is found.

    For Gram matrices GW² is concave in the coupling, so that a permutation attains it; finding that one is a quadratic
    assignment problem. From each start POT's conditional gradient leads to a stationary coupling, one more linear
    assignment to a permutation that is no worse, and swaps of two nodes, the best first, to one that no swap improves.
    Without swaps the search mostly stays where it starts: most permutations are stationary for a concave objective. The
    value is exact at its permutation, so never below GW; how far above is not known.

    Args:
        C1: (n, n) float64, symmetric and positive semi-definite, on the CPU.
        C2: (n, n) of the same kind.
        num_starts: the matching by sorted strengths, node i with node i, the product coupling, then random matchings.
        generator: of the random ones.

    Returns:
        A scalar, in units of the graphs.
    """
    from scipy.optimize import linear_sum_assignment  # POT needs SciPy

    # Scaled, as POT also stops at an absolute difference, and graphs of probabilities have tiny edges.
    scale = torch.maximum(C1.abs().max(), C2.abs().max())
    if scale == 0:
        return scale
    A, B = C1 / scale, C2 / scale
    best = A.new_tensor(torch.inf)
    for start in _starts(A, B, num_starts, generator):
        plan = load_pot().gromov.gromov_wasserstein(
            A, B, loss_fun="square_loss", symmetric=True, G0=start, max_iter=1000, tol_rel=1e-12, tol_abs=1e-12
        )
        order = torch.from_numpy(linear_sum_assignment((A @ plan @ B).numpy(), maximize=True)[1])
        order = _swapped(A, B, order)
        best = torch.minimum(best, (C1 - C2[order][:, order]).square().mean().sqrt())
    return best


def _starts(C1: Tensor, C2: Tensor, count: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Yield couplings (n, n) to start from."""
    size = len(C1)
    identity = torch.eye(size, dtype=C1.dtype) / size
    by_strength = torch.zeros_like(identity)
    orders = (C.sum(1).argsort(descending=True, stable=True) for C in (C1, C2))
    by_strength[tuple(orders)] = 1 / size
    yield from (by_strength, identity, torch.full_like(identity, 1 / size**2))[:count]
    for _ in range(count - 3):
        yield identity[torch.randperm(size, generator=generator)]


def _swapped(C1: Tensor, C2: Tensor, order: Tensor) -> Tensor:
    """Exchange the best two nodes of a matching i → order[i] as long as it helps."""
    order = order.clone()
    for _ in range(len(order) ** 2):  # far more than are ever needed
        permuted = C2[order][:, order]
        products = C1 @ permuted
        # By how much Σ_kl C1_kl C2_kl grows if i and j change places, for all pairs at once; GW² falls by 2/n² of it.
        # With v = e_i − e_j it is (vᵀC1 v)(vᵀC2 v) − 2 vᵀC1 C2 v.
        gain = _lengths(C1) * _lengths(permuted) - _lengths(products) - _lengths(products.T)
        i, j = divmod(int(gain.argmax()), len(order))
        if gain[i, j] <= 1e-12:
            break
        order[[i, j]] = order[[j, i]]
    return order


def _lengths(C: Tensor) -> Tensor:
    """Compute C_ii + C_jj − 2 C_ij, the squared distances of the vectors of a Gram matrix."""
    return C.diagonal().unsqueeze(1) + C.diagonal() - 2 * C


def load_pot() -> Any:
    """Import POT, an optional package.

    Raises:
        ValueError: If it cannot be imported.
    """
    try:
        import ot
    except ImportError as error:
        raise ValueError(
            "Expected POT, with which GWApproximationLogger finds the Gromov–Wasserstein distance, but it cannot be"
            ' imported. Install it in a checkout of lit-logits: pip install -e ".[ot]"'
        ) from error
    return ot
