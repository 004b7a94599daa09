"""Batches of `DualHeadKD`: inputs and labels in the forms that data loaders give, and what a model's forward takes.

Letters: B batch, T sequence, C classes.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_logits.functional.checks import check_labels, may_read
from lit_logits.functional.labels import IGNORE_INDEX, next_token_labels

__all__ = [
    "Batch",
    "TokenTargets",
    "as_batch",
    "check_targets",
    "inputs_of",
    "labels_of",
    "taken_inputs",
    "token_targets",
]

Batch = Mapping[str, Tensor] | Sequence[Any] | Tensor

TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
"""Inputs of a causal language model; batches may hold more, such as row numbers."""
MAIN_INPUTS = ("pixel_values", "input_ids", "inputs_embeds", "input_values")
"""Inputs that a model takes by position, the most common names first."""
OTHER_LABELS = ("label", "target", "targets", "y")


class TokenTargets(NamedTuple):
    """Result of `token_targets`.

    Attributes:
        labels: (B, T), what each position predicts, or the ignored label.
        mask: boolean (B, T), the positions that count.
    """

    labels: Tensor
    mask: Tensor


def as_batch(batch: Batch, name: str = "pixel_values") -> Mapping[str, Tensor]:
    """Return a batch as a mapping of inputs and, if it has them, `labels`.

    Args:
        batch: such a mapping; `(inputs, labels)` or `(inputs,)`, where inputs are a tensor or a mapping; or a tensor.
        name: of inputs that are a tensor.

    Raises:
        TypeError: If the batch has another form.
        ValueError: If labels stand under a name that would leave them out.

    Example:
        >>> sorted(as_batch((torch.zeros(2, 4), torch.tensor([0, 1]))))
        ['labels', 'pixel_values']
    """
    if isinstance(batch, Mapping):
        other = [key for key in OTHER_LABELS if key in batch]
        if other and "labels" not in batch:
            raise ValueError(
                f"Expected the labels of a batch under `labels`, but got {sorted(batch)}. Rename {other[0]!r}; a batch"
                " without labels learns from the teacher alone."
            )
        return batch
    parts = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, tuple | list) else []
    if len(parts) not in (1, 2) or not isinstance(parts[0], Tensor | Mapping) or not isinstance(parts[-1], Tensor):
        found = f"{type(batch).__name__} of {[type(part).__name__ for part in parts]}"
        raise TypeError(
            "Expected a batch that is a mapping with inputs and `labels`, (inputs, labels) or inputs alone, but got"
            f" {found}. Let `collate_fn` make one."
        )
    inputs = dict(parts[0]) if isinstance(parts[0], Mapping) else {name: parts[0]}
    return inputs if len(parts) == 1 else {**inputs, "labels": parts[1]}


def labels_of(batch: Any) -> Tensor | None:
    """Return the labels of a batch of the forms of `as_batch`, or None where it has none."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None


def inputs_of(batch: Mapping[str, Tensor], *, is_causal_lm: bool = False) -> dict[str, Tensor]:
    """Return what a model reads: a batch without labels and numbers of its rows; for a language model its tokens."""
    if is_causal_lm:
        return {name: batch[name] for name in TOKEN_INPUTS if name in batch}
    return {name: value for name, value in batch.items() if name not in ("labels", "sample_ids")}


