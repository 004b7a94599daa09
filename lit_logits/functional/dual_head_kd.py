"""Distillation losses on logits: those of dual-head knowledge distillation and the ones that it is compared with.

The teacher's logits z_T pull on the student's z_S class by class (BinaryKL), or through their difference alone,

    KL(½ ‖ σ(x)) = log cosh(x / 2),      x = (z_S − z_T) / τ,

which needs no clamping. Every loss sums over classes, so that its gradient does not shrink with their number, and is
zero where student and teacher agree.

Letters: B rows (images, sequences or tokens), C classes, τ temperature.

References:
    [0]: Dual-Head Knowledge Distillation, 2024, arXiv 2411.08937.
    [1]: Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531, Sec. 2.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_logits.functional.reductions import Reduction, at_least_float32, reduce_tokens

__all__ = [
    "LogitLoss",
    "binary_kl",
    "binary_kl_norm",
    "cosine_logit_loss",
    "kd_kl_divergence",
    "l1_logit_loss",
    "logit_loss",
    "mse_logit_loss",
]

LogitLoss = Literal["kl", "binary_kl", "binary_kl_norm", "mse", "l1", "cosine"]


def kd_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, reduction: Reduction = "mean"
) -> Tensor:
    """Compute the loss of knowledge distillation [1], τ² KL(softmax(z_T/τ) ‖ softmax(z_S/τ)).

    Args:
        student_logits: (..., C).
        teacher_logits: (..., C); no gradient is stopped here.
        temperature: τ > 0; the factor τ² keeps gradients of one size over τ.
        reduction: over rows.

    Returns:
        Nats, at least float32; a scalar, or (...) for `none`.

    Example:
        >>> kd_kl_divergence(torch.zeros(1, 2), torch.tensor([[0.0, 4.0]]), temperature=4.0)
        tensor(1.7751)
    """
    student, teacher = _prepare(student_logits, teacher_logits, temperature)
    log_p, log_q = F.log_softmax(teacher / temperature, dim=-1), F.log_softmax(student / temperature, dim=-1)
    return _reduce(temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1), reduction)


def binary_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, reduction: Reduction = "mean"
) -> Tensor:
    """Compute BinaryKL [0], τ² Σ_k KL(σ(z_T/τ) ‖ σ(z_S/τ)), in which every class is a yes-or-no question of its own.

    On one head it conflicts with cross-entropy: it fixes the constant in the logits that cross-entropy leaves free. The
    paper reports the collapse that follows. Arguments and result as in `kd_kl_divergence`.

    Example:
        >>> binary_kl(torch.zeros(1, 1), torch.tensor([[2.0]]), temperature=1.0)  # log 2 − entropy of σ(2)
        tensor(0.3278)
    """
    student, teacher = _prepare(student_logits, teacher_logits, temperature)
    a, b = teacher / temperature, student / temperature
    # Differences of log σ stay finite for any logits, where logarithms of σ would be −inf.
    yes = torch.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(b))
    no = torch.sigmoid(-a) * (F.logsigmoid(-a) - F.logsigmoid(-b))  # 1 − σ(a) would lose its digits
    return _reduce(temperature**2 * (yes + no).sum(-1), reduction)


def binary_kl_norm(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, reduction: Reduction = "mean"
) -> Tensor:
    """Compute BinaryKL-Norm [0], τ² Σ_k KL(½ ‖ σ((z_S − z_T)/τ)), in closed form.

    It is τ² Σ_k log cosh x, x = (z_S − z_T)/(2τ), whose gradient (τ/2) tanh x is bounded by τ/2 a class: quadratic
    where the logits are close and linear where they are far apart, whatever their size. Arguments and result as in
    `kd_kl_divergence`.

    Example:
        >>> binary_kl_norm(torch.tensor([[100.0, 0.0]]), torch.zeros(1, 2), temperature=1.0)  # 50 − log 2
        tensor(49.3069)
    """
    student, teacher = _prepare(student_logits, teacher_logits, temperature)
    half = (student / 2 - teacher / 2) / temperature  # the difference of huge logits could overflow
    return _reduce(_Saturate.apply(temperature**2 * _LogCosh.apply(half).sum(-1)), reduction)


def mse_logit_loss(student_logits: Tensor, teacher_logits: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Compute the squared error of the logits, Σ_k (z_S − z_T)².

    Example:
        >>> mse_logit_loss(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
        tensor(5.)
    """
    student, teacher = _prepare(student_logits, teacher_logits)
    return _reduce((student - teacher).square().sum(-1), reduction)


