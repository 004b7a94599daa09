"""`NeuralCollapseMonitor`: how far a classifier has collapsed to the simplex, as scalars and a picture.

Letters: B batch, d features, C classes.
"""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_logits.callbacks.classifier_outputs import ClassifierOutputs
from lit_logits.callbacks.loggers import picture_writers
from lit_logits.callbacks.parts import (
    find_part,
    find_parts,
    shown_class_names,
    trained_so_far,
)
from lit_logits.callbacks.pictures.collapse import cosine_figure
from lit_logits.functional.distributed import all_reduce_sum_
from lit_logits.functional.neural_collapse import (
    ClassMoments,
    class_moments,
    cosine_matrix,
    neural_collapse,
    relative_spread,
    simplex_gap,
)
from lit_logits.modules.dual_head_kd.batches import labels_of
from lit_logits.modules.dual_head_kd.net import DualHeadClassifier, GradientAligner

__all__ = ["NeuralCollapseMonitor"]


class NeuralCollapseMonitor(Callback):
    """Log how far features and head of a `DualHeadClassifier` are from the simplex; a healthy training ends near 0.

    Logged after each validation and test, over all samples of all ranks and data loaders: `nc/nc1`, `nc/nc2` (angles
    of the head's rows), `nc/nc2_norm_rows`, `nc/nc2_angle_means`, `nc/nc2_norm_means`, `nc/nc3`, see `NeuralCollapse`.
    With an auxiliary head also `nc_aux/nc2` and `nc_aux/nc2_norm_rows`, of its last layer. TensorBoard gets
    `nc/cosines`, the cosines between the head's rows, and `nc_aux/cosines`. If the two losses conflict, the rows crowd
    together: cosines move towards 1 and `nc/nc2` grows. The features are those that the model computes anyway; training
    steps cost nothing.

    If gradients are not aligned (`grad_align="none"`), the measured steps also log `kd/grad_cosine` and `kd/conflict`
    of the two losses over the backbone, at the price of one more backward pass; the update stays the same. A step whose
    loss has no distillation term logs neither.

    Args:
        measure_gradients_every_n_steps: optimizer steps between measured ones, the first included; None measures none.

    Raises:
        ValueError: If an argument is out of range, or DDP has static_graph=True and gradients are to be measured.

    Example:
        >>> NeuralCollapseMonitor(measure_gradients_every_n_steps=100).measure_gradients_every_n_steps
        100
    """

    def __init__(self, measure_gradients_every_n_steps: int | None = None) -> None:
        if measure_gradients_every_n_steps is not None and measure_gradients_every_n_steps < 1:
            raise ValueError(
                "Expected `measure_gradients_every_n_steps` to be at least 1 or None, but got"
                f" {measure_gradients_every_n_steps}."
            )
        self.measure_gradients_every_n_steps = measure_gradients_every_n_steps
        self._moments: ClassMoments | None = None
        self._outputs = ClassifierOutputs()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn if the model has no classifier to watch, and check that its gradients can be measured."""
        if self.measure_gradients_every_n_steps and getattr(trainer.strategy, "_ddp_kwargs", {}).get("static_graph"):
            raise ValueError(
                "Expected `measure_gradients_every_n_steps` to be None with the DDP option static_graph=True, whose"
                " first steps must not differ from the others."
            )
        net = find_part(pl_module, DualHeadClassifier)
        if net is None:
            rank_zero_warn("NeuralCollapseMonitor found no DualHeadClassifier in the model and will do nothing.")
        elif net.is_causal_lm:
            rank_zero_warn(
                "NeuralCollapseMonitor will do nothing: the classes of a causal language model are its vocabulary,"
                " whose features do not collapse to one mean a class."
            )

    # ------------------------------------------------------------------ gradients

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Ask the aligner for the angle if this optimizer step is due, at each of its micro-batches."""
        if self.measure_gradients_every_n_steps is not None and _classifier(pl_module) is not None:
            step = trainer.global_step + 1
            if step == 1 or step % self.measure_gradients_every_n_steps == 0:
                for aligner in find_parts(pl_module, GradientAligner):
                    aligner.measure_next_step()

    # ------------------------------------------------------------------ features

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect features from now on."""
        self._collect(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Add the batch to the moments."""
        self._add(args[0])

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect features from now on."""
        self._collect(trainer, pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Add the batch to the moments."""
        self._add(args[0])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and draw."""
        self._log(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and draw."""
        self._log(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hook, and what the aligner was asked for."""
        self._clean_up(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hook, and what the aligner was asked for if training stopped between two micro-batches."""
        self._clean_up(pl_module)

    def _collect(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        net = _classifier(pl_module)
        if net is not None and not trainer.sanity_checking:
            # Sums are float64, which Apple's GPU lacks. Each rank makes them, as all take part in the reduction, also
            # one that gets no batch.
            device = torch.device("cpu") if pl_module.device.type == "mps" else pl_module.device
            features = torch.zeros(0, net.num_features, device=device)
            self._moments = class_moments(features, features.new_zeros(0, dtype=torch.long), net.num_classes)
            self._outputs.start(net)

    def _add(self, batch: Any) -> None:
        """Add the features of the last call in this batch to the moments."""
        output, labels = self._outputs.take(), labels_of(batch)
        if self._moments is None or output is None or labels is None or labels.shape != output.features.shape[:1]:
            return
        features = output.features
        counts = self._moments.counts
        part = class_moments(features.to(counts.device), labels.to(counts.device).long(), len(counts))
        for total, more in zip(self._moments, part, strict=True):
            total += more

    def _clean_up(self, pl_module: LightningModule) -> None:
        self._stop()
        for aligner in find_parts(pl_module, GradientAligner):
            aligner.reset()

    def _stop(self) -> None:
        self._outputs.stop()
        self._moments = None

    # ------------------------------------------------------------------ figures

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        moments, net = self._moments, _classifier(pl_module)
        self._stop()
        if moments is None or net is None:
            return
        for tensor in moments:
            all_reduce_sum_(tensor)
        weight = net.main_head.weight.detach().to(moments.sums)
        result, seen = neural_collapse(moments, weight), moments.counts > 0
        values = {
            "nc/nc1": result.nc1,
            "nc/nc2": result.nc2_angle_rows,
            "nc/nc2_norm_rows": result.nc2_norm_rows,
            "nc/nc2_angle_means": result.nc2_angle_means,
            "nc/nc2_norm_means": result.nc2_norm_means,
            "nc/nc3": result.nc3,
        }
        num_seen = int(seen.sum())
        if num_seen < 2:
            rank_zero_warn(
                f"NeuralCollapseMonitor needs labelled features of at least two classes, but met {num_seen}. It reads"
                " batches with `labels` of shape (B,), and what the DualHeadClassifier returns for them."
            )
        elif net.aux_head is not None:
            rows = net.aux_head.classifier.weight.detach().to(moments.sums)[seen]
            values["nc_aux/nc2"] = simplex_gap(cosine_matrix(rows))
            values["nc_aux/nc2_norm_rows"] = relative_spread(rows)
        values = {name: value.float() for name, value in values.items()}
        pl_module.log_dict(values, sync_dist=True)  # equal on all ranks; `sync_dist` only keeps Lightning from warning
        if trainer.is_global_zero and num_seen > 1:
            self._draw(trainer, "nc/cosines", cosine_matrix(weight[seen]).cpu(), seen.cpu())
            if net.aux_head is not None:
                rows = net.aux_head.classifier.weight.detach().to(moments.sums)[seen]
                self._draw(trainer, "nc_aux/cosines", cosine_matrix(rows).cpu(), seen.cpu())

    def _draw(self, trainer: Trainer, tag: str, cosines: Tensor, seen: Tensor) -> None:
        names = shown_class_names(trainer, len(seen))
        shown = [name for name, is_seen in zip(names, seen.tolist(), strict=True) if is_seen]
        epoch, step = trained_so_far(trainer)
        for writer in picture_writers(trainer):
            writer.add_figure(tag, cosine_figure(cosines, epoch, shown), step)


def _classifier(pl_module: LightningModule) -> DualHeadClassifier | None:
    """Return the part to watch, or None if its classes are a vocabulary."""
    net = find_part(pl_module, DualHeadClassifier)
    return None if net is None or net.is_causal_lm else net
