"""Distillation losses on logits: those of dual-head knowledge distillation and the ones that it is compared with.

The teacher's logits z_T pull on the student's z_S class by class (BinaryKL), or through their difference alone,

    KL(½ ‖ σ(x)) = log cosh(x / 2),      x = (z_S − z_T) / τ,

which needs no clamping. Every loss sums over classes, so that its gradient does not shrink with their number, and is
zero where student and teacher agree. Those on probabilities of classes are in `kd_losses`.

Letters: B rows (images, sequences or tokens), C classes, τ temperature.

References:
    [0]: Dual-Head Knowledge Distillation, 2024, arXiv 2411.08937.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_logits.functional.kd_losses import (
    dkd_loss,
    kd_kl_divergence,
    mlkd_loss,
    prepare_logits,
    reduce_rows,
    standardize_logits,
)
from lit_logits.functional.reductions import Reduction

__all__ = [
    "ClassReduction",
    "LogitLoss",
    "binary_kl",
    "binary_kl_norm",
    "cosine_logit_loss",
    "l1_logit_loss",
    "logit_loss",
    "mse_logit_loss",
]

LogitLoss = Literal["kl", "binary_kl", "binary_kl_norm", "mse", "l1", "cosine", "dkd", "mlkd"]
ClassReduction = Literal["sum", "mean"]


def binary_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    class_reduction: ClassReduction = "sum",
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute BinaryKL [0], τ² Σ_k KL(σ(z_T/τ) ‖ σ(z_S/τ)), in which every class is a yes-or-no question of its own.

    On one head it conflicts with cross-entropy: it fixes the constant in the logits that cross-entropy leaves free. The
    paper reports the collapse that follows.

    Args:
        student_logits: (..., C).
        teacher_logits: (..., C); no gradient is stopped here.
        temperature: τ > 0.
        class_reduction: `sum` over classes, as in the paper, which grows with their number; or their `mean`.
        reduction: over rows.

    Returns:
        Nats, at least float32; a scalar, or (...) for `none`.

    Example:
        >>> binary_kl(torch.zeros(1, 1), torch.tensor([[2.0]]), temperature=1.0)  # log 2 − entropy of σ(2)
        tensor(0.3278)
    """
    student, teacher = prepare_logits(student_logits, teacher_logits, temperature)
    a, b = teacher / temperature, student / temperature
    # Differences of log σ stay finite for any logits, where logarithms of σ would be −inf.
    yes = torch.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(b))
    no = torch.sigmoid(-a) * (F.logsigmoid(-a) - F.logsigmoid(-b))  # 1 − σ(a) would lose its digits
    return reduce_rows(temperature**2 * _over_classes(yes + no, class_reduction), reduction)


def binary_kl_norm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    class_reduction: ClassReduction = "sum",
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute BinaryKL-Norm [0], τ² Σ_k KL(½ ‖ σ((z_S − z_T)/τ)), in closed form.

    It is τ² Σ_k log cosh x, x = (z_S − z_T)/(2τ), whose gradient (τ/2) tanh x is bounded by τ/2 a class: quadratic
    where the logits are close and linear where they are far apart, whatever their size. Arguments and result as in
    `binary_kl`.

    Example:
        >>> binary_kl_norm(torch.tensor([[100.0, 0.0]]), torch.zeros(1, 2), temperature=1.0)  # 50 − log 2
        tensor(49.3069)
    """
    student, teacher = prepare_logits(student_logits, teacher_logits, temperature)
    half = (student / 2 - teacher / 2) / temperature  # the difference of huge logits could overflow
    return reduce_rows(
        _Saturate.apply(temperature**2 * _over_classes(_LogCosh.apply(half), class_reduction)), reduction
    )


def mse_logit_loss(student_logits: Tensor, teacher_logits: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Compute the squared error of the logits, Σ_k (z_S − z_T)².

    Example:
        >>> mse_logit_loss(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
        tensor(5.)
    """
    student, teacher = prepare_logits(student_logits, teacher_logits)
    return reduce_rows((student - teacher).square().sum(-1), reduction)


