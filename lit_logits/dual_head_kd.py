"""`DualHeadKD`: labels and a teacher's logits distilled through two heads, and the baselines.

Letters: B batch, T sequence, N tokens that count, C classes (for a language model its vocabulary), d features.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_logits.functional.checks import check_labels
from lit_logits.functional.chunks import chunked_rows, chunked_sum, rows_a_chunk
from lit_logits.functional.dual_head_kd import LogitLoss, logit_loss
from lit_logits.functional.labels import IGNORE_INDEX, next_token_labels
from lit_logits.functional.reductions import at_least_float32, reduce_tokens
from lit_logits.modules.dual_head_kd.checks import Method, check_options, check_pair, check_whole_gradients
from lit_logits.modules.dual_head_kd.classifiers import classifier_logits, load_classifier
from lit_logits.modules.dual_head_kd.net import AuxHeadKind, DualHeadClassifier, GradAlign, GradientAligner
from lit_logits.modules.dual_head_kd.teacher import FrozenTeacher, load_teacher
from lit_logits.modules.language_models.card import find_origin
from lit_logits.modules.language_models.saving import PushesToHub, save_model_file, save_model_folder
from lit_logits.modules.metrics import StageMeans, loss_and_perplexity
from lit_logits.modules.optimization import TokenWindow, make_optimizers

__all__ = ["DualHeadKD"]

TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
"""Inputs of a causal language model; batches may hold more, such as row numbers."""


class Losses(NamedTuple):
    """The two terms before weighting, means over the samples or tokens that count; `kd` is None without a teacher."""

    ce: Tensor
    kd: Tensor | None


class DualHeadKD(PushesToHub, LightningModule):
    """A student of any class that a teacher is distilled into through an auxiliary head on its features [0].

    L = γ CE(z₁, y) + α KD(z₂, z_T): the main head z₁ learns from the labels and the auxiliary head z₂ from the teacher.
    Logs `train/loss`, `train/loss_ce`, `train/loss_kd`, `val/loss` (CE of the main head), `val/acc`, for language
    models `val/ppl`, the same under `test/`, and with aligned gradients `kd/grad_cosine` and `kd/conflict`.

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
        num_classes: C of models that are made here; it also helps to find the last layer.
        method: `ce`; `kd`: both terms on the one head; `single_head`: the same with BinaryKL or BinaryKL-Norm, the
            paper's collapse; `dual_head`.
        kd_loss: `kl` (default of `kd`), `binary_kl_norm` (default of the other two), `binary_kl`, `mse`, `l1` or
            `cosine`; see `logit_loss`.
        temperature: τ; default 4 for `kl`, else 2.
        ce_weight: γ.
        kd_factor: α.
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
        student: nn.Module | str | dict[str, Any],
        teacher: nn.Module | str | dict[str, Any] | None = None,
        *,
        teacher_checkpoint: str | None = None,
        num_classes: int | None = None,
        method: Method = "dual_head",
        kd_loss: LogitLoss | None = None,
        temperature: float | None = None,
        ce_weight: float = 1.0,
        kd_factor: float = 1.0,
        grad_align: GradAlign = "none",
        aux_head: AuxHeadKind = "linear",
        classifier: str | None = None,
        chunk_size: int | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__()
        modules = [k for k, v in (("student", student), ("teacher", teacher)) if isinstance(v, nn.Module)]
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", *modules])
        check_options(method, kd_loss, temperature, ce_weight, kd_factor, lr_interval)
        self.method, self.ce_weight, self.kd_factor = method, ce_weight, kd_factor
        self.kd_loss: LogitLoss = kd_loss or ("kl" if method == "kd" else "binary_kl_norm")
        self.temperature = (4.0 if self.kd_loss == "kl" else 2.0) if temperature is None else temperature
        self.optimizer, self.lr_scheduler, self.lr_interval = optimizer, lr_scheduler, lr_interval

        self.net = DualHeadClassifier(
            load_classifier(student, num_classes, new_head=True),
            num_classes=num_classes,
            classifier=classifier,
            aux_head=aux_head if method == "dual_head" else None,
        )
        self.chunk_size = rows_a_chunk(self.net.num_classes, chunk_size)
        aligner = GradientAligner(grad_align)
        self.aligner = GradientAligner() if method == "ce" else aligner  # a single term has nothing to be aligned with
        self.teacher: FrozenTeacher | None = None
        if method != "ce" and teacher is not None:
            self.teacher = load_teacher(teacher, teacher_checkpoint, num_classes)
            check_pair(self.net, self.teacher.model)
        self.token_window = TokenWindow()
        has_aux_acc = self.net.aux_head is not None and not self.net.is_causal_lm
        self.means = StageMeans("nll", "acc", *(["aux_acc"] if has_aux_acc else []))

    @property
    def student(self) -> nn.Module:
        """The student itself, of its own class, which `export` writes."""
        return self.net.student

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the student's own output."""
        return self.student(*args, **kwargs)

    # ------------------------------------------------------------------ losses

    def losses(self, batch: Mapping[str, Tensor]) -> Losses:
        """Return the cross-entropy of the main head and the distillation term, before weighting.

        The distillation term is kept apart for `backward`, see `GradientAligner.keep_apart`.

        Raises:
            ValueError: If a label is out of range, or there is no teacher to learn from.
        """
        self._check_teacher()
        check_labels(batch["labels"], self.net.num_classes)
        terms = self._token_losses(batch) if self.net.is_causal_lm else self._sample_losses(batch)
        if terms.kd is not None:
            self.aligner.keep_apart(terms.kd)
        return terms

    def _sample_losses(self, batch: Mapping[str, Tensor]) -> Losses:
        """Return both terms over samples with one label each."""
        inputs, labels = self._inputs(batch), batch["labels"].long()
        output = self.net(inputs)
        ce = reduce_tokens(
            F.cross_entropy(at_least_float32(output.logits), labels, reduction="none"), labels != IGNORE_INDEX
        )
        if self.teacher is None:
            return Losses(ce, None)
        logits = output.logits if output.aux_logits is None else output.aux_logits
        return Losses(ce, self._kd(logits, self.teacher(inputs)))

    def _inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of the models: the batch without its labels; for a language model its token inputs."""
        if self.net.is_causal_lm:
            return {name: batch[name] for name in TOKEN_INPUTS if name in batch}
        return {name: value for name, value in batch.items() if name != "labels"}

    def _token_losses(self, batch: Mapping[str, Tensor]) -> Losses:
        """Return both terms over next tokens, in chunks, so that (N, C) logits of heads and teacher are never whole."""
        inputs = self._inputs(batch)
        labels, mask = next_token_labels(batch["labels"])
        hidden, targets = self.net.hidden_states(inputs)[mask], labels[mask].long()
        count = mask.sum().clamp(min=1)

        def ce(rows: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(at_least_float32(self.net.main_logits(rows)), targets, reduction="sum")

        ce_term = chunked_sum(ce, hidden, targets, chunk_size=self.chunk_size) / count
        if self.teacher is None:
            return Losses(ce_term, None)
        aux, teacher_logits = self.net.aux_head, self.teacher.output_logits
        head = self.net.main_logits if aux is None else aux.classifier

        def kd(rows: Tensor, teacher_rows: Tensor) -> Tensor:
            return self._kd(head(rows), teacher_logits(teacher_rows), reduction="sum")

        rows = hidden if aux is None else aux.hidden(hidden)
        teacher_rows = self.teacher.hidden_states(inputs)[mask]
        return Losses(ce_term, chunked_sum(kd, rows, teacher_rows, chunk_size=self.chunk_size) / count)

    def _kd(self, logits: Tensor, teacher_logits: Tensor, **kwargs: Any) -> Tensor:
        return logit_loss(logits, teacher_logits, kind=self.kd_loss, temperature=self.temperature, **kwargs)

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """Forget gradients of a fit that stopped between micro-batches, and refuse strategies that shard gradients."""
        self.aligner.reset()
        self._check_teacher()
        if self.aligner.is_active:
            check_whole_gradients(type(self.trainer.strategy).__name__, self.aligner.mode)

    def _check_teacher(self) -> None:
        if self.method != "ce" and self.teacher is None:
            raise ValueError(
                f"Expected a `teacher` for method={self.method!r}, but got None, which serves evaluation only. Train"
                " one with method='ce'."
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another method, and say which one fits."""
        theirs = any(name.startswith("net.aux_head.") for name in checkpoint["state_dict"])
        if theirs != (self.net.aux_head is not None):
            given, own = ("with", "without") if theirs else ("without", "with")
            raise ValueError(
                f"Expected a checkpoint {own} an auxiliary head for method={self.method!r}, but this one is {given} it."
                " Pass the `method` (and `aux_head`) that it was trained with."
            )

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Check the labels of the first batch, on an accelerator too."""
        if batch_idx == 0:
            check_labels(batch["labels"], self.net.num_classes, wait=True)  # once: the host waits for the device

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the weighted sum of both terms."""
        ce, kd = self.losses(batch)
        loss = self.ce_weight * ce
        self.log("train/loss_ce", ce)
        if kd is not None:
            loss = loss + self.kd_factor * kd
            self.log("train/loss_kd", kd)
        self.log("train/loss", loss, prog_bar=True)
        if not self.net.is_causal_lm:
            return loss
        return self.token_window.weigh(loss, next_token_labels(batch["labels"]).mask.sum(), batch_idx, self._trainer)

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

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take in loss and accuracy of the main head, and the accuracy of the auxiliary one."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take in loss and accuracy of the main head, and the accuracy of the auxiliary one."""
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log means over all samples of all ranks."""
        self._log_means("val")

    def on_test_epoch_end(self) -> None:
        """Log means over all samples of all ranks."""
        self._log_means("test")

    def _evaluate(self, batch: Mapping[str, Tensor], stage: str) -> None:
        check_labels(batch["labels"], self.net.num_classes)
        if self.net.is_causal_lm:
            labels, mask = next_token_labels(batch["labels"])
            hidden, targets = self.net.hidden_states(self._inputs(batch))[mask], labels[mask].long()

            def judge(rows: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
                return _judge(self.net.main_logits(rows), targets)

            nll, acc = chunked_rows(judge, hidden, targets, chunk_size=self.chunk_size)
        else:
            output, known = self.net(self._inputs(batch)), batch["labels"] != IGNORE_INDEX
            targets = batch["labels"][known].long()
            nll, acc = _judge(output.logits[known], targets)
            if output.aux_logits is not None:
                self.means.update(stage, aux_acc=_judge(output.aux_logits[known], targets)[1])
        self.means.update(stage, nll=nll, acc=acc)

    def _log_means(self, stage: str) -> None:
        means = self.means.compute(stage)
        values = loss_and_perplexity(stage, means.pop("nll"))
        if not self.net.is_causal_lm:
            del values[f"{stage}/ppl"]
        self.log_dict(values | {f"{stage}/{name}": value for name, value in means.items()}, prog_bar=True)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the logits of the main head, (B, C) or (B, T, C), and the most likely classes."""
        logits = classifier_logits(self.student, self._inputs(batch))
        return {"logits": logits, "predictions": logits.argmax(-1)}

    # ------------------------------------------------------------------ export

    @property
    def card_text(self) -> str:
        """What was done, for the card of the saved student."""
        if self.teacher is None:
            return f"Trained on labels (`DualHeadKD`, method `{self.method}`)."
        teacher = self.teacher.model
        name = find_origin(str(getattr(getattr(teacher, "config", None), "_name_or_path", ""))).name
        heads = " through two heads (arXiv 2411.08937)" if self.method == "dual_head" else ""
        return (
            f"Distilled{heads} from the logits of {name or type(teacher).__name__}, and trained on labels"
            f" (`DualHeadKD`, method `{self.method}`); the auxiliary head is left out."
        )

    def export(self, path: str | Path, *, tokenizer: Any = None) -> Path:
        """Write the student without the auxiliary head, in its own format, as a whole or not at all; rank zero writes.

        A transformers student becomes a folder for `from_pretrained`, see `save_model_folder`; any other a file for
        `load_state_dict` of its own class.

        Args:
            path: the folder, or the file.
            tokenizer: saved with a language model; default the data module's, if a trainer is attached.

        Raises:
            ValueError: If the folder holds anything but a saved model.
        """
        if isinstance(self.student, PreTrainedModel):
            options: dict[str, Any] = {"tokenizer": tokenizer, "trainer": self._trainer}
            return save_model_folder(path, self.student, self.card_text, **options)
        tensors = {name: tensor.detach().cpu() for name, tensor in self.student.state_dict().items()}
        return save_model_file(path, partial(torch.save, tensors), trainer=self._trainer)

    def save_pretrained(self, folder: str | Path, *, tokenizer: Any = None) -> None:
        """Write a transformers student as `export` does, for `from_pretrained`.

        Raises:
            ValueError: If the student is of another kind, or the folder holds anything but a saved model.
        """
        if not isinstance(self.student, PreTrainedModel):
            raise ValueError(
                f"Expected a student of transformers for a folder, but got {type(self.student).__name__}. Use"
                " `export(path)`, which writes a file for `load_state_dict`."
            )
        self.export(folder, tokenizer=tokenizer)


def _judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy (N,) of each sample, and 1 where its most likely class is right."""
    nll = F.cross_entropy(at_least_float32(logits), targets, reduction="none")
    return nll, (logits.argmax(-1) == targets).float()
