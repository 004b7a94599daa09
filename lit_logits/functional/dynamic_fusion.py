"""Dynamic logit fusion: how far a large model moves along what small experts learned, found again at every step.

With P of the large model, Q of the small base and Q_t of its experts, all softmax of their logits M^L, M^S and M_t, the
fused distribution tilts P exponentially along Δ_t = M_t − M^S,

    P~_α = softmax(M^L + Σ_t α_t Δ_t)           A(α) = log Σ_v P_v exp(Σ_t α_t Δ_t,v)
    f(α) = KL(P~_α ‖ P) = α·∇A(α) − A(α)        g(α) = KL(P ‖ P~_α) = A(α) − α·E_P[Δ],

and its weights make both divergences what they are between expert and base [0]:

    α = argmin Σ_t [(f(α) − a_t)² + (g(α) − b_t)²],    a_t = KL(Q_t ‖ Q),  b_t = KL(Q ‖ Q_t).

Letters: B sequences, V vocabulary, S experts. Logits are in nats.

References:
    [0]: On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion, 2024, arXiv 2406.15480. The tilting
        solver is ours.
"""

import itertools
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.fusion_search import (
    FusionPoint,
    FusionProblem,
    better,
    distance,
    pick_expert,
    search_jointly,
    search_lines,
)

__all__ = ["FusionMode", "FusionSolver", "FusionWeights", "expert_divergences", "fuse_logits", "fusion_weights"]

FusionSolver = Literal["tilting", "grid"]
FusionMode = Literal["single", "joint"]

_MAX_GRID = 10_000


class FusionWeights(NamedTuple):
    """Result of `fusion_weights`.

    Attributes:
        alpha: (S, B) weight of each expert.
        objective: (B,) the sum of squares that is minimised, in nats².
        kl_forward: (B,) KL(P~ ‖ P) in nats.
        kl_reverse: (B,) KL(P ‖ P~) in nats.
        num_evals: fused distributions that were evaluated for a sequence and, with `single`, an expert: the number of
            the slowest one, as those that are done drop out.
    """

    alpha: Tensor
    objective: Tensor
    kl_forward: Tensor
    kl_reverse: Tensor
    num_evals: int


def fuse_logits(large_logits: Tensor, base_logits: Tensor, expert_logits: Tensor, alpha: Tensor) -> Tensor:
    """Compute fused logits M^L + Σ_t α_t (M_t − M^S); α = 1 for one expert is proxy tuning.

    A token that the base rules out (−inf) keeps the large model's logit. A token that only an expert rules out is ruled
    out where that expert acts (α ≠ 0).

    Args:
        large_logits: (B, V) of the large model.
        base_logits: (B, V) of the small base.
        expert_logits: (S, B, V) of the experts, which share the base's vocabulary.
        alpha: (S, B).

    Returns:
        (B, V), at least float32.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> fuse_logits(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[[0.0, 4.0]]]), torch.tensor([[0.5]]))
        tensor([[0., 2.]])
    """
    _check_shapes(large_logits, base_logits, expert_logits)
    if alpha.shape != expert_logits.shape[:2]:
        raise ValueError(f"Expected `alpha` of shape {tuple(expert_logits.shape[:2])}, but got {tuple(alpha.shape)}.")
    large, base, experts = _promoted(large_logits, base_logits, expert_logits)
    fused = large
    for expert, weight in zip(experts, alpha.to(large.dtype).unsqueeze(-1), strict=True):
        moved = weight * (expert - base)
        # Filled in rather than computed: −inf times a weight of 0, and −inf minus −inf, would be NaN.
        moved = moved.masked_fill(expert == -torch.inf, -torch.inf)
        fused = fused + moved.masked_fill((base == -torch.inf) | (weight == 0), 0.0)
    return fused


