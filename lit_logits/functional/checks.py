"""Checks that several methods share: each raises an error that names the argument, the rule and what came.

A check reads values only where that is free. On an accelerator a comparison would make the host wait for the device in
every step, so `check_labels` looks at tensors in host memory unless it is told to look anyway. `may_read` says for all
of `functional` and `modules` where values may be read.
"""

import torch
from torch import Tensor

from lit_logits.functional.labels import IGNORE_INDEX

__all__ = ["check_finite", "check_labels", "check_not_negative", "check_positive", "check_token_to_code", "may_read"]

_READABLE_DEVICES = {"cpu"}


def may_read(tensor: Tensor) -> bool:
    """Return whether the values of `tensor` are at hand, so that reading them makes no host wait for a device.

    While `torch.compile` traces, no values are: a read would break the graph.

    Example:
        >>> may_read(torch.zeros(1)), may_read(torch.zeros(1, device="meta"))
        (True, False)
    """
    return not torch.compiler.is_compiling() and tensor.device.type in _READABLE_DEVICES


def check_labels(labels: Tensor, num_classes: int, *, ignore_index: int = IGNORE_INDEX, wait: bool = False) -> None:
    """Raise unless every label is `ignore_index` or in [0, num_classes).

    Args:
        labels: integer class or token ids, any shape.
        num_classes: number of classes, or the vocabulary size.
        ignore_index: label that marks positions to leave out.
        wait: look at labels on an accelerator too; the host then waits for the device.

    Raises:
        ValueError: If a label is out of range.
        TypeError: If labels are not integers.

    Example:
        >>> check_labels(torch.tensor([3, -100]), num_classes=3)
        Traceback (most recent call last):
        ...
        ValueError: Expected `labels` to be in [0, 3) or -100 (ignored), but got 3.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"Expected `labels` to be integer ids, but got {labels.dtype}.")
    if not may_read(labels) and not wait:
        return
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"Expected `labels` to be in [0, {num_classes}) or {ignore_index} (ignored), but got {wrong[0].item()}."
        )


def check_token_to_code(token_to_code: Tensor, vocab_size: int, codebook_size: int) -> None:
    """Raise unless `token_to_code` maps each of `vocab_size` tokens to a code in [0, codebook_size).

    Raises:
        ValueError: If shape or dtype do not fit, or a code is out of range.

    Example:
        >>> check_token_to_code(torch.tensor([0, 2]), vocab_size=2, codebook_size=2)
        Traceback (most recent call last):
        ...
        ValueError: Expected `token_to_code` to map tokens to codes in [0, 2), but token 1 maps to 2.
    """
    if token_to_code.shape != (vocab_size,) or token_to_code.is_floating_point() or token_to_code.dtype == torch.bool:
        raise ValueError(
            f"Expected `token_to_code` to hold {vocab_size} integer codes, one a token, but got"
            f" {token_to_code.dtype} of shape {tuple(token_to_code.shape)}."
        )
    lowest, highest = token_to_code.aminmax()
    if lowest < 0 or highest >= codebook_size:
        token = int(((token_to_code < 0) | (token_to_code >= codebook_size)).nonzero()[0])
        raise ValueError(
            f"Expected `token_to_code` to map tokens to codes in [0, {codebook_size}), but token {token} maps to"
            f" {int(token_to_code[token])}."
        )


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise unless every element of the floating-point `tensor`, called `name` in the error, is finite.

    Raises:
        ValueError: If there is a NaN or an infinity; the error counts them.
    """
    wrong = int((~torch.isfinite(tensor)).sum())
    if wrong:
        raise ValueError(f"Expected `{name}` to be finite, but got {wrong} NaN or infinite values of {tensor.numel()}.")


def check_not_negative(**values: float) -> None:
    """Raise unless every value is at least 0; the keywords are the names of the arguments.

    Raises:
        ValueError: If a value is negative or NaN; the error names the first.
    """
    for name, value in values.items():
        if not value >= 0:  # unlike `value < 0`, this catches NaN
            raise ValueError(f"Expected `{name}` to be non-negative, but got {value}.")


def check_positive(**values: float) -> None:
    """Raise unless every value is above 0; the keywords are the names of the arguments.

    Raises:
        ValueError: If a value is not positive or NaN; the error names the first.
    """
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"Expected `{name}` to be positive, but got {value}.")