def l1_logit_loss(student_logits: Tensor, teacher_logits: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Compute the absolute error of the logits, Σ_k |z_S − z_T|.

    Example:
        >>> l1_logit_loss(torch.tensor([[1.0, -2.0]]), torch.zeros(1, 2))
        tensor(3.)
    """
    student, teacher = prepare_logits(student_logits, teacher_logits)
    return reduce_rows((student - teacher).abs().sum(-1), reduction)


def cosine_logit_loss(student_logits: Tensor, teacher_logits: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Compute one minus the cosine of the angle between the logits, in [0, 2]; blind to their length.

    Example:
        >>> cosine_logit_loss(torch.tensor([[0.0, 3.0]]), torch.tensor([[2.0, 0.0]]))
        tensor(1.)
    """
    student, teacher = prepare_logits(student_logits, teacher_logits)
    return reduce_rows(1 - F.cosine_similarity(student, teacher, dim=-1), reduction)


def logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: LogitLoss,
    temperature: float,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
    standardize: bool = False,
    class_reduction: ClassReduction = "sum",
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the loss that `kind` names.

    Args:
        student_logits: (..., C).
        teacher_logits: (..., C); no gradient is stopped here.
        kind: `kl`: `kd_kl_divergence`; `dkd`: `dkd_loss`; `mlkd`: `mlkd_loss` at ½, ¾, 1, 1¼ and 1½ of the temperature,
            which are 2 to 6 for 4; the others are losses of their names.
        temperature: τ > 0, which `mse`, `l1` and `cosine` do not use.
        labels: (...) of `dkd`, which needs them.
        alpha: α of `dkd`.
        beta: β of `dkd`.
        standardize: take the z-scores of both logits, see `standardize_logits`.
        class_reduction: of `binary_kl` and `binary_kl_norm`.
        reduction: over rows; `mlkd`, which compares the rows with each other, has the mean alone.

    Raises:
        ValueError: If `kind` is unknown, `temperature` is not positive, the shapes of the logits differ, or an argument
            does not go with `kind`.

    Example:
        >>> logit_loss(torch.tensor([[1.0]]), torch.zeros(1, 1), kind="mse", temperature=2.0)
        tensor(1.)
    """
    if standardize:
        student_logits, teacher_logits = standardize_logits(student_logits), standardize_logits(teacher_logits)
    if kind == "dkd":
        if labels is None:
            raise ValueError("Expected `labels` for kind='dkd', which tells the target from the others, but got None.")
        options: dict[str, float] = {"alpha": alpha, "beta": beta, "temperature": temperature}
        return dkd_loss(student_logits, teacher_logits, labels, **options, reduction=reduction)
    if kind == "mlkd":
        if reduction != "mean":
            raise ValueError(f"Expected `reduction` to be 'mean' for kind='mlkd', but got {reduction!r}.")
        temperatures = [temperature * factor for factor in (0.5, 0.75, 1.0, 1.25, 1.5)]
        return mlkd_loss(student_logits, teacher_logits, temperatures=temperatures)
    functions: dict[str, Callable[..., Tensor]] = {
        "kl": partial(kd_kl_divergence, temperature=temperature),
        "binary_kl": partial(binary_kl, temperature=temperature, class_reduction=class_reduction),
        "binary_kl_norm": partial(binary_kl_norm, temperature=temperature, class_reduction=class_reduction),
        "mse": mse_logit_loss,
        "l1": l1_logit_loss,
        "cosine": cosine_logit_loss,
    }
    if kind not in functions:
        raise ValueError(f"Expected `kind` to be one of {sorted([*functions, 'dkd', 'mlkd'])}, but got {kind!r}.")
    return functions[kind](student_logits, teacher_logits, reduction=reduction)


def _over_classes(values: Tensor, class_reduction: ClassReduction) -> Tensor:
    if class_reduction not in ("sum", "mean"):
        raise ValueError(f"Expected `class_reduction` to be 'sum' or 'mean', but got {class_reduction!r}.")
    return values.sum(-1) if class_reduction == "sum" else values.mean(-1)


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
