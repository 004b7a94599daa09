"""`DualHeadKD`: labels and a teacher's logits distilled through two heads, and the baselines.

Letters: B batch, T sequence, N tokens that count, C classes (for a language model its vocabulary), d features.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lit_logits.contracts import HasClassNames, offers
from lit_logits.functional.checks import check_not_negative
from lit_logits.functional.chunks import rows_a_chunk
from lit_logits.functional.dual_head_kd import ClassReduction, LogitLoss
from lit_logits.modules.dual_head_kd.batches import Batch, as_batch, check_targets, inputs_of, token_targets
from lit_logits.modules.dual_head_kd.checks import (
    Method,
    check_cache,
    check_checkpoint,
    check_has_labels,
    check_has_teacher,
    check_mixing,
    check_options,
    check_pair,
    check_whole_gradients,
)
from lit_logits.modules.dual_head_kd.classifiers import (
    as_name,
    classifier_logits,
    load_classifier,
    mark_multi_label,
)
from lit_logits.modules.dual_head_kd.criterion import (
    DualHeadCriterion,
    Losses,
    default_kd_factor,
    default_kd_loss,
    default_temperature,
)
from lit_logits.modules.dual_head_kd.judging import ClassifierMetrics
from lit_logits.modules.dual_head_kd.mixing import BatchMixer
from lit_logits.modules.dual_head_kd.net import AuxHeadKind, DualHeadClassifier, GradAlign, GradientAligner
from lit_logits.modules.dual_head_kd.resuming import NamesTeacher, check_class_order, check_same_teacher
from lit_logits.modules.dual_head_kd.saving import ExportsStudent
from lit_logits.modules.dual_head_kd.teacher import FrozenTeacher, load_teacher
from lit_logits.modules.dual_head_kd.teacher_cache import TeacherCache
from lit_logits.modules.dual_head_kd.terms import judge_tokens, sample_losses, token_losses
from lit_logits.modules.metrics import StageMeans, loss_and_perplexity
from lit_logits.modules.optimization import TokenWindow, make_optimizers
from lit_logits.modules.schedules import StepValue, value_at

__all__ = ["DualHeadKD"]


class DualHeadKD(NamesTeacher, ExportsStudent, LightningModule):
    """A student of any class that a teacher is distilled into through an auxiliary head on its features [0].

    L = γ CE(z₁, y) + α KD(z₂, z_T): the main head z₁ learns from the labels and the auxiliary head z₂ from the teacher.
    Logs `train/loss`, `train/loss_ce`, `train/loss_kd`, `val/loss` (CE of the main head) and `val/acc`; for language
    models `val/ppl`, for classifiers `val/acc_top5`, `val/ece` and `val/aux_acc`, or with `multi_label` in place of
    these and of `val/acc` `val/map`, `val/f1`, `val/exact_match` and `val/aux_map`, see `ClassifierMetrics`; the same
    under `test/`; and with aligned gradients `kd/grad_cosine` and `kd/conflict`.

    Optimisation stays automatic: with `grad_align` the `backward` hook keeps two gradients apart and the optimizer's
    closure joins them, so accumulation, clipping, loss scaling, schedulers and DDP stay the Trainer's. A step of a
    language model is on the mean over its tokens on all ranks, see `TokenWindow`.

    A subclass may override `training_step`. It calls `losses(batch)` and returns a loss made of the two terms, such as
    `ce + 0.5 * kd`, with weights and further terms of its own; `losses` names the distillation term to `self.aligner`,
    and `backward` finds its weight in the loss. A step that computes its own distillation term passes it to
    `self.aligner.keep_apart` before it returns the loss. A loss without a distillation term, for instance in a
    warm-up, trains as it is.

    Args:
        student: any classifier as a module; a name of the zoo such as `resnet8x4`; a hub id or folder of transformers
            (image or sequence classifier, causal language model); or the config of a new transformers model as a
            mapping with `model_type`.
        teacher: the same; needed only to train by a method other than `ce`. It is frozen, in `eval`, and in neither
            checkpoint nor optimizer.
        teacher_checkpoint: Lightning checkpoint or `state_dict` file for the teacher; see `load_weights`.
        teacher_cache: folder in which the teacher's logits are kept, so that it runs once for each view of an image.
            For data whose views come again (`num_views` of `ImageDataModule`), see `TeacherCache`.
        num_classes: C of models that are made here; it also helps to find the last layer.
        method: `ce`; `kd`: both terms on the one head; `single_head`: the same with BinaryKL or BinaryKL-Norm, the
            paper's collapse; `dual_head`.
        kd_loss: `kl` (default of `kd`), `binary_kl_norm` (default of the other two), `binary_kl`, `dkd`, `mlkd`, `mse`,
            `l1` or `cosine`; see `logit_loss`.
        temperature: τ; default 4 for `kl`, `dkd` and `mlkd` without `standardize`, else 2.
        standardize: compare z-scores of the logits; the paper weighs them by 9 (`kd_factor`).
        class_reduction: `mean` over classes in place of the paper's `sum`, of `binary_kl` and `binary_kl_norm`.
        dkd_alpha: weight of the target's term of `dkd`.
        dkd_beta: weight of the term of the other classes.
        multi_label: a sample may have several classes or none: labels are (B, C) of 1 and 0, −100 where not known; the
            cross-entropy is binary, and so is the default loss of `kd`.
        mixup_alpha: α of the Beta distribution of mixup: images of training, which the teacher sees mixed too, and
            their labels; 0 is none.
        cutmix_alpha: the same of CutMix; if both are above 0, each batch gets one of them, by a coin.
        mix_seed: of what is drawn for both.
        label_smoothing: of the cross-entropy in training.
        class_weights: of the cross-entropy of a classifier in training, one a class.
        ce_weight: γ.
        kd_factor: α, or a function of the optimizer steps taken that returns it, such as `LinearRamp` (DKD's warm-up).
            Default 1, as in the paper, but 10/C of a sum over more than ten classes, and as much of its mean.
        grad_align: take from the distillation gradient what opposes the cross-entropy gradient, over the parameters of
            the `backbone` or over `all`; costs one more backward pass.
        aux_head: `linear`, or `nonlinear` where teacher and student are of different families.
        classifier: dotted name of the student's last linear layer, if it is not found.
        chunk_size: tokens of a language model whose logits are in memory at a time; None goes by the memory that they
            take.
        optimizer: callable that takes the parameters.
        lr_scheduler: callable that takes the optimizer; `ReduceLROnPlateau` is stepped on its monitored value.
        lr_interval: step the scheduler every `epoch` or every optimizer `step`.

    Raises:
        ValueError: If the models do not fit each other or an argument is out of range; the message says what to pass.

    References:
        [0]: Dual-Head Knowledge Distillation, 2024, arXiv 2411.08937.

    Example:
        >>> from torch import nn
        >>> model = DualHeadKD(nn.Linear(4, 3), nn.Linear(4, 3), grad_align="backbone")
        >>> model(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        # With `Path`, jsonargparse does not read a file of that name as part of a recipe. It is last for the dumps.
        student: nn.Module | str | dict[str, Any] | Path,
        teacher: nn.Module | str | dict[str, Any] | Path | None = None,
        *,
        teacher_checkpoint: str | Path | None = None,
        teacher_cache: str | Path | None = None,
        num_classes: int | None = None,
        method: Method = "dual_head",
        kd_loss: LogitLoss | None = None,
        temperature: float | None = None,
        standardize: bool = False,
        class_reduction: ClassReduction = "sum",
        dkd_alpha: float = 1.0,
        dkd_beta: float = 8.0,
        multi_label: bool = False,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mix_seed: int = 0,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        ce_weight: float = 1.0,
        kd_factor: StepValue | None = None,
        grad_align: GradAlign = "none",
        aux_head: AuxHeadKind = "linear",
        classifier: str | None = None,
        chunk_size: int | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__()
        student, teacher = as_name(student), as_name(teacher)
        teacher_checkpoint, teacher_cache = as_name(teacher_checkpoint), as_name(teacher_cache)
        given = {"student": student, "teacher": teacher, "kd_factor": kd_factor}
        kept_out = [name for name, value in given.items() if callable(value)]  # code does not belong into a checkpoint
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *kept_out])
        check_options(method, kd_loss, temperature, ce_weight, kd_factor, lr_interval)
        self.method, self.ce_weight = method, ce_weight
        self.kd_loss: LogitLoss = kd_loss or default_kd_loss(method, multi_label=multi_label)
        self.temperature = default_temperature(self.kd_loss, standardize) if temperature is None else temperature
        self.criterion = DualHeadCriterion(
            self.kd_loss,
            self.temperature,
            standardize=standardize,
            class_reduction=class_reduction,
            dkd_alpha=dkd_alpha,
            dkd_beta=dkd_beta,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            multi_label=multi_label,
        )
        self.mixer = BatchMixer(mixup_alpha, cutmix_alpha, mix_seed)
        self.optimizer, self.lr_scheduler, self.lr_interval = optimizer, lr_scheduler, lr_interval

        self.net = DualHeadClassifier(
            load_classifier(student, num_classes, new_head=True),
            num_classes=num_classes,
            classifier=classifier,
            aux_head=aux_head if method == "dual_head" else None,
        )
        if multi_label:
            mark_multi_label(self.student)
        self.criterion.check(self.net.num_classes, is_causal_lm=self.net.is_causal_lm)
        default_factor = default_kd_factor(self.kd_loss, class_reduction, self.net.num_classes)
        self.kd_factor: StepValue = default_factor if kd_factor is None else kd_factor
        is_cached = teacher_cache is not None
        check_mixing(self.mixer.is_active, self.kd_loss, is_causal_lm=self.net.is_causal_lm, is_cached=is_cached)
        check_cache(is_cached, is_causal_lm=self.net.is_causal_lm)
        self._cache_folder = teacher_cache
        self._cache: TeacherCache | None = None
        self.chunk_size = rows_a_chunk(self.net.num_classes, chunk_size)
        aligner = GradientAligner(grad_align)
        self.aligner = GradientAligner() if method == "ce" else aligner  # a single term has nothing to be aligned with
        self.teacher: FrozenTeacher | None = None
        if method != "ce" and teacher is not None:
            self.teacher = load_teacher(teacher, teacher_checkpoint, num_classes)
            check_pair(self.net, self.teacher.model)
        self.token_window = TokenWindow()
        self.metrics: Any = StageMeans("nll", "acc")
        if not self.net.is_causal_lm:
            judged = {"multi_label": multi_label, "has_aux_head": self.net.aux_head is not None}
            self.metrics = ClassifierMetrics(self.net.num_classes, **judged)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the student's own output."""
        return self.student(*args, **kwargs)

    # ------------------------------------------------------------------ losses

    def losses(self, batch: Batch) -> Losses:
        """Return the cross-entropy of the main head and the distillation term, before weighting.

        The distillation term is kept apart for `backward`, see `GradientAligner.keep_apart`.

        Raises:
            ValueError: If a label is out of range, or there is no teacher to learn from.
        """
        check_has_teacher(self.teacher is not None, self.method)
        batch = self._checked(batch)
        check_has_labels(batch, self.method, self.kd_loss)
        parts = self.net, self.teacher, self.criterion, batch
        is_lm = self.net.is_causal_lm
        terms = token_losses(*parts, self.chunk_size) if is_lm else sample_losses(*parts, self._cache)
        if terms.kd is not None:
            self.aligner.keep_apart(terms.kd)
        return terms

    def _named(self, batch: Batch) -> Mapping[str, Tensor]:
        return as_batch(batch, getattr(self.student, "main_input_name", "pixel_values"))

    def _checked(self, batch: Batch, *, wait: bool = False) -> Mapping[str, Tensor]:
        """Return a batch as a mapping, see `as_batch`, whose labels have been checked."""
        batch = self._named(batch)
        if "labels" in batch:
            kind = {"is_causal_lm": self.net.is_causal_lm, "multi_label": self.criterion.multi_label}
            check_targets(batch["labels"], self.net.num_classes, **kind, wait=wait)
        return batch

    def _inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return inputs_of(batch, is_causal_lm=self.net.is_causal_lm)

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """Forget gradients of a fit that stopped between micro-batches, and refuse what does not fit data or ranks."""
        self.aligner.reset()
        check_has_teacher(self.teacher is not None, self.method)
        data = getattr(self.trainer, "datamodule", None)
        check_class_order(self.teacher, data.class_names if offers(data, HasClassNames) else None)
        if self._cache_folder is not None and self.teacher is not None:
            self._cache = TeacherCache(
                self._cache_folder, self.teacher, data, self.net.num_classes, str(self.trainer.precision)
            )
        if self.aligner.is_active:
            check_whole_gradients(type(self.trainer.strategy).__name__, self.aligner.mode)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another method, and say which one fits."""
        check_checkpoint(checkpoint["state_dict"], self.method, self.net.aux_head)
        if self._trainer is not None and self._trainer.state.fn == "fit":
            check_same_teacher(self.teacher, checkpoint)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Check the first batch on an accelerator too, and what the student returns before and after a step."""
        if batch_idx == 0:
            self._checked(batch, wait=True)  # once: the host waits for the device
        if batch_idx < 2:
            self.net.check_next_call()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the weighted sum of both terms."""
        ce, kd = self.losses(self.mixed(batch, batch_idx))
        loss = self.ce_weight * ce
        self.log("train/loss_ce", ce)
        if kd is not None:
            loss = loss + self._kd_factor_now() * kd
            self.log("train/loss_kd", kd)
        self.log("train/loss", loss, prog_bar=True)
        if not self.net.is_causal_lm:
            return loss
        return self.token_window.weigh(loss, token_targets(self._checked(batch)).mask.sum(), batch_idx, self._trainer)

    def mixed(self, batch: Batch, batch_idx: int) -> Batch:
        """Return a batch with its images mixed, see `BatchMixer`, as `mixup_alpha` and `cutmix_alpha` ask for."""
        if not self.mixer.is_active:
            return batch
        place = (self.current_epoch, batch_idx, self.global_rank)
        return self.mixer(
            self._checked(batch), self.net.num_classes, place=place, multi_label=self.criterion.multi_label
        )

    def _kd_factor_now(self) -> float:
        factor = value_at(self.kd_factor, self.global_step)
        if callable(self.kd_factor):
            check_not_negative(kd_factor=factor)
            self.log("train/kd_factor", factor)
        return factor

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let every token of the step weigh the same, whatever micro-batch and rank it was in."""
        self.token_window.normalize_(self.parameters(), self.trainer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run one backward pass, or two to keep the distillation gradient apart from that of all other terms.

        The loss comes here as the Trainer made it: divided by the number of micro-batches, and scaled in float16. Both
        gradients carry those factors, as `.grad` would.
        """
        if self.aligner.is_active and self.teacher is not None:
            self.aligner.collect(loss, self._trained())
        else:
            super().backward(loss, *args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Join the two gradients after the last micro-batch, before gradients are unscaled and clipped."""

        # The Trainer's closure zeroes `.grad` and runs the last micro-batch; unscaling and clipping follow it. Between
        # them the sums over all micro-batches are complete, and what is written to `.grad` is treated like any other.
        def closure() -> Any:
            result = optimizer_closure() if optimizer_closure is not None else None
            aligned = self.aligner.join(self._trained(), self.net.head_parameters())
            # Not finite if the loss scale overflowed, when the step is skipped, or without a distillation term.
            if aligned is not None and bool(aligned.cosine.isfinite()):
                values = {"kd/grad_cosine": aligned.cosine, "kd/conflict": aligned.conflict}
                self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True)
            return result

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def configure_optimizers(self) -> Any:
        """Return the injected optimizer and scheduler."""
        return make_optimizers(self._trained(), self.optimizer, self.lr_scheduler, self.lr_interval, self._trainer)

    # ------------------------------------------------------------------ evaluation
    # Written out in each module, as Lightning names them: the house has no shared LightningModule base class.

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take in loss and accuracy of the main head, and the accuracy of the auxiliary one."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take in loss and accuracy of the main head, and the accuracy of the auxiliary one."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log means over all samples of all ranks."""
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        """Log means over all samples of all ranks."""
        self._log_means("test")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        batch = self._checked(batch)
        if "labels" not in batch:
            return  # nothing to be judged by
        if self.net.is_causal_lm:
            self.metrics.update(stage, **judge_tokens(self.net, batch, self.chunk_size))
        else:
            output = self.net(self._inputs(batch))
            self.metrics.update(stage, output.logits, batch["labels"], output.aux_logits)

    def _log_means(self, stage: str) -> None:
        means = self.metrics.compute(stage)
        values = loss_and_perplexity(stage, means.pop("nll"))
        if not self.net.is_causal_lm:
            del values[f"{stage}/ppl"]
        values |= {f"{stage}/{name}": value for name, value in means.items()}
        self.log_dict(values, prog_bar=True, sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the logits of the main head, (B, C) or (B, T, C), and the most likely classes.

        With `multi_label` predictions are (B, C), whether each class is more likely than not.
        """
        logits = classifier_logits(self.student, self._inputs(self._named(batch)))
        return {"logits": logits, "predictions": logits > 0 if self.criterion.multi_label else logits.argmax(-1)}