def expert_divergences(base_logits: Tensor, expert_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compute KL(Q_t ‖ Q) and KL(Q ‖ Q_t) in nats, over the tokens that both can emit.

    Args:
        base_logits: (B, V).
        expert_logits: (S, B, V).

    Returns:
        Two tensors (S, B).

    Example:
        >>> forward, reverse = expert_divergences(torch.zeros(1, 2), torch.tensor([[[0.0, 1.0986]]]))
        >>> forward, reverse
        (tensor([[0.1308]]), tensor([[0.1438]]))
    """
    base, experts = _promoted(base_logits, expert_logits)
    log_q, log_p = base.log_softmax(-1), experts.log_softmax(-1)
    difference = log_p - log_q
    if not bool(difference.isfinite().all()):  # a token is ruled out; masks cost passes over V
        support = (base > -torch.inf) & (experts > -torch.inf)
        log_q, log_p = (logits.masked_fill(~support, -torch.inf).log_softmax(-1) for logits in (base, experts))
        difference = (log_p - log_q).masked_fill(~support, 0.0)
    with torch.autocast(base.device.type, enabled=False):  # which would sum in half precision
        # Rounding may leave a divergence of equals a little below 0.
        forward = torch.linalg.vecdot(log_p.exp(), difference).clamp(min=0)
        return forward, -torch.linalg.vecdot(log_q.exp(), difference).clamp(max=0)


@torch.no_grad()
def fusion_weights(
    large_logits: Tensor,
    base_logits: Tensor,
    expert_logits: Tensor,
    *,
    solver: FusionSolver = "tilting",
    mode: FusionMode = "single",
    bounds: tuple[float, float] = (0.0, 2.0),
    step: float = 0.1,
) -> FusionWeights:
    """Find the weights α of the experts, for each sequence on its own; nothing is carried over from another step.

    Divergences are taken over the tokens that all models can emit. As Σ_t (f − a_t)² = S (f − ā)² + const, every search
    aims at the means ā and b̄, also that along one expert.

    Args:
        large_logits: (B, V) of the large model.
        base_logits: (B, V) of the small base.
        expert_logits: (S, B, V) of the experts.
        solver: `tilting`: A and its derivatives give f, g and their slopes in one pass over V. As f and g grow with α
            and A is convex, a few points of the grid prove that no other can win, and a secant search next to the best
            of them ends within 1e-4 of a minimum. Up to rounding it is never above the grid. Where a few tokens hold
            nearly all the mass there may be two minima, and a lower one between other points. Three to six passes for
            most sequences. `grid`: the paper's search.
        mode: `single`: one expert acts at a step, the best of S searches along a line; the lowest number among equals.
            `joint`: all may act, never worse than `single`.
        bounds: smallest and largest α, 0 ≤ smallest ≤ largest.
        step: distance of the points of the grid, which starts at the smallest α; `tilting` looks at these points too.

    Raises:
        ValueError: If shapes do not fit, logits are NaN or +inf, no token is possible for a sequence, bounds cross or
            are infinite, or a joint grid is too fine.

    Example:
        >>> base, expert = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[[1.0, 0.0, 4.0]]])
        >>> fusion_weights(base, base, expert).alpha  # large = base: the expert itself
        tensor([[1.]])
        >>> fusion_weights(base, base, base.unsqueeze(0)).alpha  # expert = base: the large model itself
        tensor([[0.]])
    """
    low, high = _check_bounds(bounds, step)
    if solver not in ("tilting", "grid"):
        raise ValueError(f"Expected `solver` to be 'tilting' or 'grid', but got {solver!r}.")
    if mode not in ("single", "joint"):
        raise ValueError(f"Expected `mode` to be 'single' or 'joint', but got {mode!r}.")
    with torch.autocast(large_logits.device.type, enabled=False):  # which would sum in half precision
        problem = _pose(large_logits, base_logits, expert_logits)
        points = [min(low + step * k, high) for k in range(int((high - low) / step + 1e-6) + 1)]
        best, num_evals = (
            _search_grid(problem, points, mode) if solver == "grid" else _tilt(problem, points, high, mode)
        )
    forward, reverse = problem.forward, problem.reverse
    # The part of the objective that α does not move: Σ_t (f − a_t)² = S (f − ā)² + Σ_t (a_t − ā)².
    spread = (forward - forward.mean(0)).square().sum(0) + (reverse - reverse.mean(0)).square().sum(0)
    objective = len(forward) * best.objective + spread
    return FusionWeights(best.alpha, objective, best.kl_forward, best.kl_reverse, num_evals)


# ---------------------------------------------------------------------- posing the problem


def _promoted(*all_logits: Tensor) -> list[Tensor]:
    """Return the logits in one dtype, at least float32."""
    dtype = reduce(torch.promote_types, (logits.dtype for logits in all_logits), torch.float32)
    return [logits.to(dtype) for logits in all_logits]


def _check_shapes(large: Tensor, base: Tensor, experts: Tensor) -> None:
    fits = large.ndim == 2 and base.shape == large.shape and experts.ndim == 3 and experts.shape[1:] == large.shape
    if not fits or len(experts) == 0:
        raise ValueError(
            "Expected `large_logits` and `base_logits` of one shape (B, V) and `expert_logits` of shape (S, B, V) with"
            f" S at least 1, but got {tuple(large.shape)}, {tuple(base.shape)} and {tuple(experts.shape)}."
        )


def _check_bounds(bounds: tuple[float, float], step: float) -> tuple[float, float]:
    low, high = bounds
    if not 0 <= low <= high < torch.inf:
        raise ValueError(
            f"Expected `bounds` to be (smallest, largest) with 0 ≤ smallest ≤ largest < ∞, but got {bounds}."
        )
    if not step > 0:
        raise ValueError(f"Expected `step` to be positive, but got {step}.")
    return float(low), float(high)


def _pose(large_logits: Tensor, base_logits: Tensor, expert_logits: Tensor) -> FusionProblem:
    """Check the logits, cut them to the tokens that all models can emit, and centre Δ."""
    _check_shapes(large_logits, base_logits, expert_logits)
    large, base, experts = _promoted(large_logits, base_logits, expert_logits)
    all_finite = True
    for name, logits in (("large_logits", large), ("base_logits", base), ("expert_logits", experts)):
        lowest, highest = logits.aminmax()
        if not bool(highest < torch.inf):  # NaN is not below either
            raise ValueError(f"Expected `{name}` to be finite or −inf, but got NaN or +inf.")
        all_finite &= bool(lowest > -torch.inf)
    if all_finite:
        shifts = experts - base
    else:
        support = (large > -torch.inf) & (base > -torch.inf) & (experts > -torch.inf).all(0)
        if not bool(support.any(-1).all()):
            row = int((~support.any(-1)).nonzero()[0])
            raise ValueError(f"Expected a token that all models can emit, but sequence {row} of the batch has none.")
        shifts = (experts - base).masked_fill(~support, 0.0)
        large, base, experts = (logits.masked_fill(~support, -torch.inf) for logits in (large, base, experts))
    log_probs = large.log_softmax(-1)
    # A constant in Δ cancels in the softmax, so it is chosen such that E_P[Δ] = 0: then g is A itself, and f and g are
    # not small differences of large numbers, for which float32 would leave few digits.
    shifts.sub_(torch.linalg.vecdot(log_probs.exp(), shifts).unsqueeze(-1))
    if not all_finite:
        shifts = shifts.masked_fill(~support, 0.0)
    return FusionProblem(log_probs, shifts, *expert_divergences(base, experts))


def _tilt(problem: FusionProblem, points: list[float], high: float, mode: FusionMode) -> tuple[FusionPoint, int]:
    """Exponential tilting along each expert, then over all weights if they may act jointly."""
    points = sorted({*points, high})  # the grid may stop short of the upper bound
    lines, num_evals = search_lines(problem, problem.shifts, points)
    best = pick_expert(lines)
    if mode == "joint" and len(problem.shifts) > 1:
        best, more = search_jointly(problem, best, points)
        num_evals += more
    return best, num_evals


# ---------------------------------------------------------------------- the paper's search: readable, and slow


def _search_grid(problem: FusionProblem, points: list[float], mode: FusionMode) -> tuple[FusionPoint, int]:
    """Try every α of the grid, each fused distribution made and compared as the formulas say; ties: the first."""
    num_experts = len(problem.shifts)
    if mode == "joint" and len(points) ** num_experts > _MAX_GRID:
        raise ValueError(
            f"Expected at most {_MAX_GRID:,} points on the grid of mode='joint', but {len(points)} for each of"
            f" {num_experts} experts are {len(points) ** num_experts:,}. Use solver='tilting'."
        )
    if mode == "joint":
        weights = list(itertools.product(points, repeat=num_experts))
    else:
        weights = [(*[0.0] * t, p, *[0.0] * (num_experts - t - 1)) for t in range(num_experts) for p in points]
    log_p, probs = problem.log_probs, problem.log_probs.exp()
    support = log_p > -torch.inf
    best: FusionPoint | None = None
    for weight in weights:
        alpha = log_p.new_tensor(weight).unsqueeze(1).expand(-1, len(log_p))
        log_fused = (log_p + (alpha.unsqueeze(-1) * problem.shifts).sum(0)).log_softmax(-1)
        difference = (log_fused - log_p).masked_fill(~support, 0.0)
        forward, reverse = (log_fused.exp() * difference).sum(-1), -(probs * difference).sum(-1)
        point = FusionPoint(alpha, distance(problem, forward, reverse), forward, reverse)
        best = point if best is None else better(point, best)
    assert best is not None
    return best, len(points) ** num_experts if mode == "joint" else len(points)
