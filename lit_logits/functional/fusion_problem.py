"""What all searches for fusion weights start from; see `lit_logits.functional.dynamic_fusion` for the formulas.

Letters: B sequences, V vocabulary, S experts.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.checks import may_read

__all__ = [
    "FusionProblem",
    "acting_rows",
    "check_alpha",
    "check_bounds",
    "check_fusion_shapes",
    "expert_divergences",
    "is_broken",
    "one_hot_rows",
    "pose_fusion",
    "promoted",
    "scale_weights",
]

_FAR = 100.0  # nats


class FusionProblem(NamedTuple):
    """Large model, and what experts say, over the tokens that all models can emit.

    Attributes:
        log_probs: (B, V) log P of the large model; −inf off the common support.
        shifts: (S, B, V) Δ, centred so that E_P[Δ] = 0; 0 off the common support.
        forward: (S, B) a, KL(Q_t ‖ Q) in nats.
        reverse: (S, B) b, KL(Q ‖ Q_t) in nats.
    """

    log_probs: Tensor
    shifts: Tensor
    forward: Tensor
    reverse: Tensor


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
    base, experts = promoted(base_logits, expert_logits)
    log_q, log_p = base.log_softmax(-1), experts.log_softmax(-1)
    difference = log_p - log_q
    # Where a token is ruled out. Masks cost passes over V, and so they are left out where asking is free.
    if not may_read(difference) or not bool(difference.isfinite().all()):
        support = (base > -torch.inf) & (experts > -torch.inf)
        log_q, log_p = (logits.masked_fill(~support, -torch.inf).log_softmax(-1) for logits in (base, experts))
        difference = (log_p - log_q).masked_fill(~support, 0.0)
    with torch.autocast(base.device.type, enabled=False):  # which would sum in half precision
        # Rounding may leave a divergence of equals a little below 0.
        forward = torch.linalg.vecdot(log_p.exp(), difference).clamp(min=0)
        return forward, -torch.linalg.vecdot(log_q.exp(), difference).clamp(max=0)


def promoted(*all_logits: Tensor) -> list[Tensor]:
    """Return the logits in one dtype, at least float32."""
    dtype = reduce(torch.promote_types, (logits.dtype for logits in all_logits), torch.float32)
    return [logits.to(dtype) for logits in all_logits]


def check_alpha(alpha: Tensor, experts: Tensor) -> None:
    """Raise unless the weights are (S, B), one for each expert and sequence.

    Raises:
        ValueError: If shapes do not fit.
    """
    if alpha.shape != experts.shape[:2]:
        raise ValueError(f"Expected `alpha` of shape {tuple(experts.shape[:2])}, but got {tuple(alpha.shape)}.")


def check_fusion_shapes(large: Tensor, base: Tensor, experts: Tensor) -> None:
    """Raise ValueError unless logits are (B, V), (B, V) and (S, B, V)."""
    fits = large.ndim == 2 and base.shape == large.shape and experts.ndim == 3 and experts.shape[1:] == large.shape
    if not fits or len(experts) == 0:
        raise ValueError(
            "Expected `large_logits` and `base_logits` of one shape (B, V) and `expert_logits` of shape (S, B, V) with"
            f" S at least 1, but got {tuple(large.shape)}, {tuple(base.shape)} and {tuple(experts.shape)}."
        )


def check_bounds(bounds: tuple[float, float], step: float) -> tuple[float, float]:
    """Return smallest and largest α; raise ValueError where they cross or a step is not positive."""
    low, high = bounds
    if not 0 <= low <= high < torch.inf:
        raise ValueError(
            f"Expected `bounds` to be (smallest, largest) with 0 ≤ smallest ≤ largest < ∞, but got {bounds}."
        )
    if not step > 0:
        raise ValueError(f"Expected `step` to be positive, but got {step}.")
    return float(low), float(high)


def scale_weights(alpha: Tensor, scale: float, bounds: tuple[float, float], acting: Tensor | None = None) -> Tensor:
    """Return weights times a factor, cut to the bounds; experts that do not act have 0.

    Args:
        alpha: (S, B).
        scale: the factor.
        bounds: smallest and largest α.
        acting: (S, B) which experts act; default those whose weight is not 0.

    Example:
        >>> scale_weights(torch.tensor([0.0, 0.5, 1.5]), 2.0, (0.1, 2.0))
        tensor([0., 1., 2.])
    """
    return torch.where(alpha > 0 if acting is None else acting, (scale * alpha).clamp(*bounds), 0.0)


def acting_rows(values: Tensor, acting: Tensor) -> Tensor:
    """Return the values (B, V) of the expert of each sequence, from those of all (S, B, V) and its number (B,).

    Example:
        >>> acting_rows(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([1, 0])).tolist()
        [[3.0], [2.0]]
    """
    return values[acting, torch.arange(len(acting), device=acting.device)]


def one_hot_rows(chosen: Tensor, num_experts: int) -> Tensor:
    """Return which of S experts is the one chosen, as booleans (S, B); torch's `one_hot` may read the numbers.

    Example:
        >>> one_hot_rows(torch.tensor([1, 0]), 2)
        tensor([[False,  True],
                [ True, False]])
    """
    return torch.arange(num_experts, device=chosen.device).unsqueeze(1) == chosen


def pose_fusion(large_logits: Tensor, base_logits: Tensor, expert_logits: Tensor) -> FusionProblem:
    """Check the logits, cut them to the tokens that all models can emit, and centre Δ.

    On an accelerator nothing is checked: the divergences of a sequence whose logits are not valid are NaN, see
    `is_broken`.
    """
    check_fusion_shapes(large_logits, base_logits, expert_logits)
    large, base, experts = promoted(large_logits, base_logits, expert_logits)
    readable = may_read(large)
    all_finite, far = _check_values(large, base, experts) if readable else (False, True)
    if far:
        # Subtracted first, as the difference of two large numbers would keep few digits of Δ.
        base, experts = base - base.amax(-1, keepdim=True), experts - experts.amax(-1, keepdim=True)
    broken = None
    if all_finite:
        shifts = experts - base
    else:
        support = (large > -torch.inf) & (base > -torch.inf) & (experts > -torch.inf).all(0)
        if readable:
            _check_support(support)
        else:
            broken = _broken(large, base, experts) | ~support.any(-1)
            # Numbers of one sequence alone; any will do, as its results are NaN in the end.
            support = support | broken.unsqueeze(-1)
            large, base, experts = (logits.masked_fill(broken.unsqueeze(-1), 0.0) for logits in (large, base, experts))
        shifts = (experts - base).masked_fill(~support, 0.0)
        large, base, experts = (logits.masked_fill(~support, -torch.inf) for logits in (large, base, experts))
    log_probs = large.log_softmax(-1)
    # A constant in Δ cancels in the softmax, so it is chosen such that E_P[Δ] = 0: then g is A itself, and f and g are
    # not small differences of large numbers, for which float32 would leave few digits.
    shifts.sub_(torch.linalg.vecdot(log_probs.exp(), shifts).unsqueeze(-1))
    if not all_finite:
        shifts = shifts.masked_fill(~support, 0.0)
    divergences = expert_divergences(base, experts)
    if broken is not None:
        divergences = divergences[0].masked_fill(broken, torch.nan), divergences[1].masked_fill(broken, torch.nan)
    return FusionProblem(log_probs, shifts, *divergences)


def is_broken(problem: FusionProblem) -> Tensor:
    """Return which sequences (B,) have no valid logits; see `pose_fusion`."""
    return problem.forward.isnan().any(0)


def _check_values(large: Tensor, base: Tensor, experts: Tensor) -> tuple[bool, bool]:
    """Raise for NaN and +inf; return whether all logits are finite, and whether some are far from 0."""
    all_finite, far = True, False
    for name, logits in (("large_logits", large), ("base_logits", base), ("expert_logits", experts)):
        lowest, highest = logits.aminmax()
        if not bool(highest < torch.inf):  # NaN is not below either
            raise ValueError(f"Expected `{name}` to be finite or −inf, but got NaN or +inf.")
        all_finite &= bool(lowest > -torch.inf)
        far |= bool(highest.abs() > _FAR)
    return all_finite, far


def _check_support(support: Tensor) -> None:
    """Raise unless each sequence has a token that all models can emit."""
    if not bool(support.any(-1).all()):
        row = int((~support.any(-1)).nonzero()[0])
        raise ValueError(f"Expected a token that all models can emit, but sequence {row} of the batch has none.")


def _broken(large: Tensor, base: Tensor, experts: Tensor) -> Tensor:
    """Return which sequences (B,) have NaN or +inf among their logits."""
    highest = torch.stack([large.amax(-1), base.amax(-1), *experts.amax(-1)])
    return ~(highest < torch.inf).all(0)
