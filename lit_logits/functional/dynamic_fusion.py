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
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_logits.functional.checks import check_not_negative, may_read
from lit_logits.functional.fusion_criteria import (
    acting_shifts,
    divergences_at,
    entropy,
    equal_weights,
    projected_weights,
)
from lit_logits.functional.fusion_problem import (
    FusionProblem,
    check_alpha,
    check_bounds,
    check_fusion_shapes,
    is_broken,
    pose_fusion,
    promoted,
    scale_weights,
)
from lit_logits.functional.fusion_search import (
    FusionPoint,
    better,
    distance,
    pick_expert,
    search_jointly,
    search_lines,
)

__all__ = [
    "FusionCriterion",
    "FusionMode",
    "FusionSolver",
    "FusionWeights",
    "fuse_logits",
    "fusion_weights",
]

FusionSolver = Literal["tilting", "grid"]
FusionMode = Literal["single", "joint"]
FusionCriterion = Literal["distance", "projection", "equal", "uncertain"]

_MAX_GRID = 10_000
_MIN_ENTROPY = 0.5


class FusionWeights(NamedTuple):
    """Result of `fusion_weights`.

    Attributes:
        alpha: (S, B) weight of each expert.
        objective: (B,) what the criterion leaves, in nats², before `scale` and `min_entropy`; of `distance` the sum of
            squares that is minimised.
        kl_forward: (B,) KL(P~ ‖ P) in nats.
        kl_reverse: (B,) KL(P ‖ P~) in nats.
        num_evals: fused distributions that were evaluated for a sequence and, with `single`, an expert: the number of
            the slowest one, as those that are done drop out; on an accelerator the same for all.
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
    check_fusion_shapes(large_logits, base_logits, expert_logits)
    check_alpha(alpha, expert_logits)
    large, base, experts = promoted(large_logits, base_logits, expert_logits)
    fused = large
    for expert, weight in zip(experts, alpha.to(large.dtype).unsqueeze(-1), strict=True):
        moved = weight * (expert - base)
        # Filled in rather than computed: −inf times a weight of 0, and −inf minus −inf, would be NaN.
        moved = moved.masked_fill(expert == -torch.inf, -torch.inf)
        fused = fused + moved.masked_fill((base == -torch.inf) | (weight == 0), 0.0)
    return fused


@torch.no_grad()
def fusion_weights(
    large_logits: Tensor,
    base_logits: Tensor,
    expert_logits: Tensor,
    *,
    criterion: FusionCriterion = "distance",
    solver: FusionSolver = "tilting",
    mode: FusionMode = "single",
    bounds: tuple[float, float] = (0.0, 2.0),
    step: float = 0.1,
    scale: float = 1.0,
    min_entropy: float | None = None,
) -> FusionWeights:
    """Find the weights α of the experts, for each sequence on its own; nothing is carried over from another step.

    Where the logits lie on an accelerator, a fixed number of passes is queued and the host never waits. No value is
    checked then: a sequence whose logits are NaN or +inf, or that has no possible token, gets NaN for all results.

    Divergences are taken over the tokens that all models can emit. As Σ_t (f − a_t)² = S (f − ā)² + const, every search
    aims at the means ā and b̄, also that along one expert.

    Args:
        large_logits: (B, V) of the large model.
        base_logits: (B, V) of the small base.
        expert_logits: (S, B, V) of the experts.
        criterion: what α is to reach. `distance`: the paper's, as above. `projection`: of the fused distributions with
            α between 0 and 1 the one nearest to the expert, α = argmin KL(Q_t ‖ P~_α). Between the ends the fused model
            expects of Δ_t what the expert does; the objective is the square of what these differ by. `equal`: the fused
            distribution is as far from the large model as from the fully moved one, KL(P~_α ‖ P) = KL(P~_α ‖ P~_1),
            with α between 0 and 1; the objective is the square of the difference. `uncertain`: α = 1 where the large
            model is uncertain, see `min_entropy`; the objective is 0. With every criterion but `distance` the expert
            that differs most from the base acts, or with `joint` all of them alike, for `projection` such that the mean
            of their divergences is the least.
        solver: of `distance`. `tilting`: A and its derivatives give f, g and their slopes in one pass over V. As f and
            g grow with α and A is convex, a few points of the grid prove that no other can win, and a secant search
            next to the best of them ends within 1e-4 of a minimum. Up to rounding it is never above the grid. Where a
            few tokens hold nearly all the mass there may be two minima, and a lower one between other points. Three to
            six passes for most sequences; on an accelerator all points of the grid, and about 40 more. `grid`: the
            paper's search.
        mode: `single`: one expert acts at a step, the best of S searches along a line; the lowest number among equals.
            `joint`: all may act, never worse than `single`.
        bounds: smallest and largest α, 0 ≤ smallest ≤ largest.
        step: distance of the points of the grid, which starts at the smallest α; `tilting` looks at these points too.
        scale: factor on the α that is found, before it is cut to the bounds.
        min_entropy: nats; α is 0 where the entropy of the large model is lower. Default 0.5 with `uncertain`, else 0.

    Raises:
        ValueError: If shapes do not fit, logits (in host memory) are NaN or +inf, no token is possible for a sequence,
            bounds cross or are infinite, `scale` or `min_entropy` is negative, or a joint grid is too fine.

    Example:
        >>> base, expert = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[[1.0, 0.0, 4.0]]])
        >>> fusion_weights(base, base, expert).alpha  # large = base: the expert itself
        tensor([[1.]])
        >>> fusion_weights(base, base, base.unsqueeze(0)).alpha  # expert = base: the large model itself
        tensor([[0.]])
    """
    low, high = check_bounds(bounds, step)
    if solver not in ("tilting", "grid"):
        raise ValueError(f"Expected `solver` to be 'tilting' or 'grid', but got {solver!r}.")
    if mode not in ("single", "joint"):
        raise ValueError(f"Expected `mode` to be 'single' or 'joint', but got {mode!r}.")
    if criterion not in get_args(FusionCriterion):
        raise ValueError(f"Expected `criterion` to be one of {get_args(FusionCriterion)}, but got {criterion!r}.")
    check_not_negative(scale=scale, min_entropy=min_entropy or 0.0)
    jointly = mode == "joint"
    with torch.autocast(large_logits.device.type, enabled=False):  # which would sum in half precision
        problem = pose_fusion(large_logits, base_logits, expert_logits)
        acting = None
        if criterion == "distance":
            points = [min(low + step * k, high) for k in range(int((high - low) / step + 1e-6) + 1)]
            found = _search_grid(problem, points, mode) if solver == "grid" else _tilt(problem, points, high, mode)
            (alpha, objective, forward, reverse), num_evals = found
            objective = len(problem.forward) * objective + _spread(problem)
        elif criterion == "projection":
            alpha, acting, objective, num_evals = projected_weights(problem, expert_logits, jointly=jointly)
        elif criterion == "equal":
            alpha, objective, num_evals = equal_weights(problem, jointly=jointly)
        else:
            alpha, num_evals = acting_shifts(problem, jointly=jointly)[1], 0
            objective = torch.zeros_like(alpha[0])
        floor = _MIN_ENTROPY if min_entropy is None and criterion == "uncertain" else min_entropy
        if criterion != "distance" or scale != 1 or floor:
            alpha = scale_weights(alpha, scale, (low, high), acting)
            if floor:
                alpha = alpha * (entropy(problem) >= floor)
            (forward, reverse), num_evals = divergences_at(problem, alpha), num_evals + 1
        if not may_read(alpha):
            broken = is_broken(problem)
            alpha, objective, forward, reverse = (
                value.masked_fill(broken, torch.nan) for value in (alpha, objective, forward, reverse)
            )
    return FusionWeights(alpha, objective, forward, reverse, num_evals)


def _spread(problem: FusionProblem) -> Tensor:
    """Return the part of the objective that α does not move: Σ_t (f − a_t)² = S (f − ā)² + Σ_t (a_t − ā)²."""
    forward, reverse = problem.forward, problem.reverse
    return (forward - forward.mean(0)).square().sum(0) + (reverse - reverse.mean(0)).square().sum(0)


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
        alpha = torch.stack([torch.full_like(problem.forward[0], value) for value in weight])
        log_fused = (log_p + (alpha.unsqueeze(-1) * problem.shifts).sum(0)).log_softmax(-1)
        difference = (log_fused - log_p).masked_fill(~support, 0.0)
        forward, reverse = (log_fused.exp() * difference).sum(-1), -(probs * difference).sum(-1)
        point = FusionPoint(alpha, distance(problem, forward, reverse), forward, reverse)
        best = point if best is None else better(point, best)
    assert best is not None
    return best, len(points) ** num_experts if mode == "joint" else len(points)
