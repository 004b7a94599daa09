"""The two terms of distillation, with all that they take beside logits.

Letters: B rows, C classes.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_logits.functional.checks import check_not_negative
from lit_logits.functional.dual_head_kd import ClassReduction, LogitLoss, logit_loss
from lit_logits.functional.kd_losses import label_loss, multi_label_loss
from lit_logits.functional.reductions import at_least_float32

__all__ = ["DualHeadCriterion", "Losses", "default_kd_factor", "default_kd_loss", "default_temperature"]

OVER_CLASSES = ("kl", "dkd", "mlkd")
"""Losses on probabilities that sum to 1 over the classes."""
OVER_EACH_CLASS = ("binary_kl", "binary_kl_norm")
"""Losses with a term for each class."""


def default_kd_loss(method: str, *, multi_label: bool) -> LogitLoss:
    """Return Hinton's loss for `kd`, its like for classes that do not exclude each other, and else the paper's."""
    return "binary_kl_norm" if method != "kd" else "binary_kl" if multi_label else "kl"


def default_temperature(kd_loss: LogitLoss, standardize: bool) -> float:
    """Return the temperature of the papers: 4 for probabilities of plain logits, else 2.

    Example:
        >>> default_temperature("kl", False), default_temperature("kl", True)
        (4.0, 2.0)
    """
    return 4.0 if kd_loss in OVER_CLASSES and not standardize else 2.0


def default_kd_factor(kd_loss: LogitLoss, class_reduction: ClassReduction, num_classes: int) -> float:
    """Return the weight α where none is given: the paper's 1 up to ten classes, and 10/C of a sum over more.

    A sum grows with the classes, the cross-entropy does not. A mean over classes gets the weight of the same loss.

    Example:
        >>> default_kd_factor("binary_kl", "sum", 100), default_kd_factor("kl", "sum", 100)
        (0.1, 1.0)
    """
    if kd_loss not in OVER_EACH_CLASS:
        return 1.0
    return min(10.0, num_classes) if class_reduction == "mean" else min(1.0, 10.0 / num_classes)


class Losses(NamedTuple):
    """The two terms before weighting, means over the samples or tokens that count; `kd` is None without a teacher."""

    ce: Tensor
    kd: Tensor | None


class DualHeadCriterion(nn.Module):
    """Cross-entropy with labels, and a loss between the logits of student and teacher.

    Args:
        kd_loss: see `logit_loss`.
        temperature: τ.
        standardize: take the z-scores of both logits.
        class_reduction: `sum` or `mean` over classes of `binary_kl` and `binary_kl_norm`.
        dkd_alpha: α of `dkd`.
        dkd_beta: β of `dkd`.
        label_smoothing: share of a label that is spread over all classes.
        class_weights: of the cross-entropy, one a class.
        multi_label: a row may have several classes or none: the cross-entropy is binary, see `multi_label_loss`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> criterion = DualHeadCriterion("kl", 4.0)
        >>> criterion.kd_term(torch.zeros(1, 2), torch.tensor([[0.0, 4.0]]))
        tensor(1.7751)
    """

    class_weights: Tensor | None

    def __init__(
        self,
        kd_loss: LogitLoss,
        temperature: float,
        *,
        standardize: bool = False,
        class_reduction: ClassReduction = "sum",
        dkd_alpha: float = 1.0,
        dkd_beta: float = 8.0,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        multi_label: bool = False,
    ) -> None:
        super().__init__()
        if class_reduction not in get_args(ClassReduction):
            raise ValueError(f"Expected `class_reduction` to be 'sum' or 'mean', but got {class_reduction!r}.")
        if class_reduction == "mean" and kd_loss not in OVER_EACH_CLASS:
            raise ValueError(
                "Expected `class_reduction` to be 'sum' unless `kd_loss` is 'binary_kl' or 'binary_kl_norm', which sum"
                f" over classes, but got 'mean' for {kd_loss!r}."
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Expected `label_smoothing` to be in [0, 1), but got {label_smoothing}.")
        if multi_label and kd_loss in OVER_CLASSES:
            raise ValueError(
                "Expected `kd_loss` to be 'binary_kl', 'binary_kl_norm', 'mse', 'l1' or 'cosine' for multi_label=True,"
                f" but got {kd_loss!r}, whose probabilities sum to 1 over the classes."
            )
        check_not_negative(dkd_alpha=dkd_alpha, dkd_beta=dkd_beta)
        self.kd_loss, self.temperature, self.multi_label = kd_loss, temperature, multi_label
        self.standardize, self.class_reduction = standardize, class_reduction
        self.dkd_alpha, self.dkd_beta, self.label_smoothing = dkd_alpha, dkd_beta, label_smoothing
        weights = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def check(self, num_classes: int, *, is_causal_lm: bool) -> None:
        """Refuse what does not go with the student.

        Raises:
            ValueError: If `class_weights` are not one a class, or a language model is to have what needs whole batches.
        """
        weights = self.class_weights
        if weights is not None and (len(weights) != num_classes or not bool((weights >= 0).all())):
            raise ValueError(
                f"Expected `class_weights` to be {num_classes} non-negative numbers, one a class, but got"
                f" {weights.tolist()[:8]} ({len(weights)})."
            )
        kept = {"kd_loss='mlkd'": self.kd_loss == "mlkd", "multi_label=True": self.multi_label}
        given = [name for name, is_given in {"class_weights": weights is not None, **kept}.items() if is_given]
        if is_causal_lm and given:
            raise ValueError(
                f"Expected a classifier for {given[0]}, but got a causal language model, whose logits are made a chunk"
                " at a time. Leave it out."
            )

    def label_term(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """Return the mean cross-entropy over what has a label, see `label_loss` and `multi_label_loss`.

        Without labels it is 0, with a graph.
        """
        if labels is None:
            return at_least_float32(logits[:0]).sum()
        loss = multi_label_loss if self.multi_label else label_loss
        return loss(logits, labels, label_smoothing=self.label_smoothing, class_weights=self.class_weights)

    def label_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the cross-entropy over tokens that have a label."""
        return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=self.label_smoothing, reduction="sum")

    def kd_term(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> Tensor:
        """Return the distillation loss over all rows; `dkd` needs the labels, and leaves rows without one out."""
        return logit_loss(
            student_logits,
            teacher_logits,
            kind=self.kd_loss,
            temperature=self.temperature,
            labels=labels,
            alpha=self.dkd_alpha,
            beta=self.dkd_beta,
            standardize=self.standardize,
            class_reduction=self.class_reduction,
            reduction=reduction,
        )
