"""The search for fusion weights by exponential tilting; see `lit_logits.functional.dynamic_fusion` for the formulas.

Letters: B sequences, V vocabulary, S experts, R lines (S·B, less those that are done).
"""

import itertools
from collections.abc import Generator, Sequence
from math import nan, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.checks import may_read
from lit_logits.functional.chunks import rows_a_chunk
from lit_logits.functional.fusion_lines import search_all_lines
from lit_logits.functional.fusion_problem import FusionProblem, one_hot_rows

__all__ = [
    "FusionPoint",
    "better",
    "distance",
    "evaluate_jointly",
    "pick_expert",
    "search_jointly",
    "search_lines",
]

_TOLERANCE = 1e-4  # of α
_MAX_STEPS = 12
_NEGLIGIBLE = 1e-6  # nats², of a search over all weights: a thousandth of a nat in each divergence
_MAX_POINTS, _NUM_STARTS = 81, 4  # of a search over all weights
_TINY = 1e-12  # keeps quotients finite at α = 0, where f, g and their slopes are 0


class FusionPoint(NamedTuple):
    """Weights with their objective and divergences.

    Attributes:
        alpha: (S, B), or with further dimensions in front, which the others have too.
        objective: see `distance`; (S, B) of searches along lines, else (B,), as are the next two.
        kl_forward: f in nats.
        kl_reverse: g in nats.
    """

    alpha: Tensor
    objective: Tensor
    kl_forward: Tensor
    kl_reverse: Tensor


def distance(problem: FusionProblem, forward: Tensor, reverse: Tensor) -> Tensor:
    """Compute (f − ā)² + (g − b̄)², the part of the objective that depends on α, divided by S."""
    return (forward - problem.forward.mean(0)).square() + (reverse - problem.reverse.mean(0)).square()


def better(new: FusionPoint, old: FusionPoint, by: float = 0.0) -> FusionPoint:
    """Return the point of smaller objective, sequence by sequence; the old one where that gains no more than `by`."""
    wins = new.objective < old.objective - by
    alpha = torch.where(wins.unsqueeze(-2), new.alpha, old.alpha)
    return FusionPoint(alpha, *(torch.where(wins, a, b) for a, b in zip(new[1:], old[1:], strict=True)))


class _Evaluation(NamedTuple):
    """One evaluation on a line, in Python floats.

    Attributes:
        alpha: α.
        objective: (f − ā)² + (g − b̄)².
        forward: f.
        reverse: g.
        over_f: f − ā.
        over_g: g − b̄.
        first: A′, which is also the slope of g.
        slope: half the objective's derivative, divided by α; at 0 its limit.
        guess: next guess at the minimum.
    """

    alpha: float
    objective: float
    forward: float
    reverse: float
    over_f: float
    over_g: float
    first: float
    slope: float
    guess: float


_Search = Generator[float, Sequence[float], _Evaluation]


def _evaluate(alpha: float, moments: Sequence[float], target_f: float, target_g: float) -> _Evaluation:
    """Compute objective, slope and next guess at α from A, A′ and A″."""
    log_norm, first, second = moments
    # As E_P[Δ] = 0: f = α A′ − A with slope α A″, and g = A with slope A′. Rounding may leave f a little below 0.
    forward, reverse = max(alpha * first - log_norm, 0.0), log_norm
    over_f, over_g, rise_f = forward - target_f, reverse - target_g, alpha * second
    # A Gauss–Newton step in √f and √g, which are nearly straight lines through 0: f − ā is about 2 √ā (√f − √ā).
    # In f and g themselves, which start like α², a step from a small α would go far beyond the minimum.
    root_f, root_g = max(sqrt(forward), _TINY), max(sqrt(reverse), _TINY)
    steep_f, steep_g = rise_f / root_f, first / root_g
    if alpha > _TOLERANCE:
        slope = over_f * second + over_g * first / alpha
    else:  # 0/0, or digits that rounding left: their limits, as A′ = α A″ and f = g = α² A″/2 near 0
        slope = (over_f + over_g) * second
        steep_f = steep_g = sqrt(2 * second)
    pull_f, pull_g = target_f * steep_f, target_g * steep_g
    excess = pull_f * (root_f - sqrt(target_f)) + pull_g * (root_g - sqrt(target_g))
    guess = alpha - 2 * excess / ((pull_f * steep_f + pull_g * steep_g) or 1.0)
    objective = over_f * over_f + over_g * over_g
    return _Evaluation(alpha, objective, forward, reverse, over_f, over_g, first, slope, guess)


