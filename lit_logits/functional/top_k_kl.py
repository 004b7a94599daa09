"""Divergences of a student from a teacher of whom only the likeliest tokens are known: those, and a tail of the rest.

With the k tokens i that the teacher kept, its probabilities p_i, the student's q_i, and the masses p_+ and q_+ that
both leave to all other tokens,

    forward KL(p ‖ q) = Σ_i p_i log(p_i / q_i) + p_+ log(p_+ / q_+),        reverse KL(q ‖ p),
    JSD_β(p ‖ q) = β KL(p ‖ m) + (1 − β) KL(q ‖ m),        m = β p + (1 − β) q.

By the data processing inequality each is at most that over the whole vocabulary, and equal to it if k is V.

Letters: N positions, V vocabulary of the student, k `top_k`, τ temperature.

References:
    [0]: On-policy distillation of language models (generalised Jensen–Shannon), 2023, arXiv 2306.13649.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_logits.functional.reductions import Reduction, at_least_float32, reduce_tokens

__all__ = ["KLKind", "check_kl_kind", "top_k_kl"]

KLKind = Literal["forward", "reverse", "jsd"]


class _Masses(NamedTuple):
    """Probabilities of k tokens and of the tail, and finite logarithms of them: (..., k + 1)."""

    probs: Tensor
    log_probs: Tensor


def top_k_kl(
    student_logits: Tensor,
    top_k_ids: Tensor,
    top_k_log_probs: Tensor,
    mask: Tensor | None = None,
    *,
    tail: Tensor | None = None,
    kind: KLKind = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute τ² D(teacher, student) over the tokens that the teacher kept and one bucket for the tail.

    It is 0 where both agree on these tokens. A token that the student rules out (a logit of −inf or of the least float)
    gets no gradient; the loss is then huge and finite if the teacher wants that token.

    Args:
        student_logits: (..., V) in nats, before τ.
        top_k_ids: (..., k) ids in the student's vocabulary, different at each position; −1 for an entry that is not
            there, whose probability belongs to the tail.
        top_k_log_probs: (..., k) of the teacher at τ, in nats. No gradient reaches them.
        mask: (...) positions that count; None is all.
        tail: (...) probability of the teacher's other tokens; None is what the given ones leave, which is as exact as
            they are.
        kind: `forward`, `reverse` or `jsd`, the generalised Jensen–Shannon divergence [0].
        beta: β in (0, 1), of `jsd`. JSD_β / β tends to forward KL as β → 0, JSD_β / (1 − β) to reverse KL as β → 1.
        temperature: τ > 0; the factor τ² keeps gradients of one size over τ.
        reduction: over positions.

    Returns:
        Nats, at least float32; a scalar, or (...) for `none`.

    Raises:
        ValueError: If `kind` is unknown, or β or τ is out of range.

    Example:
        >>> ids, probs = torch.tensor([[2]]), torch.tensor([[0.5]])
        >>> top_k_kl(torch.zeros(1, 4), ids, probs.log())  # ½ log(½ / ¼) + ½ log(½ / ¾)
        tensor(0.1438)
        >>> top_k_kl(torch.zeros(1, 4), ids, probs.log(), kind="reverse")  # ¼ log(¼ / ½) + ¾ log(¾ / ½)
        tensor(0.1308)
    """
    check_kl_kind(kind, beta)
    if not temperature > 0:
        raise ValueError(f"Expected `temperature` to be positive, but got {temperature}.")
    is_there = top_k_ids >= 0
    has_tail = is_there.sum(-1) < student_logits.shape[-1]
    student = _student_masses(at_least_float32(student_logits) / temperature, top_k_ids, is_there, has_tail)
    log_probs = at_least_float32(top_k_log_probs.detach()).masked_fill(~is_there, -torch.inf)
    teacher = _teacher_masses(log_probs, tail if tail is None else tail.detach(), has_tail)
    if kind == "forward":
        loss = _kl(teacher, student)
    elif kind == "reverse":
        loss = _kl(student, teacher)
    else:
        log_mean = torch.logaddexp(teacher.log_probs + math.log(beta), student.log_probs + math.log1p(-beta))
        mean = _Masses(log_mean.exp(), log_mean)
        loss = beta * _kl(teacher, mean) + (1 - beta) * _kl(student, mean)
    # With nothing but the tail both masses are 1; the student's is then that of all but one token, see below.
    loss = temperature**2 * loss.masked_fill(~is_there.any(-1), 0.0)
    return reduce_tokens(loss, torch.ones_like(loss, dtype=torch.bool) if mask is None else mask, reduction)


def check_kl_kind(kind: str, beta: float) -> None:
    """Raise unless `kind` and β are those of `top_k_kl`.

    Raises:
        ValueError: If they are not.
    """
    if kind not in get_args(KLKind):
        raise ValueError(f"Expected `kind` to be one of {list(get_args(KLKind))}, but got {kind!r}.")
    if not 0 < beta < 1:
        raise ValueError(f"Expected `beta` to be in (0, 1), but got {beta}. Its limits are 'forward' and 'reverse'.")


def _kl(of: _Masses, to: _Masses) -> Tensor:
    return (of.probs * (of.log_probs - to.log_probs)).sum(-1)


def _student_masses(logits: Tensor, token_ids: Tensor, is_there: Tensor, has_tail: Tensor) -> _Masses:
    """Return q; the tail is a sum over all other logits, as 1 − Σ q_i would lose the digits of a small one."""
    lowest = torch.finfo(logits.dtype).min / 4  # finite, and so are differences: 0 · inf would make gradients NaN
    logits = logits.clamp(min=lowest)
    total = logits.logsumexp(-1, keepdim=True)
    # An entry that is not there stands for the first one that is; so the tail leaves out only what is there.
    first = token_ids.gather(-1, is_there.int().argmax(-1, keepdim=True)).clamp(min=0)
    token_ids = torch.where(is_there, token_ids, first)
    kept = logits.gather(-1, token_ids) - total
    rest = logits.scatter(-1, token_ids, lowest).logsumexp(-1, keepdim=True) - total
    exists = torch.cat([is_there, has_tail.unsqueeze(-1)], -1)
    log_probs = torch.cat([kept, rest], -1).masked_fill(~exists, lowest).clamp(min=lowest)
    return _Masses(log_probs.exp(), log_probs)


def _teacher_masses(log_probs: Tensor, tail: Tensor | None, has_tail: Tensor) -> _Masses:
    """Return p. A tail below the rounding of a sum counts as 0, and its logarithm as that of the rounding."""
    probs, finfo = log_probs.exp(), torch.finfo(log_probs.dtype)
    rest = 1 - probs.sum(-1) if tail is None else tail.to(probs.dtype)
    rest = rest.masked_fill(~has_tail, 0.0).clamp(0.0, 1.0)
    log_rest = rest.clamp(min=finfo.eps).log().masked_fill(~has_tail, finfo.min / 4)
    all_log_probs = torch.cat([log_probs.clamp(min=finfo.min / 4), log_rest.unsqueeze(-1)], -1)
    return _Masses(torch.cat([probs, rest.unsqueeze(-1)], -1), all_log_probs)
