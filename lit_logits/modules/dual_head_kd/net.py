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

    A step passes its distillation term to `keep_apart` and returns any loss that is made of it and of other terms;
    `collect` differentiates both parts of that loss. Both gradients are means over ranks before that of the
    distillation gives up what opposes the other.

    Args:
        mode: parameters over which the conflict is judged and ended: of the `backbone`, `all`, or `none`, where the
            two gradients are just added.

    Raises:
        ValueError: for another mode.
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
        """Whether the angle of the two gradients is asked for and not yet taken; ask by `measure_next_step`."""
        return self._measuring

    def measure_next_step(self) -> None:
        """Take the angle of the two gradients over the optimizer step to come, also where they are not aligned.

        The next `join` ends it. It costs a backward pass a micro-batch; the update stays the same.
        """
        self._measuring = True

    def keep_apart(self, kd: Tensor) -> None:
        """Name a term of the loss to come as distillation; its weight in the loss is found by `collect`.

        Args:
            kd: the scalar that goes into the loss, with its graph (one without is left out); not one that is made of
                another term that was kept apart, whose share would count twice.
        """
        if self.is_active and kd.requires_grad:
            self._terms.append(kd)

    def collect(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        """Add the gradients of the terms of `loss` that were kept apart and of all the rest: two backward passes.

        What was done to the terms since, such as weighting, loss scaling and division by the number of micro-batches,
        is done to both. A term that is not in this loss counts for nothing; one pass is enough where none is. No hook
        of DDP is called: gradients stay this rank's own until `join`.

        Raises:
            ValueError: where gradients are to be aligned and no term was kept apart.
        """
        terms, self._terms = self._terms, []
        if self.mode != "none" and not terms:
            raise ValueError(
                f"Expected a step with grad_align={self.mode!r} to return a loss made of the terms that `losses(batch)`"
                " gives, or of one that it passes to `aligner.keep_apart`, but it named no distillation term."
            )
        weights = torch.autograd.grad(loss, terms, retain_graph=True, allow_unused=True) if terms else ()
        parts = [w * term for w, term in zip(weights, terms, strict=True) if w is not None]
        kd = torch.stack(parts).sum() if parts else None
        rest = loss if kd is None else loss - kd  # what comes back to the terms is exactly 0
        passes = [_gradients(rest, parameters, keep=kd is not None), _gradients(kd, parameters)]
        if self._collected is not None:
            passes = [
                [_add(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(self._collected, passes, strict=True)
            ]
        self._collected = (passes[0], passes[1])

    def reset(self) -> None:
        """Forget what was collected: a training that stopped between two micro-batches would reach into the next."""
        self._collected, self._terms, self._measuring = None, [], False

    def join(self, parameters: Sequence[nn.Parameter], heads: set[nn.Parameter]) -> AlignedGradients | None:
        """Write the aligned sum to `.grad` of the parameters; None if nothing was collected.

        The cosine is NaN where no distillation term was in the loss of any rank. A parameter that neither term reaches
        keeps the `.grad` it has, as after a plain backward: with zeros there, an optimizer would decay its weights.
        """
        collected, self._collected, self._measuring = self._collected, None, False
        if collected is None:
            return None
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
    """One backward pass; `keep` the graph for another. None for each parameter that the loss does not reach."""
    if loss is None:
        return [None] * len(parameters)
    return list(torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True))


def _halves(flags: list[bool]) -> tuple[list[bool], list[bool]]:
    return flags[: len(flags) // 2], flags[len(flags) // 2 :]


def _filled(grads: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Zeros where a term does not reach a parameter."""
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)]
