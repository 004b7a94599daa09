"""The search along lines without reading a value: a fixed number of passes, which an accelerator queues at once.

`search_all_lines` does for tensors on an accelerator what `lit_logits.functional.fusion_search.search_lines` does for
those in host memory. That one asks after each pass where to look next, and the host would wait for the device. Here
every point of the grid is looked at; then the cell next to the best of them is cut into twelve, the first part in which
the objective turns is cut into twelve again, and so on.

Letters: B sequences, V vocabulary, S experts, P points.
"""

import itertools
from collections.abc import Callable
from math import ceil, log
from typing import NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.chunks import rows_a_chunk
from lit_logits.functional.fusion_problem import FusionProblem

__all__ = ["LinePoints", "Moments", "find_turn", "moments_at", "num_turn_points", "search_all_lines"]

_TOLERANCE = 1e-4  # of α
_PART = 6e-5  # of α: the middle of the last part, which is what is returned, is half as far from its ends
_NUM_PARTS = 12  # three levels take a cell of 0.1 to that


class Moments(NamedTuple):
    """A, A′ and A″ at some weights, of the shape of these, all at least 0."""

    log_norm: Tensor
    first: Tensor
    second: Tensor


class LinePoints(NamedTuple):
    """Points on lines, all of one shape.

    Attributes:
        alpha: α.
        objective: (f − ā)² + (g − b̄)².
        forward: f.
        reverse: g.
        slope: half the objective's derivative, divided by α; at 0 its limit.
        first: A′.
    """

    alpha: Tensor
    objective: Tensor
    forward: Tensor
    reverse: Tensor
    slope: Tensor
    first: Tensor


