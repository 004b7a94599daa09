"""One weight of each expert for a whole prompt: the one under which the prompt's own tokens are likeliest.

With A_r(α) = log Σ_v P_rv e^{α·Δ_rv} at each row r of the prompt, which is followed by y_r, the negative log-likelihood
Σ_r A_r(α) − α·Δ_r(y_r) is convex in all weights together, so that Newton steps find its minimum.

Letters: B prompts, R rows (positions), V vocabulary, S experts.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.checks import check_not_negative, may_read
from lit_logits.functional.fusion_problem import (
    FusionProblem,
    check_bounds,
    is_broken,
    one_hot_rows,
    pose_fusion,
    scale_weights,
)
from lit_logits.functional.reductions import at_least_float32

__all__ = ["prompt_fusion_weights"]

_TOLERANCE = 1e-4  # of α
_MAX_STEPS = 50
_NUM_STEPS = 24  # on an accelerator, where no one looks whether fewer are enough; 15 were, of 1,200 random searches


@torch.no_grad()
def prompt_fusion_weights(
    large_logits: Tensor,
    base_logits: Tensor,
    expert_logits: Tensor,
    labels: Tensor,
    owner: Tensor | None = None,
    *,
    num_prompts: int | None = None,
    mode: Literal["single", "joint"] = "single",
    bounds: tuple[float, float] = (0.0, 2.0),
    scale: float = 1.0,
) -> Tensor:
    """Find one α for each prompt, under which its own tokens are likeliest; no other labels are needed.

    The negative log-likelihood of a prompt is convex in all weights together, so the minimum is found, not a point of a
    grid. It was proposed over a grid of static weights [1].

    Args:
        large_logits: (R, V) of the large model, before each token of the prompts.
        base_logits: (R, V) of the small base.
        expert_logits: (S, R, V) of the experts.
        labels: (R,) the tokens that came. One that a model rules out has no weight in the search.
        owner: (R,) the prompt of each row, from 0; default: all rows are of one prompt.
        num_prompts: B; default: up to the last one that has a row, which makes the host wait for an accelerator.
        mode: `single`: one expert acts, the one that makes the prompt likeliest; `joint`: all may.
        bounds: smallest and largest α, 0 ≤ smallest ≤ largest.
        scale: factor on the α that is found, before it is cut to the bounds.

    Returns:
        (S, B) weights of the prompts. One without rows has nothing to choose by: its weights are 1, with `single` that
        of the first expert. On an accelerator, a prompt with logits that are not valid gets NaN, as in
        `fusion_weights`.

    Raises:
        ValueError: As in `fusion_weights`, or if labels do not fit.

    References:
        [1]: TriMix, 2026, arXiv 2604.18106.

    Example:
        >>> large, expert = torch.zeros(2, 3), torch.tensor([[[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]])
        >>> prompt_fusion_weights(large, large, expert, torch.tensor([0, 1])).round(decimals=2)  # ½ each: e^{2α} = 2
        tensor([[0.3500]])
    """
    low, high = check_bounds(bounds, 1.0)
    if mode not in ("single", "joint"):
        raise ValueError(f"Expected `mode` to be 'single' or 'joint', but got {mode!r}.")
    check_not_negative(scale=scale)
    if owner is None:
        owner, num_prompts = torch.zeros_like(labels), num_prompts or 1
    if labels.shape != large_logits.shape[:1] or owner.shape != labels.shape:
        raise ValueError(
            f"Expected `labels` and `owner` of shape {tuple(large_logits.shape[:1])}, but got {tuple(labels.shape)} and"
            f" {tuple(owner.shape)}."
        )
    if num_prompts is None or may_read(owner):
        named = int(owner.max()) + 1 if len(owner) else 0
        num_prompts = max(named, 1) if num_prompts is None else num_prompts
        if named > num_prompts:
            raise ValueError(f"Expected `owner` below num_prompts={num_prompts}, but got {named - 1}.")
    if len(labels) == 0:
        dtype = at_least_float32(large_logits).dtype
        alpha = torch.ones(len(expert_logits), num_prompts, dtype=dtype, device=labels.device)
        if mode == "single":
            alpha[1:] = 0.0
        return scale_weights(alpha.clamp(low, high) * (alpha > 0), scale, (low, high))
    with torch.autocast(large_logits.device.type, enabled=False):
        problem = pose_fusion(large_logits, base_logits, expert_logits)
        log_probs, shifts, came, prompts = _possible_rows(problem, labels, owner)
        if mode == "joint":
            alpha = _likeliest_weights(log_probs, shifts, came, prompts, num_prompts, (low, high))[0]
        else:
            lines = [
                _likeliest_weights(log_probs, line.unsqueeze(0), came, prompts, num_prompts, (low, high))
                for line in shifts
            ]
            chosen = torch.stack([value for _, value in lines]).argmin(0)
            alpha = torch.cat([line for line, _ in lines]) * one_hot_rows(chosen, len(shifts))
    alpha = scale_weights(alpha, scale, (low, high))
    if not may_read(alpha):
        broken = alpha.new_zeros(num_prompts).index_add_(0, owner, is_broken(problem).to(alpha.dtype)) > 0
        alpha = alpha.masked_fill(broken, torch.nan)
    return alpha


def _possible_rows(problem: FusionProblem, labels: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log P, Δ, labels and owners of the rows whose token is possible; the others are kept on an accelerator.

    How many are possible, the host would have to wait for. There the others get Δ = 0, which adds nothing to
    likelihood, gradient and curvature.
    """
    possible = problem.log_probs.gather(1, labels.unsqueeze(1)).squeeze(1) > -torch.inf
    if may_read(possible):
        return problem.log_probs[possible], problem.shifts[:, possible], labels[possible], owner[possible]
    return problem.log_probs, problem.shifts.masked_fill(~possible.unsqueeze(1), 0.0), labels, owner


class _Likelihood(NamedTuple):
    """The negative log-likelihood of sequences: value (B,), gradient (B, S) and curvature (B, S, S)."""

    value: Tensor
    gradient: Tensor
    curvature: Tensor


def _likeliest_weights(
    log_probs: Tensor, shifts: Tensor, labels: Tensor, owner: Tensor, num_sequences: int, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return the weights (S, B) within bounds under which the tokens of each sequence are likeliest.

    Newton steps on the whole α, projected onto the bounds: a weight at a bound that the gradient pushes outwards is
    held. A step that gains nothing is quartered. As the function is convex, what is found is its minimum. On an
    accelerator the number of steps is fixed.

    Args:
        log_probs: (R, V) of the large model; −inf off the common support.
        shifts: (S, R, V) Δ with E_P[Δ] = 0; 0 off the common support.
        labels: (R,) the tokens that came.
        owner: (R,) the sequence of each row.
        num_sequences: B; one without rows gets weights of 1, within the bounds.
        bounds: smallest and largest α.

    Returns:
        The weights, and the summed negative log-likelihood (B,) in nats beyond that of the large model.
    """
    low, high = bounds

    def evaluate(alpha: Tensor) -> _Likelihood:
        return _likelihood(log_probs, shifts, labels, owner, alpha)

    alpha = shifts.new_ones(num_sequences, len(shifts)).clamp(low, high)
    best, scale = evaluate(alpha), shifts.new_ones(num_sequences)
    readable = may_read(shifts)
    for _ in range(_MAX_STEPS if readable else _NUM_STEPS):
        stuck = ((alpha <= low) & (best.gradient > 0)) | ((alpha >= high) & (best.gradient < 0))
        move = _newton_move(best, stuck)
        new = (alpha + scale.unsqueeze(1) * move).clamp(low, high)
        if readable and bool((new - alpha).abs().amax() <= _TOLERANCE):
            break
        found = evaluate(new)
        wins = found.value <= best.value
        alpha = torch.where(wins.unsqueeze(1), new, alpha)
        best = _Likelihood(
            *(torch.where(wins.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(found, best, strict=True))
        )
        scale = torch.where(wins, 1.0, scale / 4)
    return alpha.T.contiguous(), best.value


def _likelihood(log_probs: Tensor, shifts: Tensor, labels: Tensor, owner: Tensor, alpha: Tensor) -> _Likelihood:
    weights = alpha[owner]  # (R, S)
    tilted = log_probs + torch.einsum("rs,srv->rv", weights, shifts)
    probs = tilted.softmax(-1)
    first = torch.einsum("rv,srv->rs", probs, shifts)
    covariance = torch.einsum("rv,srv,trv->rst", probs, shifts, shifts) - first.unsqueeze(-1) * first.unsqueeze(-2)
    came = shifts[:, torch.arange(len(labels), device=labels.device), labels].T  # (R, S)
    value = tilted.logsumexp(-1) - (weights * came).sum(-1)
    return _Likelihood(
        *(total.new_zeros(len(alpha), *total.shape[1:]).index_add_(0, owner, total)
          for total in (value, first - came, covariance))
    )  # fmt: skip


def _newton_move(at: _Likelihood, stuck: Tensor) -> Tensor:
    """Return the Newton step (B, S) of the weights that are not stuck."""
    free = (~stuck).to(at.gradient.dtype)
    curvature = at.curvature * free.unsqueeze(1) * free.unsqueeze(2)
    # A little of the identity: experts that agree, or that say nothing, have no curvature of their own.
    size = curvature.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-6)
    ridge = torch.eye(curvature.shape[1], dtype=curvature.dtype, device=curvature.device)
    curvature = curvature + (1e-6 * size)[:, None, None] * ridge + torch.diag_embed(stuck.to(curvature.dtype))
    gradient = at.gradient * free
    return -torch.linalg.solve_ex(curvature, gradient.unsqueeze(-1)).result.squeeze(-1).nan_to_num(0.0, 0.0, 0.0)
