"""Task arithmetic: what models of one architecture learned since their common start, added up.

References:
    [0]: Editing Models with Task Arithmetic, 2022, arXiv 2212.04089.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["add_task_vectors"]


@torch.no_grad()
def add_task_vectors(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], weight: float = 1.0
) -> dict[str, Tensor]:
    """Compute θ + λ Σ_t (θ_t − θ) for each tensor [0], summed in float32.

    Args:
        base: state dict θ of what the experts were fine-tuned from.
        experts: state dicts θ_t, of the names and shapes of `base`.
        weight: λ.

    Returns:
        A state dict in the dtypes of `base`; tensors of other than floating-point dtypes are copied from `base`.

    Raises:
        ValueError: If tensors differ in name or shape.

    Example:
        >>> zero, one = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
        >>> add_task_vectors(zero, [one, one], weight=0.25)
        {'w': tensor([0.5000])}
    """
    shapes = {name: tensor.shape for name, tensor in base.items()}
    for number, expert in enumerate(experts):
        others = {name: tensor.shape for name, tensor in expert.items()}
        if others != shapes:
            name = sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))[0]
            raise ValueError(
                f"Expected experts of the base's architecture, but `{name}` is {_shape(shapes.get(name))} in the base"
                f" and {_shape(others.get(name))} in expert {number}."
            )
    merged = {}
    for name, start in base.items():
        if not start.is_floating_point():
            merged[name] = start.clone()
            continue
        total = start.float()  # task vectors are small beside θ: bfloat16 would round much of them away
        for expert in experts:
            total = total + weight * (expert[name].to(start.device).float() - start.float())
        merged[name] = total.to(start.dtype)
    return merged


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
