"""Weights of experts by other criteria than the paper's distance, on the same line of fused distributions.

With A(α) = log Σ_v P_v e^{αΔ_v} and E_P[Δ] = 0, see `lit_logits.functional.dynamic_fusion`:

* `equal`: KL(P~_α ‖ P) = KL(P~_α ‖ P~_1), as far from the large model as from the fully moved one. Written out,
  α A′ − A = (α − 1) A′ − A + A(1), it is A′(α) = A(1): one root, and it lies in [0, 1];
* `uncertain`: 1 where the entropy of the large model is high enough, 0 elsewhere.

Letters: B sequences, V vocabulary, S experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_logits.functional.fusion_problem import FusionProblem
from lit_logits.functional.fusion_search import evaluate_jointly, line_moments

__all__ = ["acting_shifts", "divergences_at", "entropy", "equal_weights"]

_TOLERANCE = 1e-4  # of α
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
    acting = F.one_hot(chosen, num_experts).T.to(shifts.dtype)
    return shifts[chosen, torch.arange(len(chosen), device=chosen.device)], acting


def equal_weights(problem: FusionProblem, *, jointly: bool) -> tuple[Tensor, Tensor, int]:
    """Return the weights (S, B) of equal divergences, the square of what they differ by, and the number of evaluations.

    Newton's steps on A′(α) − A(1), which rises, within the bracket that they leave; half of it where one leaves that.
    """
    line, acting = acting_shifts(problem, jointly=jointly)
    alpha = torch.full_like(acting[0], 0.5)  # also the limit where the experts say nothing
    target = line_moments(problem.log_probs, line, torch.ones_like(alpha))[0]
    low, high, num_evals = torch.zeros_like(alpha), torch.ones_like(alpha), 1
    for _ in range(_MAX_STEPS):
        _, first, second = line_moments(problem.log_probs, line, alpha)
        num_evals += 1
        above = first > target
        low, high = torch.where(above, low, alpha), torch.where(above, alpha, high)
        new = alpha - (first - target) / second.clamp(min=torch.finfo(second.dtype).tiny)
        new = torch.where((new >= low) & (new <= high), new, (low + high) / 2)
        new = torch.where(target > torch.finfo(target.dtype).eps, new, alpha)
        moved, alpha = (new - alpha).abs().amax(), new
        if bool(moved <= _TOLERANCE):
            break
    return alpha * acting, (line_moments(problem.log_probs, line, alpha)[1] - target).square(), num_evals + 1


def divergences_at(problem: FusionProblem, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(P~ ‖ P) and KL(P ‖ P~) (B,) at weights (S, B), in nats."""
    point = evaluate_jointly(problem, alpha)[0]
    return point.kl_forward, point.kl_reverse
