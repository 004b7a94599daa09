"""The search for fusion weights by exponential tilting; see `lit_logits.functional.dynamic_fusion` for the formulas.

Letters: B sequences, V vocabulary, S experts, R lines (S·B, less those that are done).
"""

from collections.abc import Generator, Sequence
from math import nan, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FusionPoint", "FusionProblem", "better", "distance", "pick_expert", "search_jointly", "search_lines"]

_TOLERANCE = 1e-4
_MAX_STEPS = 12
_TINY = 1e-12


class FusionProblem(NamedTuple):
    """What both solvers need: log P (B, V), Δ (S, B, V) with E_P[Δ] = 0, a and b (S, B); −inf and 0 off the support."""

    log_probs: Tensor
    shifts: Tensor
    forward: Tensor
    reverse: Tensor


class FusionPoint(NamedTuple):
    """Weights (R,) or (S, B) and what they come to."""

    alpha: Tensor
    objective: Tensor
    kl_forward: Tensor
    kl_reverse: Tensor


def distance(problem: FusionProblem, forward: Tensor, reverse: Tensor) -> Tensor:
    """(f − ā)² + (g − b̄)², the part of the objective that α moves, over S."""
    return (forward - problem.forward.mean(0)).square() + (reverse - problem.reverse.mean(0)).square()


def better(new: FusionPoint, old: FusionPoint) -> FusionPoint:
    """The one of smaller objective, sequence by sequence; the old one among equals."""
    wins = new.objective < old.objective
    return FusionPoint(*(torch.where(wins, a, b) for a, b in zip(new, old, strict=True)))


class _Seen(NamedTuple):
    """One evaluation on a line; `slope` is half the objective's over α, `guess` is where the minimum seems to be."""

    alpha: float
    objective: float
    forward: float
    reverse: float
    over_f: float
    over_g: float
    first: float
    slope: float
    guess: float


_Search = Generator[float, Sequence[float], _Seen]


def _see(alpha: float, moments: Sequence[float], target_f: float, target_g: float) -> _Seen:
    """What A, A′ and A″ at α come to."""
    log_norm, first, second = moments
    forward, reverse = max(alpha * first - log_norm, 0.0), log_norm
    over_f, over_g, rise_f = forward - target_f, reverse - target_g, alpha * second
    slope = (over_f * rise_f + over_g * first) / max(alpha, _TINY)
    # A Gauss–Newton step in √f and √g, which are nearly straight lines through 0: f − ā is about 2 √ā (√f − √ā).
    root_f, root_g = max(sqrt(forward), _TINY), max(sqrt(reverse), _TINY)
    steep_f, steep_g = rise_f / root_f, first / root_g
    pull_f, pull_g = target_f * steep_f, target_g * steep_g
    excess = pull_f * (root_f - sqrt(target_f)) + pull_g * (root_g - sqrt(target_g))
    guess = alpha - 2 * excess / ((pull_f * steep_f + pull_g * steep_g) or 1.0)
    return _Seen(alpha, over_f * over_f + over_g * over_g, forward, reverse, over_f, over_g, first, slope, guess)


def _still_open(points: dict[float, tuple[float, float]], seen: _Seen, best: float) -> dict[float, tuple[float, float]]:
    """The points that may be better than `best`, with the least by which f and g are known to miss their targets there.

    Both grow with α. g is convex, so that its tangent bounds it from below ahead, its chord from 0 from above behind.
    """
    left = {}
    for point, (miss_f, miss_g) in points.items():
        ahead = point - seen.alpha
        if ahead > 0:
            miss_f, miss_g = max(miss_f, seen.over_f), max(miss_g, seen.over_g + seen.first * ahead)
        elif ahead < 0:
            chord = seen.reverse / seen.alpha
            miss_f, miss_g = max(miss_f, -seen.over_f), max(miss_g, -seen.over_g - chord * ahead)
        if ahead and miss_f * miss_f + miss_g * miss_g < best:
            left[point] = miss_f, miss_g
    return left


