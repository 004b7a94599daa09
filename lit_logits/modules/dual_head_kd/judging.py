"""What an evaluation measures: the cross-entropy of the main head, and how right and how sure both heads are.

Letters: B samples, N of them that have a label, C classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import (
    MulticlassCalibrationError,
    MultilabelAveragePrecision,
    MultilabelExactMatch,
    MultilabelF1Score,
)
from torchmetrics.functional.classification import binary_average_precision
from torchmetrics.utilities import dim_zero_cat

from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.functional.reductions import at_least_float32
from lit_logits.modules.metrics import STAGES, StageMeans

__all__ = ["ClassifierMetrics", "judge_rows", "likeliest_classes"]

TOP = 5
NUM_BINS = 15
"""Of the calibration error, as in the field's tables."""


class ClassifierMetrics(nn.Module):
    """Measures of a classifier over all samples of all ranks, by stage.

    Of one class a row: `nll`, `acc`, for more than five classes `acc_top5`, and `ece`, the expected calibration error:
    the mean distance of confidence and accuracy over 15 bins of the confidence. Of several classes a row: `nll`, the
    binary cross-entropy; `map`, the mean over classes of the average precision, which needs no threshold; `f1`, the
    mean over classes of F1; and `exact_match`, the share of rows that are right in all classes that are known, both at
    a probability of ½. With an auxiliary head also `aux_acc`, or `aux_map`. Without samples all are NaN.

    Args:
        num_classes: C.
        multi_label: whether a row may have several classes or none.
        has_aux_head: whether there is an auxiliary head to be judged.

    Example:
        >>> metrics = ClassifierMetrics(2)
        >>> metrics.update("val", torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
        >>> {name: round(float(value), 3) for name, value in metrics.compute("val").items()}
        {'nll': 1.127, 'acc': 0.5, 'ece': 0.381}
    """

    def __init__(self, num_classes: int, *, multi_label: bool = False, has_aux_head: bool = False) -> None:
        super().__init__()
        self.num_classes, self.multi_label = num_classes, multi_label
        means = ["nll"]
        if not multi_label:
            means += ["acc", *(["acc_top5"] if num_classes > TOP else []), *(["aux_acc"] if has_aux_head else [])]
        self.means = StageMeans(*means)
        self.metrics = nn.ModuleDict({stage: self._make(has_aux_head) for stage in STAGES})

    def _make(self, has_aux_head: bool) -> nn.ModuleDict:
        if not self.multi_label:
            return nn.ModuleDict({"ece": MulticlassCalibrationError(self.num_classes, NUM_BINS, validate_args=False)})
        options: dict[str, Any] = {"ignore_index": IGNORE_INDEX, "validate_args": False}
        judges: dict[str, nn.Module] = {
            "map": _KnownAveragePrecision(self.num_classes, **options),
            "f1": MultilabelF1Score(self.num_classes, **options),
            "exact_match": MultilabelExactMatch(self.num_classes, **options),
        }
        if has_aux_head:
            judges["aux_map"] = _KnownAveragePrecision(self.num_classes, **options)
        return nn.ModuleDict(judges)

    def update(self, stage: str, logits: Tensor, labels: Tensor, aux_logits: Tensor | None = None) -> None:
        """Take in a batch.

        Args:
            stage: `val` or `test`.
            logits: (B, C) of the main head.
            labels: as for `check_targets`; rows without a label are left out.
            aux_logits: (B, C) of the auxiliary head.
        """
        logits = at_least_float32(logits)
        if self.multi_label:
            self._update_multi_label(stage, logits, labels, aux_logits)
            return
        known = labels.sum(-1) > 0 if labels.dim() == 2 else labels != IGNORE_INDEX
        logits, targets = logits[known], labels[known]
        nll, acc = judge_rows(logits, targets)
        classes, values = likeliest_classes(targets), {"nll": nll, "acc": acc}
        if self.num_classes > TOP:
            values["acc_top5"] = (logits.topk(TOP).indices == classes.unsqueeze(-1)).any(-1).float()
        if aux_logits is not None:
            values["aux_acc"] = judge_rows(aux_logits[known], targets)[1]
        self.means.update(stage, **values)
        self._of(stage)["ece"].update(logits.softmax(-1), classes)

    def _update_multi_label(self, stage: str, logits: Tensor, labels: Tensor, aux_logits: Tensor | None) -> None:
        known = labels != IGNORE_INDEX
        targets = labels.to(logits).masked_fill(~known, 0)
        nll = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        self.means.update(stage, nll=(nll, known.to(logits)))
        rows = known.any(-1)
        if not bool(rows.any()):
            return
        decided = (targets >= 0.5).long().masked_fill(~known, IGNORE_INDEX)[rows]
        for name, metric in self._of(stage).items():
            judged = aux_logits if name == "aux_map" else logits
            if judged is not None:
                metric.update(at_least_float32(judged[rows]).sigmoid(), decided)

    def compute(self, stage: str) -> dict[str, Tensor]:
        """Return the measures by name, and reset them. All ranks must call it."""
        values = self.means.compute(stage)
        for name, metric in self._of(stage).items():
            if metric.update_count == 0:
                self._take_in_nothing(metric)
            # None is defined without samples or for a diverged model; all ranks have the same mean.
            values[name] = values["nll"] if bool(values["nll"].isnan()) else metric.compute()
            with torch.inference_mode(False):  # what is made there cannot be changed in place outside of it
                metric.reset()
        return values

    def _take_in_nothing(self, metric: Any) -> None:
        """Let a rank without samples take part in the gathering of rows, which asks for those of the right form."""
        row = torch.zeros(1, self.num_classes, device=metric.device)
        if isinstance(metric, MulticlassCalibrationError):
            metric.update(row[:0], row[:0, 0].long())
        elif isinstance(metric, MultilabelAveragePrecision):
            metric.update(row, torch.full_like(row, IGNORE_INDEX).long())

    def _of(self, stage: str) -> Any:
        return self.metrics[stage]


class _KnownAveragePrecision(MultilabelAveragePrecision):
    """The mean over the classes that some row is known of; torchmetrics fails where one is known of none."""

    def compute(self) -> Tensor:  # type: ignore[override]  # as torchmetrics' own
        """Return the mean average precision, NaN without a class that has a positive."""
        scores, targets = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        known = (targets != IGNORE_INDEX).any(0).nonzero().flatten().tolist()
        options: dict[str, Any] = {"ignore_index": IGNORE_INDEX, "validate_args": False}
        each = [binary_average_precision(scores[:, c], targets[:, c], **options) for c in known]
        return torch.stack(each).nanmean() if each else scores.new_full((), torch.nan)


def likeliest_classes(targets: Tensor) -> Tensor:
    """Return (N,) classes: those of integer labels, or the most likely ones of (N, C) probabilities."""
    return targets.argmax(-1) if targets.is_floating_point() else targets.long()


def judge_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy (N,) of each sample, and 1 where its most likely class is that of the label."""
    logits, classes = at_least_float32(logits), likeliest_classes(targets)
    targets = targets.to(logits) if targets.is_floating_point() else classes
    return F.cross_entropy(logits, targets, reduction="none"), (logits.argmax(-1) == classes).float()
