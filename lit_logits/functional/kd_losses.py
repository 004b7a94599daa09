"""Distillation losses on the probabilities of classes, and the cross-entropy beside them.

The student's logits z_S and the teacher's z_T become p = softmax(z/τ). Every distillation loss is zero where student
and teacher agree, and carries the factor τ² that keeps its gradients of one size over τ, unless it says otherwise.

Letters: B rows (images, sequences or tokens), C classes, τ temperature, y the label of a row.

References:
    [0]: Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531, Sec. 2.
    [1]: Logit Standardization in Knowledge Distillation, 2024, arXiv 2403.01427, Algorithm 1.
    [2]: Decoupled Knowledge Distillation, 2022, arXiv 2203.08679, Eq. 7.
    [3]: Multi-level Logit Distillation, CVPR 2023, Sec. 3.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.functional.reductions import Reduction, at_least_float32, reduce_tokens

__all__ = [
    "batch_level_loss",
    "class_level_loss",
    "dkd_loss",
    "kd_kl_divergence",
    "label_loss",
    "mlkd_loss",
    "multi_label_loss",
    "prepare_logits",
    "reduce_rows",
    "standardize_logits",
]


def kd_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, reduction: Reduction = "mean"
) -> Tensor:
    """Compute the loss of knowledge distillation [0], τ² KL(softmax(z_T/τ) ‖ softmax(z_S/τ)).

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
    student, teacher = prepare_logits(student_logits, teacher_logits, temperature)
    log_p, log_q = F.log_softmax(teacher / temperature, dim=-1), F.log_softmax(student / temperature, dim=-1)
    return reduce_rows(temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1), reduction)


def standardize_logits(logits: Tensor) -> Tensor:
    """Return z-scores of logits over the classes [1], (z − mean z) / std z, which any loss may take in their place.

    The student then matches the relations of the teacher's logits, and is free in their size. The paper divides the
    scores by its base temperature (2), the `temperature` of the loss, and weighs the loss by 9.

    Args:
        logits: (..., C). The standard deviation divides by C; code that is in use for the paper divides by C − 1. A row
            of equal logits becomes zeros; 1e-7 is added to the variance for it.

    Returns:
        The shape of `logits`, at least float32.

    Example:
        >>> standardize_logits(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.2247,  0.0000,  1.2247]])
    """
    return F.layer_norm(at_least_float32(logits), logits.shape[-1:], eps=1e-7)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute decoupled knowledge distillation [2], τ² (α TCKD + β NCKD).

    TCKD = KL((p_y, 1 − p_y) of the teacher ‖ that of the student): how sure the target is.
    NCKD = KL of the other classes' probabilities, which are made to sum to 1 again: how the rest is spread.
    KL(p_T ‖ p_S) is TCKD + (1 − p_y of the teacher) NCKD, so a sure teacher's NCKD counts little there.

    Args:
        student_logits: (..., C), C ≥ 2.
        teacher_logits: (..., C).
        labels: (...) integers y in [0, C), or −100 for rows that are left out, because they have no target.
        alpha: α.
        beta: β.
        temperature: τ > 0.
        reduction: over the rows that have a label.

    Raises:
        ValueError: If the shapes do not fit, there is but one class, or `temperature` is not positive.

    Example:
        >>> student, teacher = torch.zeros(1, 3), torch.tensor([[4.0, 0.0, 0.0]])
        >>> dkd_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=8.0, temperature=4.0)  # NCKD is 0
        tensor(1.9726)
    """
    student, teacher = prepare_logits(student_logits, teacher_logits, temperature)
    num_classes = student.shape[-1]
    if num_classes < 2 or labels.shape != student.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"Expected integer `labels` of shape {tuple(student.shape[:-1])} and at least 2 classes, but got"
            f" {labels.dtype} of shape {tuple(labels.shape)} and {num_classes}."
        )
    known = labels != IGNORE_INDEX
    target = labels.long().masked_fill(~known, 0).unsqueeze(-1)
    others = torch.arange(num_classes - 1, device=labels.device).expand(*labels.shape, num_classes - 1)
    others = others + (others >= target)  # all classes but the target, without a mask that would have to be counted
    log_p, log_q = F.log_softmax(teacher / temperature, dim=-1), F.log_softmax(student / temperature, dim=-1)
    tckd = _kl(_target_or_not(log_p, target, others), _target_or_not(log_q, target, others))
    nckd = _kl(log_p.gather(-1, others).log_softmax(-1), log_q.gather(-1, others).log_softmax(-1))
    return reduce_tokens(temperature**2 * (alpha * tckd + beta * nckd), known, reduction)


def batch_level_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Compute the batch level of MLKD [3], ‖P_S P_Sᵀ − P_T P_Tᵀ‖² / B, where P (B, C) holds the probabilities.

    Entry (i, j) of a Gram matrix tells how alike the predictions of rows i and j are. There is no factor τ².

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperature: τ > 0.

    Example:
        >>> batch_level_loss(torch.zeros(1, 2), torch.tensor([[30.0, 0.0]]), temperature=1.0)  # (½ − 1)²
        tensor(0.2500)
    """
    p, q = _probabilities(student_logits, teacher_logits, temperature)
    return (p @ p.mT - q @ q.mT).square().sum() / len(p)


