"""A frozen teacher, and the loading of weights under whatever names.

Letters: B batch, T sequence, C classes, d features.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_logits.modules.dual_head_kd.classifiers import (
    MODEL_ZOO,
    class_names_of,
    classifier_logits,
    is_causal_lm,
    load_classifier,
)
from lit_logits.modules.dual_head_kd.weights import read_weights, with_metadata
from lit_logits.modules.language_models.frozen import FrozenModels
from lit_logits.modules.language_models.loading import check_plain_causal_lm
from lit_logits.modules.language_models.probes import OutputRule

__all__ = ["FrozenTeacher", "load_teacher", "load_weights"]


class FrozenTeacher(FrozenModels):
    """A classifier or causal language model that is held out of training and gives its logits.

    Args:
        model: frozen in place.
        output_rule: how a causal language model makes logits of its last hidden states.
        class_names: of its C classes, if it tells them.

    Example:
        >>> teacher = FrozenTeacher(nn.Linear(4, 3)).train()
        >>> len(list(teacher.parameters())), teacher.model.training, teacher({"x": torch.zeros(2, 4)}).shape
        (0, False, torch.Size([2, 3]))
    """

    def __init__(
        self, model: nn.Module, output_rule: OutputRule | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__(model)
        self.output_rule = output_rule or OutputRule()
        self.class_names, self.digest = class_names, _weights_digest(model)
        self._unchecked = True

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.models[0]

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return logits (B, C), without a graph. The inputs take the dtype of the model.

        Raises:
            ValueError: If the first batch gets probabilities.
        """
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        logits = classifier_logits(self.model, cast)
        if self._unchecked:  # once: the host waits for the device
            self._unchecked = False
            _check_not_probabilities(logits, type(self.model).__name__)
        return logits

    @torch.no_grad()
    def hidden_states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the input (B, T, d) of a causal language model's output layer."""
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[operator]

    def output_logits(self, hidden: Tensor) -> Tensor:
        """Return a causal language model's logits (..., C) of the input (..., d) of its output layer."""
        return self.output_rule.logits(self.model.get_output_embeddings(), hidden)  # type: ignore[operator]


def load_teacher(
    teacher: nn.Module | str | dict[str, Any] | Path,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
) -> FrozenTeacher:
    """Make a teacher and load its weights.

    Args:
        teacher: as for `load_classifier`.
        checkpoint: file for `load_weights`; a model of random weights needs one.
        num_classes: C of a model that is made here.

    Raises:
        ValueError: If the model would keep random weights, or the file does not fit.
    """
    new = isinstance(teacher, dict) or (isinstance(teacher, str) and teacher in MODEL_ZOO)
    if new and checkpoint is None:
        raise ValueError(
            f"Expected `teacher_checkpoint` for the teacher {teacher!r}, which would have random weights. Train one"
            " with `method: ce` and pass its last.ckpt."
        )
    model = load_classifier(teacher, num_classes)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    if is_causal_lm(model):
        return FrozenTeacher(model, check_plain_causal_lm(model))
    return FrozenTeacher(model, class_names=class_names_of(model, teacher))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a model's weights from a Lightning checkpoint or a `state_dict` file, whatever prefix its names have.

    Names may have any common prefix (`module.` of DDP, `net.student.` of a Lightning module). Under the prefix the file
    must hold all of the model's tensors and no others.

    Raises:
        ValueError: If the file is of another architecture or class count; the error names the first differences.
    """
    weights = read_weights(path)
    inner: nn.Module = getattr(model, "_orig_mod", model)  # inside the wrapper of `torch.compile`
    state = inner.state_dict()
    own = _without_counters(state)
    owner = type(inner).__name__
    reasons = [
        f"it has {len(weights)} tensors such as {_shapes(weights)}, {owner} has {len(own)} such as {_shapes(own)}"
    ]
    for prefix in _prefixes(next(iter(own), None), weights):
        named = {key[len(prefix) :]: tensor for key, tensor in weights.items() if key.startswith(prefix)}
        tensors = _without_counters(named)
        differences = _differences(own, tensors)
        if not differences:
            told = _metadata_under(prefix, getattr(weights, "_metadata", {})) or state._metadata  # type: ignore[attr-defined]
            # Not strict, because of the counters that are left out.
            inner.load_state_dict(with_metadata(tensors, told), strict=False)
            return
        reasons += differences
    raise ValueError(
        f"Expected {str(path)!r} to hold the weights of this {owner}, but they are of another architecture or number"
        f" of classes: {'; '.join(reasons)}. Pass the model that the file was saved from."
    )


def _metadata_under(prefix: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a module whose name, with a dot, is `prefix`."""
    return {key[len(prefix) :]: value for key, value in metadata.items() if f"{key}.".startswith(prefix)}


def _weights_digest(model: nn.Module, most: int = 64) -> str:
    """Return a digest of the names, shapes and some values of all tensors; training changes some of each."""
    digest = hashlib.sha256()
    for name, tensor in getattr(model, "_orig_mod", model).state_dict().items():  # inside of `torch.compile`
        if isinstance(tensor, Tensor):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            if not tensor.is_meta:
                flat = tensor.detach().flatten()
                values = flat[:: max(1, -(-len(flat) // most))]
                digest.update(str(values.double().tolist()).encode())
    return digest.hexdigest()


def _check_not_probabilities(logits: Tensor, owner: str) -> None:
    sums = logits.float().sum(-1)
    if logits.shape[-1] > 1 and bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all()):
        raise ValueError(
            f"Expected logits of the teacher {owner}, but got probabilities: rows of no negative numbers that sum to 1."
            " Take the softmax at its end off."
        )


def _without_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors but the counters of batch normalisation, which old files lack and frozen models ignore."""
    return {key: tensor for key, tensor in tensors.items() if not key.endswith("num_batches_tracked")}


def _prefixes(key: str | None, weights: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes, shortest first, under which `weights` has the model's tensor `key`."""
    if key is None:
        return []
    return sorted({name[: -len(key)] for name in weights if name == key or name.endswith(f".{key}")}, key=len)


def _differences(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return in words how tensors differ from a model's own in shapes and names; nothing if they fit."""
    wrong = {key: tensors[key] for key in own if key in tensors and tensors[key].shape != own[key].shape}
    missing, extra = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    found = []
    if wrong:
        first = next(iter(wrong))
        reason = f"`{first}` is {tuple(wrong[first].shape)} there and {tuple(own[first].shape)} here"
        found.append(f"{reason} ({len(wrong)} of {len(own)} tensors differ in shape)")
    if missing:
        found.append(f"{len(missing)} tensors such as `{min(missing)}` are missing")
    if extra:
        found.append(f"it has {len(extra)} more, such as `{min(extra)}`")
    return found


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"`{key}` {tuple(tensor.shape)}" for key, tensor in list(tensors.items())[:2])
