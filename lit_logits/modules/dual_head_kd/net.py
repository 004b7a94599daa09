"""The student of dual-head distillation: a classifier with an auxiliary head on its features, and the two gradients.

Letters: B batch, T sequence, C classes, d features.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_logits.functional.gradients import AlignedGradients, align_gradients, any_over_ranks, average_over_ranks
from lit_logits.modules.dual_head_kd.classifiers import (
    HeadCall,
    check_not_compiled,
    classifier_logits,
    find_classifier,
    is_causal_lm,
    tap_features,
)
from lit_logits.modules.language_models.loading import check_plain_causal_lm, check_trainable
from lit_logits.modules.language_models.probes import OutputRule

__all__ = ["AuxHeadKind", "AuxiliaryHead", "DualHeadClassifier", "DualHeadOutput", "GradAlign", "GradientAligner"]

AuxHeadKind = Literal["linear", "nonlinear"]
GradAlign = Literal["none", "backbone", "all"]


class AuxiliaryHead(nn.Module):
    """Second head [0], which learns from the teacher and is left out at export.

    Args:
        num_features: d.
        num_classes: C.
        kind: `linear`, if teacher and student are of one family of architectures; else `nonlinear`, which is
            Linear(d → 200) · Dropout(0.1) · BatchNorm · ReLU · Linear(200 → C).

    Raises:
        ValueError: If the kind is unknown.

    References:
        [0]: Dual-Head Knowledge Distillation, 2024, arXiv 2411.08937.

    Example:
        >>> AuxiliaryHead(64, 10, "nonlinear")(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_features: int, num_classes: int, kind: AuxHeadKind = "linear") -> None:
        super().__init__()
        if kind not in ("linear", "nonlinear"):
            raise ValueError(f"Expected `kind` to be 'linear' or 'nonlinear', but got {kind!r}.")
        self.kind = kind
        self.trunk: nn.Module = nn.Identity()
        if kind == "nonlinear":
            self.trunk = nn.Sequential(nn.Linear(num_features, 200), nn.Dropout(0.1), nn.BatchNorm1d(200), nn.ReLU())
        self.classifier = nn.Linear(num_features if kind == "linear" else 200, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (..., C) of features (..., d)."""
        return self.classifier(self.hidden(features))

    def hidden(self, features: Tensor) -> Tensor:
        """Return the input of the last layer."""
        # A single row, such as the last batch may have, has no variance: batch normalisation takes its running one.
        if not self.training or len(features) > 1:
            return self.trunk(features)
        self.trunk.eval()
        try:
            return self.trunk(features)
        finally:
            self.trunk.train()


class DualHeadOutput(NamedTuple):
    """Result of `DualHeadClassifier`.

    Attributes:
        logits: (B, C) of the main head.
        aux_logits: (B, C) of the auxiliary head, or None without one.
        features: (B, d), the input of the main head.
    """

    logits: Tensor
    aux_logits: Tensor | None
    features: Tensor


class DualHeadClassifier(nn.Module):
    """A student, unchanged, with an auxiliary head that reads the input of its last linear layer.

    Args:
        student: classifier or causal language model; class and parameter names stay its own.
        num_classes: C, which helps to find the layer.
        classifier: dotted name of that layer; default the one that `find_classifier` finds.
        aux_head: kind of the auxiliary head, or None.

    Raises:
        ValueError: If the layer is not found, or is not the last.

    Example:
        >>> net = DualHeadClassifier(nn.Linear(4, 3), aux_head="linear")
        >>> net({"pixel_values": torch.zeros(2, 4)}).aux_logits.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        num_classes: int | None = None,
        classifier: str | None = None,
        aux_head: AuxHeadKind | None = None,
    ) -> None:
        super().__init__()
        check_not_compiled(student)
        self.student = student
        self.classifier_name = find_classifier(student, classifier, num_classes=num_classes)
        self.is_causal_lm = is_causal_lm(student)
        self.output_rule = OutputRule()
        if self.is_causal_lm:
            self.output_rule = check_plain_causal_lm(student)
            check_trainable(student.config)
        main = self.main_head
        self.num_features, self.num_classes = main.in_features, main.out_features
        self._unchecked = {True, False}  # by `training`
        self.aux_head = None
        if aux_head is not None:
            self.aux_head = AuxiliaryHead(self.num_features, self.num_classes, aux_head)
            self.aux_head.to(main.weight.device, main.weight.dtype)

    @property
    def main_head(self) -> nn.Linear:
        """The student's own last layer."""
        return self.student.get_submodule(self.classifier_name)  # type: ignore[return-value]

    def forward(self, inputs: Mapping[str, Tensor]) -> DualHeadOutput:
        """Return the logits of both heads and the features, for a batch without its labels."""
        with tap_features(self.main_head) as calls:
            logits = classifier_logits(self.student, inputs)
        if not calls:
            raise ValueError(
                f"Expected the layer `{self.classifier_name}` to give the logits of {type(self.student).__name__}, but"
                " its forward does not call it. Pass another `classifier`."
            )
        features = self._pooled(calls[-1], logits)
        return DualHeadOutput(logits, None if self.aux_head is None else self.aux_head(features), features)

    def check_next_call(self) -> None:
        """Compare the student's output with that of its last layer in the next call, in training and in evaluation.

        The first call of each kind is compared anyway. A learned scale that starts at 1 shows only after a step.
        """
        self._unchecked = {True, False}

    def hidden_states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the input (B, T, d) of a causal language model's output layer."""
        return self.student.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[operator]

    def main_logits(self, hidden: Tensor) -> Tensor:
        """Return a causal language model's logits (..., C) of the input (..., d) of its output layer."""
        return self.output_rule.logits(self.main_head, hidden)

    def head_parameters(self) -> set[nn.Parameter]:
        """Return the parameters of both heads, a tied input embedding among them; all others are the backbone's."""
        aux = set() if self.aux_head is None else set(self.aux_head.parameters())
        return set(self.main_head.parameters()) | aux

    def _pooled(self, call: HeadCall, logits: Tensor) -> Tensor:
        """Return the features (B, d) that gave the logits (B, C).

        A decoder-based classifier scores every position and returns one; find which.
        """
        features, outputs, _ = call
        if outputs.dim() == 3 and logits.dim() == 2:
            # By value: no interface tells which position it took, and models choose it by padding in different ways.
            same = (outputs == logits.unsqueeze(1)) | (outputs.isnan() & logits.isnan().unsqueeze(1))
            picked = same.all(-1)
            if bool(picked.any(1).all()):
                return features[torch.arange(len(features), device=features.device), picked.int().argmax(1)]
        if features.shape[:-1] != logits.shape[:-1] or outputs.shape != logits.shape:
            raise ValueError(
                f"Expected the layer `{self.classifier_name}` to give the logits {tuple(logits.shape)} of"
                f" {type(self.student).__name__}, but it gives {tuple(outputs.shape)}. Pass another `classifier`."
            )
        if self.student.training in self._unchecked:
            self._unchecked.remove(self.student.training)
            self._check_unchanged(call, logits)
        return features

    def _check_unchanged(self, call: HeadCall, logits: Tensor) -> None:
        if not call.gave(logits):
            raise ValueError(
                f"Expected {type(self.student).__name__} to return what its layer `{self.classifier_name}` gives, but"
                " it returns other values of that shape. Take off what changes the logits behind the layer (a softmax,"
                " a scale, a mean of several heads), and let a model of several outputs return the logits first."
            )