def _still_open(
    points: dict[float, tuple[float, float]], latest: _Evaluation, best: float
) -> dict[float, tuple[float, float]]:
    """Return the points that may be better than `best`.

    Each point is held with lower bounds on |f − ā| and |g − b̄| there, which the latest evaluation tightens. f and g
    grow with α. g is convex: at larger α it lies above its tangent, at smaller α below its chord from 0.
    """
    left = {}
    for point, (miss_f, miss_g) in points.items():
        ahead = point - latest.alpha
        if ahead > 0:
            # f and g only rise from here: where they are above their targets already, they miss by more.
            miss_f, miss_g = max(miss_f, latest.over_f), max(miss_g, latest.over_g + latest.first * ahead)
        elif ahead < 0:
            # The mirror image: where they are below their targets here, they are further below there.
            chord = latest.reverse / latest.alpha
            miss_f, miss_g = max(miss_f, -latest.over_f), max(miss_g, -latest.over_g - chord * ahead)
        if ahead and miss_f * miss_f + miss_g * miss_g < best:
            left[point] = miss_f, miss_g
    return left


def _search_line(grid: list[float], target_f: float, target_g: float, negligible: float) -> _Search:
    """Ask for weights one by one, be sent A, A′ and A″ at them, and return the best.

    First come the grid's points, except those that are proven no better than the best so far. Then comes the cell next
    to the best of them, on the side to which the objective falls: a bracketed secant search for a root of the slope
    divided by α, (f − ā) A″ + (g − b̄) A′/α. The secant runs on α², in which this is nearly a straight line.
    """
    # A generator, so that many lines can share each pass over V while each keeps its own state; see `search_lines`.
    points, slopes, best = {point: (0.0, 0.0) for point in grid}, {}, None
    alpha = grid[len(grid) // 2]
    while points:
        latest = _evaluate(alpha, (yield alpha), target_f, target_g)
        slopes[alpha] = latest.slope
        if latest.first <= 0 < alpha:  # Δ is constant, so all α give the same distribution
            return latest._replace(alpha=grid[0])
        best = latest if best is None or latest.objective < best.objective else best
        if best.objective <= negligible:  # often so where one token has nearly all the mass
            return best
        points = _still_open(points, latest, best.objective)
        # Near the guess a good point is most likely, and a good point closes many others.
        alpha = min(points, key=lambda point: abs(point - latest.guess), default=alpha)
    assert best is not None
    beside = grid.index(best.alpha) + (1 if best.slope < 0 else -1)
    if not 0 <= beside < len(grid):  # a bound is the minimum
        return best
    # The neighbour has no slope if the bounds ruled it out unseen; then the first step is the Gauss–Newton guess.
    latest, last, last_slope = best, grid[beside], slopes.get(grid[beside])
    below, above = sorted((latest.alpha, last))
    for _ in range(_MAX_STEPS):
        below, above = (latest.alpha, above) if latest.slope < 0 else (below, latest.alpha)
        guess = latest.guess if last_slope is None else _secant(latest.alpha, latest.slope, last, last_slope)
        if not below <= guess <= above:  # also for NaN: bisect
            guess = (below + above) / 2
        if best.objective <= negligible:
            break
        if abs(guess - latest.alpha) <= _TOLERANCE / 2:
            if last_slope is not None:
                break
            # A Gauss–Newton guess may be short of a minimum that misses the targets: ask for a second slope.
            guess = max(latest.alpha - _TOLERANCE, below) if latest.slope > 0 else min(latest.alpha + _TOLERANCE, above)
        last, last_slope = latest.alpha, latest.slope
        latest = _evaluate(guess, (yield guess), target_f, target_g)
        best = latest if latest.objective < best.objective else best
    return best


def _secant(alpha: float, slope: float, last: float, last_slope: float) -> float:
    """Return the root of the straight line through two slopes over α²; NaN if it has no real root."""
    square = alpha**2 - slope * (alpha**2 - last**2) / (slope - last_slope) if slope != last_slope else nan
    return sqrt(square) if square >= 0 else nan


def search_lines(problem: FusionProblem, shifts: Tensor, grid: list[float]) -> tuple[FusionPoint, int]:
    """Find the minimum along each Δ (S, B), never above a point of `grid`, which ends at the bounds, within 1e-4 of α.

    All lines take their passes over V together, each decides on its own, and those that are done drop out. On an
    accelerator, where each decision would wait for the device, see `search_all_lines`.
    """
    if not may_read(shifts):
        points, num_evals = search_all_lines(problem, shifts, grid)
        return FusionPoint(*points[:4]), num_evals
    targets = [target.mean(0).tolist() * len(shifts) for target in (problem.forward, problem.reverse)]
    negligible = (2 * torch.finfo(shifts.dtype).eps) ** 2  # the rounding of two numbers
    searches = [_search_line(grid, target_f, target_g, negligible) for target_f, target_g in zip(*targets, strict=True)]
    alpha, found = [next(search) for search in searches], dict[int, _Evaluation]()
    may_overflow = bool(grid[-1] * shifts.max() > 80)  # of P e^{αΔ}; its sum is at least 1, as E_P[Δ] = 0
    log_probs, left, buffer = problem.log_probs, shifts, torch.empty_like(shifts).flatten(0, 1)
    lines = unfinished = list(range(len(searches)))
    num_evals = 0
    while unfinished:
        num_evals += 1
        moments = _tilt(log_probs, left, [alpha[line] for line in lines], buffer[: len(lines)], may_overflow)
        for line, sent in zip(lines, moments, strict=True):
            if line not in found:
                try:
                    alpha[line] = searches[line].send(sent)
                except StopIteration as end:
                    found[line] = end.value
        unfinished = [line for line in lines if line not in found]
        # Lines that are done are still evaluated until half are: a copy of those left costs about as much as a pass.
        # Lines are numbered s·B + b, so the remainder by B is the sequence.
        if 0 < 2 * len(unfinished) <= len(lines):
            lines, index = unfinished, torch.tensor(unfinished, device=shifts.device)
            log_probs, left = problem.log_probs[index % shifts.shape[1]], shifts.flatten(0, 1)[index]
    best = shifts.new_tensor([found[line][:4] for line in range(len(searches))])
    return FusionPoint(*best.T.unflatten(1, shifts.shape[:2])), num_evals


def _tilt(
    log_probs: Tensor, shifts: Tensor, alpha: list[float], buffer: Tensor, may_overflow: bool
) -> list[list[float]]:
    """Compute A, A′ and A″ of each line, for Δ of shape (S, B, V) or (R, V), in one pass over V."""
    # A is a log-sum-exp of log P + αΔ, A′ and A″ are mean and variance of Δ under its softmax. `buffer` holds the only
    # (R, V) intermediate, which every step overwrites.
    weights = shifts.new_tensor(alpha).view(*shifts.shape[:-1], 1)
    tilted = torch.addcmul(log_probs.expand_as(shifts), weights, shifts, out=buffer.view_as(shifts))
    top: Tensor | float = 0.0
    if may_overflow:
        highest = tilted.amax(-1, keepdim=True)
        tilted, top = tilted.sub_(highest), highest.squeeze(-1)
    total = tilted.exp_().sum(-1)
    first = torch.linalg.vecdot(tilted, shifts) / total
    second = torch.linalg.vecdot(tilted.mul_(shifts), shifts) / total
    moments = torch.stack([total.log() + top, first, second - first.square()], -1).clamp(min=0)  # α ≥ 0, E_P[Δ] = 0
    return moments.flatten(0, -2).tolist()


def pick_expert(lines: FusionPoint) -> FusionPoint:
    """Return the best of S searches along a line; the other experts get weight 0."""
    chosen = lines.objective.argmin(0)
    alpha = lines.alpha * one_hot_rows(chosen, len(lines.alpha))
    return FusionPoint(alpha, *(value.gather(0, chosen.unsqueeze(0)).squeeze(0) for value in lines[1:]))


def search_jointly(problem: FusionProblem, single: FusionPoint, grid: list[float]) -> tuple[FusionPoint, int]:
    """Minimise over the whole α by damped Gauss–Newton steps from several starts, as there are local minima.

    They are the better of one expert and all alike, and the best points of a coarse grid. The result is never more
    than 1e-6 nats² worse than any of them. Sequences share the passes over V, and each keeps a damping of its own. On
    an accelerator the starts share them too, and all steps are taken, so that the host never waits.
    """
    shifts = problem.shifts
    negligible = _NEGLIGIBLE / len(shifts)  # as objectives are, here
    alike, num_evals = search_lines(problem, shifts.sum(0, keepdim=True), grid)
    alike = FusionPoint(alike.alpha.expand(len(shifts), -1), *(value.squeeze(0) for value in alike[1:]))
    best, more = _descend(problem, better(alike, single), grid)
    num_evals += more
    readable = may_read(shifts)
    if readable and bool((best.objective <= negligible).all()):
        return best, num_evals
    points = _evaluate_coarsely(problem, _coarse_grid(len(shifts), grid), rows_a_chunk(shifts[0].numel()))
    starts = _lowest(points)
    if readable:  # one by one, as few steps are enough for most
        descents = [_descend(problem, FusionPoint(*start), grid) for start in zip(*starts, strict=True)]
    else:
        found, more = _descend(problem, starts, grid)
        descents = [(FusionPoint(*point), more) for point in zip(*found, strict=True)]
    for point, more in descents:
        # Where several weights reach both targets, rounding must not choose between them: the first ones stay.
        best, num_evals = better(point, best, by=negligible), num_evals + more
    return best, num_evals + len(points.alpha)


def _evaluate_coarsely(problem: FusionProblem, weights: Sequence[tuple[float, ...]], chunk_size: int) -> FusionPoint:
    """Evaluate the same weights for all sequences, `chunk_size` at a time: points of shape (number of weights, ...)."""
    like = problem.forward
    alpha = torch.stack([torch.stack([torch.full_like(like[0], weight) for weight in point]) for point in weights])
    parts = [evaluate_jointly(problem, chunk)[0] for chunk in alpha.split(chunk_size)]
    return FusionPoint(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _lowest(points: FusionPoint) -> FusionPoint:
    """Return the points of lowest objective, sequence by sequence: the lowest, the second lowest and so on."""
    order = points.objective.argsort(0)[:_NUM_STARTS]
    alpha = points.alpha.gather(0, order.unsqueeze(1).expand(-1, points.alpha.shape[1], -1))
    return FusionPoint(alpha, *(values.gather(0, order) for values in points[1:]))


def _coarse_grid(num_experts: int, grid: list[float]) -> list[tuple[float, ...]]:
    """Return weights of all experts, evenly spaced within the bounds, bounds among them, at most 81."""
    sides = next((n for n in range(9, 1, -1) if n**num_experts <= _MAX_POINTS), 0)
    if not sides:  # too many experts: the middle alone
        return [((grid[0] + grid[-1]) / 2,) * num_experts]
    steps = [grid[0] + (grid[-1] - grid[0]) * number / (sides - 1) for number in range(sides)]
    return list(itertools.product(steps, repeat=num_experts))


def _descend(problem: FusionProblem, start: FusionPoint, grid: list[float]) -> tuple[FusionPoint, int]:
    """Take damped Gauss–Newton steps from points (..., S, B).

    A step that is no better is taken back half way, with more damping (Levenberg–Marquardt).
    """
    readable = may_read(problem.shifts)
    best, num_evals = start, 0
    target = torch.stack([problem.forward.mean(0), problem.reverse.mean(0)], -1)
    damping = torch.full_like(best.objective, 1e-3)
    alpha, done = best.alpha, torch.zeros_like(best.objective, dtype=torch.bool)
    for count in range(_MAX_STEPS):
        num_evals += 1
        point, jacobian = evaluate_jointly(problem, alpha)
        wins = (point.objective <= best.objective) | (count == 0)  # the start itself, which may round otherwise here
        best = better(point, best)
        damping = torch.where(wins, damping / 4, damping * 8).clamp(1e-7, 1e7)
        weights, residual = alpha.mT, torch.stack([point.kl_forward, point.kl_reverse], -1) - target
        # A weight at a bound that the gradient pushes outwards is held there; otherwise clamping would spoil the step
        # of all others, which counts on its move.
        gradient = (jacobian.mT @ residual.unsqueeze(-1)).squeeze(-1)
        stuck = ((weights <= grid[0]) & (gradient > 0)) | ((weights >= grid[-1]) & (gradient < 0))
        move = _gauss_newton_move(jacobian.masked_fill(stuck.unsqueeze(-2), 0.0), residual, damping)
        moved = (weights + move).clamp(grid[0], grid[-1]).mT
        new = torch.where(wins.unsqueeze(-2), moved, (best.alpha + alpha) / 2)
        done = done | ((new - alpha).abs().amax(-2) <= _TOLERANCE)
        if readable and bool(done.all()):
            break
        alpha = torch.where(done.unsqueeze(-2), alpha, new)
    return best, num_evals


def evaluate_jointly(problem: FusionProblem, alpha: Tensor) -> tuple[FusionPoint, Tensor]:
    """Evaluate f and g at α (..., S, B), with their gradients over α as rows of a Jacobian (..., B, 2, S)."""
    log_probs, shifts = problem.log_probs, problem.shifts
    tilted = log_probs + torch.einsum("...sb,sbv->...bv", alpha, shifts)
    # A is the log-sum-exp; ∇A and ∇²A are mean and covariance of Δ under the fused distribution.
    log_norm, weight = tilted.logsumexp(-1), tilted.softmax(-1)
    first = torch.einsum("...bv,sbv->...bs", weight, shifts)
    second = torch.einsum("...bv,sbv,rbv->...bsr", weight, shifts, shifts)
    covariance, weights = second - first.unsqueeze(-1) * first.unsqueeze(-2), alpha.mT
    # f = α·∇A − A and g = A, as E_P[Δ] = 0, hence ∇f = ∇²A α and ∇g = ∇A. Divergences round to below 0 at worst.
    forward, reverse = ((weights * first).sum(-1) - log_norm).clamp(min=0), log_norm.clamp(min=0)
    jacobian = torch.stack([(covariance @ weights.unsqueeze(-1)).squeeze(-1), first], -2)
    return FusionPoint(alpha, distance(problem, forward, reverse), forward, reverse), jacobian


def _gauss_newton_move(jacobian: Tensor, residual: Tensor, damping: Tensor) -> Tensor:
    """Solve for the damped step (B, S) −Jᵀ(J Jᵀ + λI)⁻¹ r.

    It equals the usual −(JᵀJ + λI)⁻¹ Jᵀ r, but solves a 2 × 2 system instead of S × S. For more than two experts JᵀJ
    is singular, and the smaller system is the better conditioned one.
    """
    normal = jacobian @ jacobian.mT
    # λ is relative to the size of J Jᵀ, so that one damping suits sequences of any divergence.
    scale = normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(normal.dtype).tiny)
    normal = normal + (damping * scale)[..., None, None] * torch.eye(2, dtype=normal.dtype, device=normal.device)
    # `solve_ex` does not raise and does not wait for the device; where float32 leaves nothing to solve, nothing moves.
    move = -(jacobian.mT @ torch.linalg.solve_ex(normal, residual.unsqueeze(-1)).result).squeeze(-1)
    return move.nan_to_num(0.0, 0.0, 0.0)
