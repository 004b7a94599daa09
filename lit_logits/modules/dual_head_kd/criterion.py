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
from lit_logits.functional.kd_losses import label_loss
from lit_logits.functional.reductions import at_least_float32

__all__ = ["DualHeadCriterion", "Losses", "default_temperature", "judge_rows"]


def default_temperature(kd_loss: LogitLoss, standardize: bool) -> float:
    """Return the temperature of the papers: 4 for probabilities of plain logits, else 2.

    Example:
        >>> default_temperature("kl", False), default_temperature("kl", True)
        (4.0, 2.0)
    """
    return 4.0 if kd_loss in ("kl", "dkd", "mlkd") and not standardize else 2.0


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
    ) -> None:
        super().__init__()
        if class_reduction not in get_args(ClassReduction):
            raise ValueError(f"Expected `class_reduction` to be 'sum' or 'mean', but got {class_reduction!r}.")
        if class_reduction == "mean" and kd_loss not in ("binary_kl", "binary_kl_norm"):
            raise ValueError(
                "Expected `class_reduction` to be 'sum' unless `kd_loss` is 'binary_kl' or 'binary_kl_norm', which sum"
                f" over classes, but got 'mean' for {kd_loss!r}."
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Expected `label_smoothing` to be in [0, 1), but got {label_smoothing}.")
        check_not_negative(dkd_alpha=dkd_alpha, dkd_beta=dkd_beta)
        self.kd_loss, self.temperature = kd_loss, temperature
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
        if is_causal_lm and (weights is not None or self.kd_loss == "mlkd"):
            name = "class_weights" if weights is not None else "kd_loss='mlkd'"
            raise ValueError(
                f"Expected a classifier for {name}, but got a causal language model, whose logits are made a chunk at a"
                " time. Leave it out."
            )

    def label_term(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy over rows that have a label, see `label_loss`."""
        options = {"label_smoothing": self.label_smoothing, "class_weights": self.class_weights}
        return label_loss(logits, labels, **options)  # type: ignore[arg-type]

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


def judge_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy (N,) of each sample, and 1 where its most likely class is that of the label."""
    logits = at_least_float32(logits)
    if targets.is_floating_point():
        classes, targets = targets.argmax(-1), targets.to(logits)
    else:
        classes = targets = targets.long()
    return F.cross_entropy(logits, targets, reduction="none"), (logits.argmax(-1) == classes).float()
