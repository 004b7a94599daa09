"""The search for fusion weights by exponential tilting; see `lit_logits.functional.dynamic_fusion` for the formulas.

Letters: B sequences, V vocabulary, S experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FusionPoint", "FusionProblem", "better", "distance", "pick_expert", "search_jointly", "search_lines"]

_TOLERANCE = 1e-4
_MAX_STEPS = 12


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


def _tilt(log_probs: Tensor, shifts: Tensor, alpha: Tensor, may_overflow: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A, A′ and A″ along each line, (S, B): one pass over V."""
    weight = torch.addcmul(log_probs.expand_as(shifts), alpha.unsqueeze(-1), shifts)
    top: Tensor | float = 0.0
    if may_overflow:
        highest = weight.amax(-1, keepdim=True)
        weight, top = weight.sub_(highest), highest.squeeze(-1)
    total = weight.exp_().sum(-1)
    first = torch.linalg.vecdot(weight, shifts) / total
    second = torch.linalg.vecdot(weight.mul_(shifts), shifts) / total
    return total.log() + top, first, second - first.square()


def search_lines(problem: FusionProblem, shifts: Tensor, low: float, high: float) -> tuple[FusionPoint, int]:
    """Minimum along each Δ (S, B) by a secant search that a bracket keeps safe.

    Half the slope of the distance, over α, is h = (f − ā) A″ + (g − b̄) A′/α: negative below the roots of f = ā and
    g = b̄, positive above them.
    """
    log_probs = problem.log_probs
    target_f, target_g = problem.forward.mean(0), problem.reverse.mean(0)
    variance = torch.linalg.vecdot(log_probs.exp() * shifts, shifts)
    may_overflow = bool(high * shifts.max() > 80)  # of P e^{αΔ}; its sum is at least 1, as E_P[Δ] = 0
    # f and g start as α² A″(0)/2, so their sum is the targets' about here.
    alpha = ((target_f + target_g) / variance.clamp(min=torch.finfo(variance.dtype).tiny)).sqrt().clamp(low, high)
    alpha = torch.where(variance > 0, alpha, low)
    last, last_slope = torch.zeros_like(alpha), -(target_f + target_g) * variance
    below, above = torch.full_like(alpha, low), torch.full_like(alpha, high)
    done, open_above = variance <= 0, torch.ones_like(alpha, dtype=torch.bool)
    best = FusionPoint(alpha, torch.full_like(alpha, torch.inf), torch.zeros_like(alpha), torch.zeros_like(alpha))
    for count in range(1, _MAX_STEPS + 1):
        log_norm, first, second = _tilt(log_probs, shifts, alpha, may_overflow)
        forward, reverse = (alpha * first - log_norm).clamp(min=0), log_norm.clamp(min=0)
        best = better(FusionPoint(alpha, distance(problem, forward, reverse), forward, reverse), best)
        slope = (forward - target_f) * second + (reverse - target_g) * first / alpha.clamp(min=1e-12)
        falls = slope < 0
        below, above = torch.where(falls, alpha, below), torch.where(falls, above, alpha)
        open_above &= falls
        if count == 1:  # Newton's step on √f + √g, which is nearly a straight line
            root_f, root_g = forward.sqrt().clamp(min=1e-12), reverse.sqrt().clamp(min=1e-12)
            rise = 0.5 * (alpha * second / root_f + first / root_g)
            guess = alpha - (root_f + root_g - target_f.sqrt() - target_g.sqrt()) / rise
        else:
            guess = alpha - slope * (alpha - last) / (slope - last_slope)
        fallback = torch.where(open_above & (guess >= above), above, (below + above) / 2)
        guess = torch.where((guess > below) & (guess < above), guess, fallback)  # NaN is outside too
        at_bound = (falls & (alpha >= high)) | (~falls & (alpha <= low))
        last, last_slope = alpha, slope
        alpha = torch.where(done | at_bound, alpha, guess)
        # Where the two targets agree, the first step may end at the minimum, and else at another point near it.
        done = done | at_bound | ((count > 1) & ((alpha - last).abs() <= _TOLERANCE))
        if bool(done.all()):
            break
    return best, count


def pick_expert(lines: FusionPoint) -> FusionPoint:
    """The best of S searches along a line; the others do not act."""
    chosen = lines.objective.argmin(0)
    alpha = lines.alpha * F.one_hot(chosen, len(lines.alpha)).T
    return FusionPoint(alpha, *(value.gather(0, chosen.unsqueeze(0)).squeeze(0) for value in lines[1:]))


def search_jointly(problem: FusionProblem, single: FusionPoint, low: float, high: float) -> tuple[FusionPoint, int]:
    """Damped Gauss–Newton steps on the two residuals over the whole α, from the better of one expert and all alike."""
    log_probs, shifts = problem.log_probs, problem.shifts
    alike, num_evals = search_lines(problem, shifts.sum(0, keepdim=True), low, high)
    alike = FusionPoint(alike.alpha.expand(len(shifts), -1), *(value.squeeze(0) for value in alike[1:]))
    best = better(alike, single)
    target = torch.stack([problem.forward.mean(0), problem.reverse.mean(0)], -1)
    damping = torch.full_like(best.objective, 1e-3)
    alpha = best.alpha
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
        stuck = ((weights <= low) & (gradient > 0)) | ((weights >= high) & (gradient < 0))
        jacobian = jacobian.masked_fill(stuck.unsqueeze(-2), 0.0)
        normal = jacobian @ jacobian.mT
        scale = normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(normal.dtype).tiny)
        normal = normal + (damping * scale)[:, None, None] * torch.eye(2, dtype=normal.dtype, device=normal.device)
        move = -(jacobian.mT @ torch.linalg.solve(normal, residual.unsqueeze(-1))).squeeze(-1)
        new = (weights + move.nan_to_num()).clamp(low, high).T
        if bool(((new - alpha).abs().amax(0) <= _TOLERANCE).all()):
            break
        alpha = torch.where(wins, new, (best.alpha + alpha) / 2)
    return best, num_evals