def class_level_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Compute the class level of MLKD [3], ‖P_Sᵀ P_S − P_Tᵀ P_T‖² / C, where P (B, C) holds the probabilities.

    Entry (j, k) of a Gram matrix tells how often classes j and k are predicted together. Arguments as in
    `batch_level_loss`.

    Example:
        >>> class_level_loss(torch.zeros(1, 2), torch.tensor([[30.0, 0.0]]), temperature=1.0)  # (¾² + 3 · ¼²) / 2
        tensor(0.3750)
    """
    p, q = _probabilities(student_logits, teacher_logits, temperature)
    return (p.mT @ p - q.mT @ q).square().sum() / p.shape[-1]


def mlkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0)
) -> Tensor:
    """Compute multi-level logit distillation [3]: instance, batch and class level, summed over several temperatures.

    The instance level is `kd_kl_divergence`. The authors' code also views each image in two augmentations, and leaves
    rows out of which the teacher is not sure; this is the loss alone.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperatures: τ of the predictions.

    Example:
        >>> mlkd_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor(0.)
    """
    if not temperatures:
        raise ValueError("Expected `temperatures` to hold at least one, but got none.")
    levels = (kd_kl_divergence, batch_level_loss, class_level_loss)
    terms = [level(student_logits, teacher_logits, temperature=t) for t in temperatures for level in levels]
    return torch.stack(terms).sum()


def label_loss(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Compute the mean cross-entropy with labels, which may be soft.

    It is `torch.nn.functional.cross_entropy`, but 0 with a graph where no row has a label.

    Args:
        logits: (B, C).
        labels: (B,) integers, −100 for rows that are left out; or (B, C) probabilities of the classes, all 0 in rows
            that are left out.
        label_smoothing: share of the label that is spread over all classes.
        class_weights: (C,); a mean over integer labels is weighted by them.

    Example:
        >>> label_loss(torch.zeros(2, 4), torch.tensor([1, -100]))
        tensor(1.3863)
    """
    logits = at_least_float32(logits)
    weights = None if class_weights is None else class_weights.to(logits)
    if labels.is_floating_point():
        soft = labels.to(logits)
        rows = F.cross_entropy(logits, soft, weight=weights, label_smoothing=label_smoothing, reduction="none")
        return reduce_tokens(rows, labels.sum(-1) > 0, "mean")
    labels, known = labels.long(), labels != IGNORE_INDEX
    total = F.cross_entropy(logits, labels, weight=weights, label_smoothing=label_smoothing, reduction="sum")
    count = known.to(logits) if weights is None else known * weights[labels.masked_fill(~known, 0)]
    return total / count.sum().clamp(min=torch.finfo(logits.dtype).tiny)


def multi_label_loss(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Compute the mean binary cross-entropy of classes of which a row may have several or none.

    It is `torch.nn.functional.binary_cross_entropy_with_logits`, the mean over rows and classes, without the entries
    that are not known.

    Args:
        logits: (B, C).
        labels: (B, C), 1 or 0 where a row has or lacks a class, or a probability; −100 where that is not known.
        label_smoothing: share by which a label is moved to ½.
        class_weights: (C,); the mean is weighted by them.

    Example:
        >>> multi_label_loss(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, -100.0]]))
        tensor(0.6931)
    """
    logits, known = at_least_float32(logits), labels != IGNORE_INDEX
    targets = labels.to(logits).masked_fill(~known, 0) * (1 - label_smoothing) + label_smoothing / 2
    entries = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    weights = known.to(logits) if class_weights is None else known * class_weights.to(logits)
    return (weights * entries).sum() / weights.sum().clamp(min=torch.finfo(logits.dtype).tiny)


def prepare_logits(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Check shapes and temperature, and return both logits in at least float32.

    Raises:
        ValueError: If the shapes differ or `temperature` is not positive.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Expected `student_logits` and `teacher_logits` of one shape, but got {tuple(student_logits.shape)} and"
            f" {tuple(teacher_logits.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"Expected `temperature` to be positive, but got {temperature}.")
    student_logits = at_least_float32(student_logits)
    return student_logits, teacher_logits.to(student_logits.dtype)


def reduce_rows(rows: Tensor, reduction: Reduction) -> Tensor:
    """Reduce rows that all count."""
    return reduce_tokens(rows, torch.ones_like(rows, dtype=torch.bool), reduction)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _target_or_not(log_p: Tensor, target: Tensor, others: Tensor) -> Tensor:
    """Return (..., 2): the log-probabilities of the target and of all other classes."""
    rest = log_p.gather(-1, others).logsumexp(-1, keepdim=True)  # log(1 − p) would lose its digits
    return torch.cat([log_p.gather(-1, target), rest], dim=-1)


def _probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    student, teacher = prepare_logits(student_logits, teacher_logits, temperature)
    if student.dim() != 2:
        raise ValueError(f"Expected logits of shape (B, C), but got {tuple(student.shape)}.")
    return (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