class GradientAligner(nn.Module):
    """Gradients of two parts of a loss, collected over micro-batches and joined when the optimizer steps.

    A step passes its distillation term to `keep_apart` and returns any loss that is made of it and of other terms.
    `collect` differentiates both parts of that loss. `join` averages both gradients over ranks and then removes from
    the distillation gradient what opposes the other.

    Args:
        mode: parameters over which the two gradients are compared and aligned: of the `backbone`, or `all`; with
            `none` they are just added.

    Raises:
        ValueError: If the mode is unknown.
    """

    def __init__(self, mode: GradAlign = "none") -> None:
        super().__init__()
        if mode not in ("none", "backbone", "all"):
            raise ValueError(f"Expected `grad_align` to be 'none', 'backbone' or 'all', but got {mode!r}.")
        self.mode = mode
        self._measuring = False
        self._terms: list[Tensor] = []
        self._collected: tuple[list[Tensor | None], list[Tensor | None]] | None = None

    @property
    def is_active(self) -> bool:
        """Whether backward has to keep the two gradients apart."""
        return self.mode != "none" or self._measuring

    @property
    def measuring(self) -> bool:
        """Whether `measure_next_step` has asked for the angle of the two gradients and no step has come since."""
        return self._measuring

    def measure_next_step(self) -> None:
        """Measure the angle of the two gradients over the next optimizer step, even if they are not aligned.

        The next `join` ends it. It costs another backward pass for each micro-batch; the update stays the same.
        """
        self._measuring = True

    def keep_apart(self, kd: Tensor) -> None:
        """Mark a term of the coming loss as distillation; `collect` finds its weight in the loss.

        Args:
            kd: the scalar that goes into the loss, with its graph (one without is ignored). It must not be made of
                another term that was kept apart, which would count twice.
        """
        if self.is_active and kd.requires_grad:
            self._terms.append(kd)

    def collect(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Differentiate the marked terms of `loss` and the rest, in two backward passes, and add up the gradients.

        Weighting, loss scaling and division by the number of micro-batches apply to both parts. A marked term that is
        not in this loss is ignored; if none is in it, one pass is enough. DDP's hooks are not called: gradients stay
        this rank's own until `join`.

        Raises:
            ValueError: If gradients are to be aligned and no term was marked.
        """
        terms, self._terms = self._terms, []
        if self.mode != "none" and not terms:
            raise ValueError(
                f"Expected a step with grad_align={self.mode!r} to return a loss made of the terms that `losses(batch)`"
                " gives, or of one that it passes to `aligner.keep_apart`, but it named no distillation term."
            )
        # The derivative of the loss by a term is the weight of that term in it, with every factor that has been applied
        # since: the module's weight, 1 / micro-batches, the loss scale. `torch.autograd.grad` leaves `.grad` alone and
        # does not reach the hooks by which DDP would start to reduce an unfinished gradient.
        weights = torch.autograd.grad(loss, terms, retain_graph=True, allow_unused=True) if terms else ()
        parts = [w * term for w, term in zip(weights, terms, strict=True) if w is not None]
        kd = torch.stack(parts).sum() if parts else None
        # In the rest, the gradient that reaches each term is its weight minus its weight: exactly 0.
        rest = loss if kd is None else loss - kd
        passes = [_gradients(rest, parameters, keep=kd is not None), _gradients(kd, parameters)]
        # Two sums over micro-batches, kept apart to the end: to align each micro-batch would give another result,
        # because projection is not linear.
        if self._collected is not None:
            passes = [
                [_add(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(self._collected, passes, strict=True)
            ]
        self._collected = (passes[0], passes[1])

    def reset(self) -> None:
        """Forget what was collected, so that a fit that stopped between micro-batches does not reach into the next."""
        self._collected, self._terms, self._measuring = None, [], False

    def join(self, parameters: Sequence[nn.Parameter], heads: set[nn.Parameter]) -> AlignedGradients | None:
        """Write the sum of both gradients, aligned by the mode, to `.grad`; return None if nothing was collected.

        The cosine is NaN if no distillation term was in the loss of any rank. A parameter that neither term reaches
        keeps its `.grad`, as after a plain backward: with zeros there, an optimizer would decay its weights.
        """
        collected, self._collected, self._measuring = self._collected, None, False
        if collected is None:
            return None
        # In the place of DDP's reduction. A parameter that any rank reaches gets a gradient on all of them, else the
        # ranks' weights would drift apart. The loss scale is still in both gradients; it cancels in the projection.
        has_grad = [grad is not None for part in collected for grad in part]
        by_rest, by_kd = _halves(any_over_ranks(has_grad, parameters[0].device))
        references, grads = (average_over_ranks(_filled(part, parameters)) for part in collected)
        chosen = [i for i, parameter in enumerate(parameters) if self.mode == "all" or parameter not in heads]
        result = align_gradients([grads[i] for i in chosen], [references[i] for i in chosen])
        if self.mode != "none":
            for i, aligned in zip(chosen, result.grads, strict=True):
                grads[i] = aligned
        for i, parameter in enumerate(parameters):
            if by_rest[i] or by_kd[i]:
                parameter.grad = references[i] + grads[i]
        return result if any(by_kd) else result._replace(cosine=torch.full_like(result.cosine, torch.nan))


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _gradients(loss: Tensor | None, parameters: Sequence[nn.Parameter], keep: bool = False) -> list[Tensor | None]:
    """Return the gradients of one backward pass, None where the loss does not reach; `keep` the graph for another."""
    if loss is None:
        return [None] * len(parameters)
    return list(torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True))


def _halves(flags: list[bool]) -> tuple[list[bool], list[bool]]:
    return flags[: len(flags) // 2], flags[len(flags) // 2 :]


def _filled(grads: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the gradients with zeros in place of None."""
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)]
