"""`ConfusionMatrixLogger`: which classes a classifier takes for which, as a picture.

Letters: B batch, C classes.
"""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from lit_logits.callbacks.classifier_outputs import ClassifierOutputs
from lit_logits.callbacks.loggers import picture_writers
from lit_logits.callbacks.parts import find_part, shown_class_names, trained_so_far
from lit_logits.callbacks.pictures.confusion import confusion_figure
from lit_logits.functional.distributed import all_reduce_sum_
from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.modules.dual_head_kd.batches import labels_of
from lit_logits.modules.dual_head_kd.criterion import DualHeadCriterion
from lit_logits.modules.dual_head_kd.judging import likeliest_classes
from lit_logits.modules.dual_head_kd.net import DualHeadClassifier

__all__ = ["ConfusionMatrixLogger"]


class ConfusionMatrixLogger(Callback):
    """Draw the confusion matrix of a `DualHeadClassifier`'s main head after each validation and test, for TensorBoard.

    `val/confusion` and `test/confusion` count all samples of all ranks and data loaders that have a label. The outputs
    are those that evaluation computes anyway.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[ConfusionMatrixLogger()], logger=False)
    """

    def __init__(self) -> None:
        self._outputs = ClassifierOutputs()
        self._counts: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn if the model has no classifier of classes that exclude each other."""
        if _classifier(pl_module) is None:
            rank_zero_warn(
                "ConfusionMatrixLogger will do nothing: it needs a DualHeadClassifier with one class a sample, which"
                " language models and `multi_label` do not have."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from now on."""
        self._start(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Count the batch."""
        self._add(args[0])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._draw(trainer, "val/confusion")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from now on."""
        self._start(trainer, pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Count the batch."""
        self._add(args[0])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._draw(trainer, "test/confusion")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop counting."""
        self._stop()

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net = _classifier(pl_module)
        if net is not None and not trainer.sanity_checking:
            self._outputs.start(net)
            self._counts = torch.zeros(net.num_classes, net.num_classes, dtype=torch.int64, device=pl_module.device)

    def _add(self, batch: Any) -> None:
        output, labels = self._outputs.take(), labels_of(batch)
        if self._counts is None or output is None or labels is None or len(labels) != len(output.logits):
            return
        classes = likeliest_classes(labels)
        if labels.dim() == 2:
            classes = classes.masked_fill(labels.sum(-1) == 0, IGNORE_INDEX)
        self._counts += multiclass_confusion_matrix(
            output.logits.argmax(-1),
            classes.to(output.logits.device),
            num_classes=len(self._counts),
            ignore_index=IGNORE_INDEX,
            validate_args=False,
        ).to(self._counts.device)

    def _draw(self, trainer: Trainer, tag: str) -> None:
        counts = self._counts
        self._stop()
        if counts is None:
            return
        counts = all_reduce_sum_(counts).cpu()
        writers = picture_writers(trainer) if trainer.is_global_zero else []
        if not writers or not bool(counts.any()):
            return
        epoch, step = trained_so_far(trainer)
        for writer in writers:
            writer.add_figure(tag, confusion_figure(counts, epoch, shown_class_names(trainer, len(counts))), step)

    def _stop(self) -> None:
        self._outputs.stop()
        self._counts = None


def _classifier(pl_module: LightningModule) -> DualHeadClassifier | None:
    """Return the part to watch, or None if a sample may have several classes, or they are a vocabulary."""
    net, criterion = find_part(pl_module, DualHeadClassifier), find_part(pl_module, DualHeadCriterion)
    several = criterion is not None and criterion.multi_label
    return None if net is None or net.is_causal_lm or several else net