def l1_logit_loss(student_logits: Tensor, teacher_logits: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Compute the absolute error of the logits, Σ_k |z_S − z_T|.

    Example:
        >>> l1_logit_loss(torch.tensor([[1.0, -2.0]]), torch.zeros(1, 2))
        tensor(3.)
    """
    student, teacher = _prepare(student_logits, teacher_logits)
    return _reduce((student - teacher).abs().sum(-1), reduction)


def cosine_logit_loss(student_logits: Tensor, teacher_logits: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Compute one minus the cosine of the angle between the logits, in [0, 2]; blind to their length.

    Example:
        >>> cosine_logit_loss(torch.tensor([[0.0, 3.0]]), torch.tensor([[2.0, 0.0]]))
        tensor(1.)
    """
    student, teacher = _prepare(student_logits, teacher_logits)
    return _reduce(1 - F.cosine_similarity(student, teacher, dim=-1), reduction)


def logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: LogitLoss,
    temperature: float,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the loss that `kind` names; `temperature` matters to `kl`, `binary_kl` and `binary_kl_norm` only.

    Raises:
        ValueError: If `kind` is unknown, `temperature` is not positive, or the shapes of the logits differ.

    Example:
        >>> logit_loss(torch.tensor([[1.0]]), torch.zeros(1, 1), kind="mse", temperature=2.0)
        tensor(1.)
    """
    functions: dict[str, Callable[..., Tensor]] = {
        "kl": partial(kd_kl_divergence, temperature=temperature),
        "binary_kl": partial(binary_kl, temperature=temperature),
        "binary_kl_norm": partial(binary_kl_norm, temperature=temperature),
        "mse": mse_logit_loss,
        "l1": l1_logit_loss,
        "cosine": cosine_logit_loss,
    }
    if kind not in functions:
        raise ValueError(f"Expected `kind` to be one of {sorted(functions)}, but got {kind!r}.")
    return functions[kind](student_logits, teacher_logits, reduction=reduction)


def _prepare(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Check shapes and temperature, and return both logits in at least float32."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Expected `student_logits` and `teacher_logits` of one shape, but got {tuple(student_logits.shape)} and"
            f" {tuple(teacher_logits.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"Expected `temperature` to be positive, but got {temperature}.")
    student_logits = at_least_float32(student_logits)
    return student_logits, teacher_logits.to(student_logits.dtype)


class _LogCosh(torch.autograd.Function):
    """Log cosh x without overflow or cancellation, and its derivative tanh x; only x is kept for backward.

    Two identities: log cosh x = |x| + log(1 + e^(−2|x|)) − log 2, and cosh x = 1 + 2 sinh²(x/2) near 0.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        size = x.abs()
        far = size + F.softplus(-2 * size) - math.log(2)
        # Near 0 the loss is x²/2, which `far` leaves over from terms of size 1. The clamp keeps sinh finite elsewhere.
        near = torch.log1p(2 * torch.sinh(size.clamp(max=1) / 2).square())
        return torch.where(size < 1, near, far)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * torch.tanh(x)


class _Saturate(torch.autograd.Function):
    """Clamp rows so that their sum stays finite; pass gradients through.

    The gradient of the loss is bounded, and right also where its value overflows; that of `torch.clamp` would be 0.
    """

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        # The largest float divided by the number of rows: even if all rows are clamped, `sum` and `mean` are finite.
        return rows.clamp(max=torch.finfo(rows.dtype).max / max(1, rows.numel()))

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return grad


def _reduce(rows: Tensor, reduction: Reduction) -> Tensor:
    return reduce_tokens(rows, torch.ones_like(rows, dtype=torch.bool), reduction)
