"""The student of dual-head distillation: any classifier with an auxiliary head on its features, and its two gradients.

Letters: B batch, T sequence, C classes, d features.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lit_logits.functional.gradients import AlignedGradients, align_gradients, any_over_ranks, average_over_ranks
from lit_logits.modules.dual_head_kd.classifiers import classifier_logits, find_classifier, is_causal_lm, tap_features
from lit_logits.modules.language_models.loading import check_plain_causal_lm

__all__ = ["AuxHeadKind", "AuxiliaryHead", "DualHeadClassifier", "DualHeadOutput", "GradAlign", "GradientAligner"]

AuxHeadKind = Literal["linear", "nonlinear"]
GradAlign = Literal["none", "backbone", "all"]


class AuxiliaryHead(nn.Module):
    """Second head [0], which learns from the teacher and is dropped at export.

    Args:
        num_features: d.
        num_classes: C.
        kind: `linear`, where teacher and student are of one family of architectures; else `nonlinear`, which is
            Linear(d → 200) · Dropout(0.1) · BatchNorm · ReLU · Linear(200 → C).

    Raises:
        ValueError: for another kind.

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
        self.trunk: nn.Module = nn.Identity()
        if kind == "nonlinear":
            self.trunk = nn.Sequential(nn.Linear(num_features, 200), nn.Dropout(0.1), nn.BatchNorm1d(200), nn.ReLU())
        self.classifier = nn.Linear(num_features if kind == "linear" else 200, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (..., C) of features (..., d)."""
        return self.classifier(self.hidden(features))

    def hidden(self, features: Tensor) -> Tensor:
        """Input of the last layer. Of a single row there is no batch statistic, so the running ones serve it."""
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
    """A student as it is, with an auxiliary head that taps the input of its last linear layer.

    Args:
        student: classifier or causal language model; its class and its names stay its own.
        num_classes: C, where it helps to find the layer.
        classifier: dotted name of that layer; default `find_classifier`.
        aux_head: kind of the auxiliary head, or None.

    Raises:
        ValueError: if the layer is not found, or is not the last.

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
        self.student = student
        self.classifier_name = find_classifier(student, classifier, num_classes=num_classes)
        self.is_causal_lm = is_causal_lm(student)
        if self.is_causal_lm:
            check_plain_causal_lm(student)
        main = self.main_head
        self.num_features, self.num_classes = main.in_features, main.out_features
        self.aux_head = None
        if aux_head is not None:
            self.aux_head = AuxiliaryHead(self.num_features, self.num_classes, aux_head)
            self.aux_head.to(main.weight.device, main.weight.dtype)

    @property
    def main_head(self) -> nn.Linear:
        """The student's own last layer."""
        return self.student.get_submodule(self.classifier_name)  # type: ignore[return-value]

    def forward(self, inputs: Mapping[str, Tensor]) -> DualHeadOutput:
        """Logits of both heads and the features, for the batch without its labels."""
        with tap_features(self.main_head) as calls:
            logits = classifier_logits(self.student, inputs)
        if not calls:
            raise ValueError(
                f"Expected the layer `{self.classifier_name}` to give the logits of {type(self.student).__name__}, but"
                " its forward does not call it. Pass another `classifier`."
            )
        features = self._pooled(*calls[-1], logits)
        return DualHeadOutput(logits, None if self.aux_head is None else self.aux_head(features), features)

    def hidden_states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Of a causal language model: the (B, T, d) input of its output layer."""
        return self.student.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[operator]

    def head_parameters(self) -> set[nn.Parameter]:
        """Parameters of both heads, a tied input embedding among them; every other one belongs to the backbone."""
        aux = set() if self.aux_head is None else set(self.aux_head.parameters())
        return set(self.main_head.parameters()) | aux

    def _pooled(self, features: Tensor, outputs: Tensor, logits: Tensor) -> Tensor:
        """Features (B, d) behind logits (B, C): a decoder that classifies scores every position and picks one."""
        if outputs.dim() == 3 and logits.dim() == 2:
            same = (outputs == logits.unsqueeze(1)) | (outputs.isnan() & logits.isnan().unsqueeze(1))
            picked = same.all(-1)
            if bool(picked.any(1).all()):
                return features[torch.arange(len(features), device=features.device), picked.int().argmax(1)]
        if features.shape[:-1] != logits.shape[:-1] or outputs.shape != logits.shape:
            raise ValueError(
                f"Expected the layer `{self.classifier_name}` to give the logits {tuple(logits.shape)} of"
                f" {type(self.student).__name__}, but it gives {tuple(outputs.shape)}. Pass another `classifier`."
            )
        return features


class GradientAligner(nn.Module):
    """Collects the gradients of two losses over micro-batches and joins them when the optimizer steps.

    Both are means over ranks before the distillation gradient gives up what opposes the cross-entropy's.

    Args:
        mode: parameters over which the conflict is judged and ended: of the `backbone`, `all`, or `none`, where the
            two gradients are just added.

    Attributes:
        measuring: with `none`, collect the two gradients all the same, for their angle.

    Raises:
        ValueError: for another mode.

    """

    def __init__(self, mode: GradAlign = "none") -> None:
        super().__init__()
        if mode not in ("none", "backbone", "all"):
            raise ValueError(f"Expected `grad_align` to be 'none', 'backbone' or 'all', but got {mode!r}.")
        self.mode, self.measuring = mode, False
        self._collected: tuple[list[Tensor | None], list[Tensor | None]] | None = None

    @property
    def is_active(self) -> bool:
        """Whether backward has to keep the two gradients apart."""
        return self.mode != "none" or self.measuring

    def collect(self, loss: Tensor, kd: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Add the gradients of the term `kd` of `loss` and of all the rest: two backward passes in place of one.

        What was done to `loss` since, such as scaling and division by the number of micro-batches, is done to both. No
        hook of DDP is called: gradients stay this rank's own until `join`.
        """
        (scale,) = torch.autograd.grad(loss, kd, retain_graph=True)
        rest = loss - scale * kd  # what comes back to `kd` is exactly 0
        passes: list[list[Tensor | None]] = []
        for term, keep in ((rest, True), (scale * kd, False)):
            passes.append(list(torch.autograd.grad(term, parameters, retain_graph=keep, allow_unused=True)))
        if self._collected is not None:
            passes = [
                [_add(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(self._collected, passes, strict=True)
            ]
        self._collected = (passes[0], passes[1])

    def reset(self) -> None:
        """Forget what was collected: a training that stopped between two micro-batches would reach into the next."""
        self._collected = None

    def join(self, parameters: Sequence[nn.Parameter], heads: set[nn.Parameter]) -> AlignedGradients | None:
        """Write the aligned sum to `.grad` of the parameters; None if nothing was collected.

        A parameter that neither term reaches keeps the `.grad` it has, as after a plain backward: with zeros there, an
        optimizer would decay its weights.
        """
        if self._collected is None:
            return None
        collected, self._collected = self._collected, None
        reached = any_over_ranks(
            [a is not None or b is not None for a, b in zip(*collected, strict=True)], parameters[0].device
        )
        references, grads = (average_over_ranks(_filled(part, parameters)) for part in collected)
        chosen = [i for i, parameter in enumerate(parameters) if self.mode == "all" or parameter not in heads]
        result = align_gradients([grads[i] for i in chosen], [references[i] for i in chosen])
        if self.mode != "none":
            for i, aligned in zip(chosen, result.grads, strict=True):
                grads[i] = aligned
        for i, parameter in enumerate(parameters):
            if reached[i]:
                parameter.grad = references[i] + grads[i]
        return result


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _filled(grads: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Zeros where a term does not reach a parameter."""
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)]