def _search_line(grid: list[float], target_f: float, target_g: float, negligible: float) -> _Search:
    """Ask for weights one by one, be sent A, A′ and A″ at them, and return the best.

    First the grid's points, but for those that are proven no better than the best so far. Then the cell beside the best
    of them, on the side to which the objective falls, by a bracketed secant search for a root of its slope over α,
    (f − ā) A″ + (g − b̄) A′/α. It runs on α², in which this is nearly a straight line.
    """
    points, slopes, best = {point: (0.0, 0.0) for point in grid}, {}, None
    alpha = grid[len(grid) // 2]
    while points:
        seen = _see(alpha, (yield alpha), target_f, target_g)
        slopes[alpha] = seen.slope
        if seen.first <= 0 < alpha:  # Δ is constant
            return seen._replace(alpha=grid[0])
        best = seen if best is None or seen.objective < best.objective else best
        if best.objective <= negligible:  # often so where one token has nearly all the mass
            return best
        points = _still_open(points, seen, best.objective)
        alpha = min(points, key=lambda point: abs(point - seen.guess), default=alpha)
    assert best is not None
    beside = grid.index(best.alpha) + (1 if best.slope < 0 else -1)
    if not 0 <= beside < len(grid):  # a bound is the minimum
        return best
    seen, last, last_slope = best, grid[beside], slopes.get(grid[beside])
    below, above = sorted((seen.alpha, last))
    for _ in range(_MAX_STEPS):
        below, above = (seen.alpha, above) if seen.slope < 0 else (below, seen.alpha)
        guess = seen.guess if last_slope is None else _secant(seen.alpha, seen.slope, last, last_slope)
        if not below <= guess <= above:  # NaN is not
            guess = (below + above) / 2
        if abs(guess - seen.alpha) <= _TOLERANCE or best.objective <= negligible:
            break
        last, last_slope = seen.alpha, seen.slope
        seen = _see(guess, (yield guess), target_f, target_g)
        best = seen if seen.objective < best.objective else best
    return best


def _secant(alpha: float, slope: float, last: float, last_slope: float) -> float:
    """Root of the straight line through two slopes over α²; NaN if there is none."""
    square = alpha**2 - slope * (alpha**2 - last**2) / (slope - last_slope) if slope != last_slope else nan
    return sqrt(square) if square >= 0 else nan


def search_lines(problem: FusionProblem, shifts: Tensor, grid: list[float]) -> tuple[FusionPoint, int]:
    """Minimum along each Δ (S, B): never above a point of `grid`, which ends at the bounds, refined to 1e-4.

    All lines take their passes over V together, each decides on its own, and those that are done drop out.
    """
    targets = [target.mean(0).tolist() * len(shifts) for target in (problem.forward, problem.reverse)]
    negligible = (2 * torch.finfo(shifts.dtype).eps) ** 2  # the rounding of two numbers
    searches = [_search_line(grid, target_f, target_g, negligible) for target_f, target_g in zip(*targets, strict=True)]
    alpha, found = [next(search) for search in searches], dict[int, _Seen]()
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
        if 0 < 2 * len(unfinished) <= len(lines):  # the copy pays
            lines, index = unfinished, torch.tensor(unfinished, device=shifts.device)
            log_probs, left = problem.log_probs[index % shifts.shape[1]], shifts.flatten(0, 1)[index]
    best = shifts.new_tensor([found[line][:4] for line in range(len(searches))])
    return FusionPoint(*best.T.unflatten(1, shifts.shape[:2])), num_evals


def _tilt(
    log_probs: Tensor, shifts: Tensor, alpha: list[float], buffer: Tensor, may_overflow: bool
) -> list[list[float]]:
    """A, A′ and A″ of each line, for Δ of shape (S, B, V) or (R, V): one pass over V."""
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
    """The best of S searches along a line; the others do not act."""
    chosen = lines.objective.argmin(0)
    alpha = lines.alpha * F.one_hot(chosen, len(lines.alpha)).T
    return FusionPoint(alpha, *(value.gather(0, chosen.unsqueeze(0)).squeeze(0) for value in lines[1:]))


def search_jointly(problem: FusionProblem, single: FusionPoint, grid: list[float]) -> tuple[FusionPoint, int]:
    """Damped Gauss–Newton steps on the two residuals over the whole α, from the better of one expert and all alike."""
    log_probs, shifts = problem.log_probs, problem.shifts
    alike, num_evals = search_lines(problem, shifts.sum(0, keepdim=True), grid)
    alike = FusionPoint(alike.alpha.expand(len(shifts), -1), *(value.squeeze(0) for value in alike[1:]))
    best = better(alike, single)
    target = torch.stack([problem.forward.mean(0), problem.reverse.mean(0)], -1)
    damping = torch.full_like(best.objective, 1e-3)
    alpha, done = best.alpha, torch.zeros_like(best.objective, dtype=torch.bool)
    for count in range(_MAX_STEPS):
        num_evals += 1
        tilted = log_probs + torch.einsum("sb,sbv->bv", alpha, shifts)
        log_norm, weight = tilted.logsumexp(-1), tilted.softmax(-1)
        first = torch.einsum("bv,sbv->bs", weight, shifts)
        covariance = torch.einsum("bv,sbv,rbv->bsr", weight, shifts, shifts) - first.unsqueeze(-1) * first.unsqueeze(-2)
        weights = alpha.T
        forward, reverse = ((weights * first).sum(-1) - log_norm).clamp(min=0), log_norm.clamp(min=0)
        point = FusionPoint(alpha, distance(problem, forward, reverse), forward, reverse)
        wins = (point.objective <= best.objective) | (count == 0)  # the start itself, which may round otherwise here
        best = better(point, best)
        damping = torch.where(wins, damping / 4, damping * 8).clamp(1e-7, 1e7)
        jacobian = torch.stack([(covariance @ weights.unsqueeze(-1)).squeeze(-1), first], -2)  # (B, 2, S)
        residual = torch.stack([forward, reverse], -1) - target
        gradient = (jacobian.mT @ residual.unsqueeze(-1)).squeeze(-1)
        stuck = ((weights <= grid[0]) & (gradient > 0)) | ((weights >= grid[-1]) & (gradient < 0))
        jacobian = jacobian.masked_fill(stuck.unsqueeze(-2), 0.0)
        normal = jacobian @ jacobian.mT
        scale = normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(normal.dtype).tiny)
        normal = normal + (damping * scale)[:, None, None] * torch.eye(2, dtype=normal.dtype, device=normal.device)
        # Where float32 leaves nothing to solve there is no move.
        move = -(jacobian.mT @ torch.linalg.solve_ex(normal, residual.unsqueeze(-1)).result).squeeze(-1)
        new = torch.where(
            wins, (weights + move.nan_to_num(0.0, 0.0, 0.0)).clamp(grid[0], grid[-1]).T, (best.alpha + alpha) / 2
        )
        done = done | ((new - alpha).abs().amax(0) <= _TOLERANCE)
        if bool(done.all()):
            break
        alpha = torch.where(done, alpha, new)
    return best, num_evals