def moments_at(log_probs: Tensor, shifts: Tensor, alpha: Tensor) -> Moments:
    """Compute A, A′ and A″ at P points of each line, as many at a time as make 2²⁶ values.

    Args:
        log_probs: (B, V) log P; −inf off the common support.
        shifts: (..., B, V) Δ with E_P[Δ] = 0.
        alpha: (P, ..., B).

    Returns:
        Moments (P, ..., B).
    """
    parts = [_moments(log_probs, shifts, chunk) for chunk in alpha.split(rows_a_chunk(shifts.numel()))]
    return Moments(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _moments(log_probs: Tensor, shifts: Tensor, alpha: Tensor) -> Moments:
    # A is a log-sum-exp, A′ and A″ are mean and variance of Δ under its softmax. One (P, R, V) tensor is overwritten.
    tilted = torch.addcmul(log_probs.expand_as(shifts), alpha.unsqueeze(-1), shifts)
    highest = tilted.amax(-1, keepdim=True)
    tilted = tilted.sub_(highest).exp_()
    total = tilted.sum(-1)
    first = tilted.mul_(shifts).sum(-1) / total
    second = tilted.mul_(shifts).sum(-1) / total
    log_norm = total.log() + highest.squeeze(-1)
    return Moments(*(value.clamp(min=0) for value in (log_norm, first, second - first.square())))


def find_turn(holds_turn: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, *, width: float) -> Tensor:
    """Cut the interval from `start` to `end` into twelve, take the first part that holds a turn, and go on with it.

    Args:
        holds_turn: takes points (13, ...) and returns (12, ...), whether there is a turn between one and the next; the
            last part is taken where there is none.
        start: (...) where the interval starts.
        end: (...) where it ends, above or below.
        width: the largest distance of the two.

    Returns:
        (...), the middle of the last part, less than 3e-5 from its ends.

    Example:
        >>> find_turn(lambda x: x[1:] ** 2 > 2, torch.tensor(0.0), torch.tensor(2.0), width=2.0).round(decimals=3)
        tensor(1.4140)
    """
    marks = torch.arange(_NUM_PARTS + 1, device=start.device).view(-1, *[1] * start.ndim) / _NUM_PARTS
    for _ in range(_num_levels(width)):
        points = torch.lerp(start.unsqueeze(0), end.unsqueeze(0), marks.to(start.dtype))
        # The number of parts before the first turn.
        part = (holds_turn(points).cumsum(0) == 0).sum(0, keepdim=True).clamp(max=_NUM_PARTS - 1)
        start, end = points.gather(0, part).squeeze(0), points.gather(0, part + 1).squeeze(0)
    return (start + end) / 2


def num_turn_points(width: float) -> int:
    """Return at how many points `find_turn` looks."""
    return _num_levels(width) * (_NUM_PARTS + 1)


def _num_levels(width: float) -> int:
    return max(0, ceil(log(max(width, _PART) / _PART, _NUM_PARTS)))


def search_all_lines(problem: FusionProblem, shifts: Tensor, grid: list[float]) -> tuple[LinePoints, int]:
    """Find the minimum along each Δ (S, B), never above a point of `grid`, which ends at the bounds, within 1e-4 of α.

    Returns:
        Points (S, B), and the number of fused distributions that were evaluated for each.
    """
    seen = _evaluate(problem, shifts, torch.stack([torch.full_like(shifts[..., 0], alpha) for alpha in grid]))
    best, beside = _best_cell(seen)
    start, end = _take(seen.alpha, best), _take(seen.alpha, beside)
    towards = (end - start).sign()

    def holds_turn(points: Tensor) -> Tensor:
        found = _evaluate(problem, shifts, points)
        # The objective falls no more; or it is higher at the next point, and falls there again.
        is_higher = found.objective[1:] > _with_rounding(found.objective[:-1])
        return (found.slope[1:] * towards >= 0) | is_higher

    width = max((after - before for before, after in itertools.pairwise(grid)), default=0.0)
    alpha = torch.where(start == end, start, find_turn(holds_turn, start, end, width=width))
    refined = LinePoints(*(value.squeeze(0) for value in _evaluate(problem, shifts, alpha.unsqueeze(0))))
    of_grid = LinePoints(*(_take(values, best) for values in seen))
    wins = refined.objective <= _with_rounding(of_grid.objective)
    found = LinePoints(*(torch.where(wins, new, old) for new, old in zip(refined, of_grid, strict=True)))
    # Where Δ is constant, all α give the same distribution: the first.
    found = found._replace(alpha=torch.where(seen.first[-1] > 0, found.alpha, seen.alpha[0]))
    return found, len(grid) + num_turn_points(width) + 1


def _with_rounding(objective: Tensor) -> Tensor:
    """Return an upper bound of what an objective may be taken for: f and g each round by a few eps.

    The slope, in which most of the error of A cancels, tells apart points that the objective does not.
    """
    noise = 8 * torch.finfo(objective.dtype).eps
    return objective + 2 * noise * objective.sqrt() + noise**2


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Return the values (P, ...) at one index (...) each."""
    return values.gather(0, index.unsqueeze(0)).squeeze(0)


def _best_cell(seen: LinePoints) -> tuple[Tensor, Tensor]:
    """Return the best point of each line, and the one beside it to which the objective falls.

    That is the best point itself where a bound is the minimum, and where the targets are reached. Often all points
    reach them, where one token has nearly all the mass: the middle then, as in `search_lines`.
    """
    middle = len(seen.alpha) // 2
    reached = seen.objective[middle] <= (2 * torch.finfo(seen.alpha.dtype).eps) ** 2
    best = torch.where(reached, middle, seen.objective.argmin(0))
    beside = torch.where(_take(seen.slope, best) < 0, best + 1, best - 1).clamp(0, len(seen.alpha) - 1)
    return best, torch.where(reached, best, beside)


def _evaluate(problem: FusionProblem, shifts: Tensor, alpha: Tensor) -> LinePoints:
    """Compute objective and slope at points (P, S, B) of lines (S, B); see `_evaluate` of `fusion_search`."""
    log_norm, first, second = moments_at(problem.log_probs, shifts, alpha)
    forward, reverse = (alpha * first - log_norm).clamp(min=0), log_norm
    over_f, over_g = forward - problem.forward.mean(0), reverse - problem.reverse.mean(0)
    # At α = 0 the quotient is 0/0, or what rounding left; A′ = α A″ near it.
    ratio = torch.where(alpha > _TOLERANCE, first / alpha.clamp(min=_TOLERANCE), second)
    return LinePoints(
        alpha, over_f.square() + over_g.square(), forward, reverse, over_f * second + over_g * ratio, first
    )