def taken_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the inputs that the model's forward takes, by position and by keyword.

    Others, such as row numbers, are left out. The only input of a batch goes by position, whatever its name; so does
    the main input of a forward that takes none of the names. Models of transformers are called by keyword.

    Raises:
        TypeError: If the forward takes none of several inputs.
    """
    if len(inputs) == 1 and not isinstance(model, PreTrainedModel):
        return list(inputs.values()), {}
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters) and not isinstance(model, PreTrainedModel):
        return [], dict(inputs)
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    taken = {name: value for name, value in inputs.items() if name in known}
    if taken:
        return [], taken
    main = next((name for name in MAIN_INPUTS if name in inputs), None)
    if main is None or isinstance(model, PreTrainedModel):
        raise TypeError(
            f"Expected a batch with an input that {type(model).__name__} takes, {sorted(known)}, but got"
            f" {sorted(inputs)}. Rename it in `collate_fn`."
        )
    return [inputs[main]], {}


def check_targets(
    labels: Tensor, num_classes: int, *, is_causal_lm: bool = False, multi_label: bool = False, wait: bool = False
) -> None:
    """Raise unless labels are classes, one a row (or token), or probabilities of the classes.

    Args:
        labels: (B,) or (B, T) integers in [0, C) or −100; or floats (B, C), rows that sum to 1, or to 0 without a
            label. With `multi_label` (B, C) of any dtype, each in [0, 1] or −100.
        num_classes: C.
        multi_label: whether a row may have several classes or none.
        is_causal_lm: whether labels are those of tokens, (B, T).
        wait: look at values on an accelerator too; the host then waits for the device.

    Raises:
        ValueError: If a label is out of range, or the labels have another shape.
        TypeError: If labels are boolean, or tokens have probabilities.

    Example:
        >>> check_targets(torch.tensor([[1.0, 0.0, 0.0]]), 4)
        Traceback (most recent call last):
        ...
        ValueError: Expected soft `labels` of shape (B, 4), but got (1, 3).
    """
    if multi_label:
        _check_multi_label(labels, num_classes, wait=wait)
        return
    if is_causal_lm or not labels.is_floating_point():
        check_labels(labels, num_classes, wait=wait)
        if labels.dim() != 1 + is_causal_lm:
            raise ValueError(
                f"Expected integer `labels` of shape {'(B, T)' if is_causal_lm else '(B,)'}, but got"
                f" {tuple(labels.shape)}. Pass the number of a class; several classes a row need `multi_label=True`."
            )
        return
    if labels.dim() != 2 or labels.shape[-1] != num_classes:
        raise ValueError(f"Expected soft `labels` of shape (B, {num_classes}), but got {tuple(labels.shape)}.")
    if not may_read(labels) and not wait:
        return
    sums = labels.float().sum(-1)
    wrong = (~((sums - 1).abs() < 1e-2) & (sums != 0)) | (labels < 0).any(-1)
    if wrong.any():
        raise ValueError(
            f"Expected soft `labels` to be probabilities that sum to 1 over {num_classes} classes, but a row sums to"
            f" {sums[wrong][0].item():.4g}. Labels of several classes a row need `multi_label=True`."
        )


def _check_multi_label(labels: Tensor, num_classes: int, *, wait: bool) -> None:
    if labels.dim() != 2 or labels.shape[-1] != num_classes:
        raise ValueError(
            f"Expected `labels` of shape (B, {num_classes}) for multi_label=True, 1 or 0 for each class, but got"
            f" {tuple(labels.shape)}."
        )
    if not may_read(labels) and not wait:
        return
    wrong = ~((labels >= 0) & (labels <= 1) | (labels == IGNORE_INDEX))
    if wrong.any():
        raise ValueError(
            f"Expected multi-label `labels` to be in [0, 1] or {IGNORE_INDEX} (not known), but got"
            f" {labels[wrong][0].item():.4g}."
        )


def token_targets(batch: Mapping[str, Tensor]) -> TokenTargets:
    """Return what the positions of token sequences predict, and which of them count.

    Without labels every token that `attention_mask` keeps counts, and predicts nothing that is known: the teacher
    alone judges.
    """
    if "labels" in batch:
        return TokenTargets(*next_token_labels(batch["labels"]))
    ids, kept = batch["input_ids"], batch.get("attention_mask")
    if kept is not None:
        ids = ids.masked_fill(kept == 0, IGNORE_INDEX)
    mask = next_token_labels(ids).mask
    return TokenTargets(torch.full_like(ids, IGNORE_INDEX), mask)
