"""Weights of experts by other criteria than the paper's distance, on the same line of fused distributions.

With A(α) = log Σ_v P_v e^{αΔ_v} and E_P[Δ] = 0, see `lit_logits.functional.dynamic_fusion`:

* `equal`: KL(P~_α ‖ P) = KL(P~_α ‖ P~_1), as far from the large model as from the fully moved one. Written out,
  α A′ − A = (α − 1) A′ − A + A(1), it is A′(α) = A(1): one root, and it lies in [0, 1];
* `projection`: the least KL(Q_t ‖ P~_α), the fused distribution under which what the expert says is likeliest. The
  divergence is convex, with the slope A′(α) − E_Qt[Δ]: the fused model expects of Δ what the expert does;
* `uncertain`: 1 where the entropy of the large model is high enough, 0 elsewhere.

Letters: B sequences, V vocabulary, S experts.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lit_logits.functional.checks import may_read
from lit_logits.functional.fusion_lines import Moments, find_turn, moments_at, num_turn_points
from lit_logits.functional.fusion_problem import FusionProblem, acting_rows, one_hot_rows
from lit_logits.functional.fusion_search import evaluate_jointly
from lit_logits.functional.reductions import at_least_float32

__all__ = ["acting_shifts", "divergences_at", "entropy", "equal_weights", "projected_weights"]

_TOLERANCE = 5e-5  # of α
_MAX_STEPS = 50


def entropy(problem: FusionProblem) -> Tensor:
    """Return the entropy of the large model (B,) in nats, over the common support."""
    log_probs = problem.log_probs
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)


def acting_shifts(problem: FusionProblem, *, jointly: bool) -> tuple[Tensor, Tensor]:
    """Return the Δ (B, V) along which a search goes, and the experts (S, B) that it stands for, 1 or 0.

    All of them jointly, or the one that differs most from the base, by KL(Q_t ‖ Q); the lowest number among equals.
    """
    shifts, num_experts = problem.shifts, len(problem.shifts)
    if jointly:
        return shifts.sum(0), torch.ones_like(problem.forward)
    chosen = problem.forward.argmax(0)
    acting = one_hot_rows(chosen, num_experts).to(shifts.dtype)
    return acting_rows(shifts, chosen), acting


def equal_weights(problem: FusionProblem, *, jointly: bool) -> tuple[Tensor, Tensor, int]:
    """Return weights (S, B) of equal divergences, the square of what they differ by, and the number of evaluations."""
    line, acting = acting_shifts(problem, jointly=jointly)
    end = _moments_on(problem, line, torch.ones_like(acting[0]))
    target = end.log_norm
    alpha, first, num_evals = _find_root(problem, line, target, end)
    says_something = target > torch.finfo(target.dtype).eps
    alpha = torch.where(says_something, alpha, 0.5)  # the limit where the experts say nothing
    return alpha * acting, (first - target).square(), num_evals + 1


def projected_weights(
    problem: FusionProblem, expert_logits: Tensor, *, jointly: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return the weights (S, B) of the distributions nearest to the experts.

    Then come which experts act (S, B), the square of what fused model and expert expect of Δ less each other, and the
    number of evaluations. The square is 0 but at the ends, 0 and 1. Jointly they act alike, and the mean over the
    experts of KL(Q_t ‖ P~_α) is the least.

    Args:
        problem: from these logits.
        expert_logits: (S, B, V).
        jointly: whether all experts act, or the one that differs most from the base.
    """
    line, acting = acting_shifts(problem, jointly=jointly)
    experts = at_least_float32(expert_logits).masked_fill(problem.log_probs == -torch.inf, -torch.inf)
    expected = torch.linalg.vecdot(experts.softmax(-1).to(line.dtype), line)
    target = (expected * acting).sum(0) / acting.sum(0)
    end = _moments_on(problem, line, torch.ones_like(target))
    alpha, first, num_evals = _find_root(problem, line, target, end)
    return alpha * acting, acting > 0, (first - target).square(), num_evals + 1


def _moments_on(problem: FusionProblem, line: Tensor, alpha: Tensor) -> Moments:
    return Moments(*(value.squeeze(0) for value in moments_at(problem.log_probs, line, alpha.unsqueeze(0))))


def _find_root(problem: FusionProblem, line: Tensor, target: Tensor, end: Moments) -> tuple[Tensor, Tensor, int]:
    """Return the roots (B,) of A′ − `target` in [0, 1], A′ there, and the number of evaluations.

    A′ rises from 0. Where the target is not above that, the root is 0, and 1 where A′ does not reach the target.
    Newton's steps from 1, within the bracket that they leave; half of it where one leaves that. On an accelerator
    `find_turn`, which reads no value.

    Args:
        problem: whose P is tilted.
        line: (B, V) Δ.
        target: (B,).
        end: the moments at 1.
    """
    zeros, ones = torch.zeros_like(target), torch.ones_like(target)
    is_above = target > torch.finfo(target.dtype).eps
    if may_read(line):
        moments = partial(_moments_on, problem, line)
        alpha, first, num_evals = _newton(moments, target, end, is_above & (target < end.first))
    else:
        alpha = find_turn(lambda x: moments_at(problem.log_probs, line, x[1:]).first > target, zeros, ones, width=1.0)
        first, num_evals = _moments_on(problem, line, alpha).first, num_turn_points(1.0) + 1
    is_inside = target < end.first
    alpha, first = torch.where(is_inside, alpha, ones), torch.where(is_inside, first, end.first)
    return torch.where(is_above, alpha, zeros), torch.where(is_above, first, zeros), num_evals


def _newton(
    moments: Callable[[Tensor], Moments], target: Tensor, end: Moments, inside: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Return the roots (B,) of A′ − `target` between 0 and 1, where there is one, A′ there, and the evaluations."""
    alpha, found, num_evals = torch.ones_like(target), end, 0
    low, high = torch.zeros_like(alpha), alpha
    for _ in range(_MAX_STEPS):
        above = found.first > target
        low, high = torch.where(above, low, alpha), torch.where(above, alpha, high)
        new = alpha - (found.first - target) / found.second.clamp(min=torch.finfo(target.dtype).tiny)
        new = torch.where((new >= low) & (new <= high), new, (low + high) / 2)
        moves = inside & ((new - alpha).abs() > _TOLERANCE)  # each row stops where it would alone
        if not bool(moves.any()):
            break
        alpha, num_evals = torch.where(moves, new, alpha), num_evals + 1
        found = moments(alpha)
    return alpha, found.first, num_evals


def divergences_at(problem: FusionProblem, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(P~ ‖ P) and KL(P ‖ P~) (B,) at weights (S, B), in nats."""
    point = evaluate_jointly(problem, alpha)[0]
    return point.kl_forward, point.kl_reverse
