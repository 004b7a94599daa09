"""Two gradients that may oppose each other: their angle, the projection that ends the conflict, their mean over ranks.

A gradient is a tensor, or the list of the tensors of all parameters read as one long vector.

References:
    [0]: Dual-Head Knowledge Distillation, 2024, arXiv 2411.08937.
    [1]: Gradient Surgery for Multi-Task Learning, 2020, arXiv 2001.06782, Alg. 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_logits.functional.distributed import all_reduce_sum_, is_distributed
from lit_logits.functional.reductions import at_least_float32

__all__ = [
    "AlignedGradients",
    "align_gradients",
    "any_over_ranks",
    "average_over_ranks",
    "project_conflicting_gradient",
]


class AlignedGradients(NamedTuple):
    """Result of `align_gradients`.

    Attributes:
        grads: the projected gradient, one tensor for each that came.
        cosine: scalar, of the angle before the projection; 0 if either gradient is 0.
        conflict: scalar, 1 if the gradients opposed each other, else 0.
    """

    grads: list[Tensor]
    cosine: Tensor
    conflict: Tensor


def project_conflicting_gradient(grad: Tensor, reference: Tensor) -> Tensor:
    """Take from `grad` what opposes `reference` [1]: g − (⟨g, r⟩ / ‖r‖²) r if ⟨g, r⟩ < 0, else g.

    Args:
        grad: g, any shape, read as one vector.
        reference: r, of the shape of `grad`; only its direction matters.

    Returns:
        A gradient whose inner product with `reference` is not negative.

    Example:
        >>> project_conflicting_gradient(torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 0.0]))
        tensor([0., 1.])
    """
    return align_gradients([grad], [reference]).grads[0]


def align_gradients(grads: Sequence[Tensor], references: Sequence[Tensor]) -> AlignedGradients:
    """Apply `project_conflicting_gradient` to tensors that make up one vector, without waiting for the device.

    Args:
        grads: g, one tensor a parameter.
        references: r, of the same shapes.

    Raises:
        ValueError: If the shapes of the two lists differ.

    Example:
        >>> align_gradients([torch.tensor([-1.0]), torch.tensor([1.0])], [torch.tensor([1.0]), torch.tensor([0.0])])
        AlignedGradients(grads=[tensor([0.]), tensor([1.])], cosine=tensor(-0.7071), conflict=tensor(1.))
    """
    if [grad.shape for grad in grads] != [reference.shape for reference in references]:
        raise ValueError(
            f"Expected `grads` and `references` of the same shapes, but got {[tuple(g.shape) for g in grads]} and"
            f" {[tuple(r.shape) for r in references]}."
        )
    # Divided by their largest entry, so that squares neither vanish nor overflow. An infinite entry becomes NaN, which
    # reaches the result, so that a step that went wrong shows. `where` instead of `if`, as the host would have to wait.
    units, directions = _scaled(grads), _scaled(references)
    inner, squared_norm, own = (
        _inner_product(*pair) for pair in ((units, directions), (directions, directions), (units, units))
    )
    tiny = torch.finfo(inner.dtype).tiny
    conflict = inner < 0
    size = _largest(grads)
    share = torch.where(conflict, inner / squared_norm.clamp(min=tiny), 0.0) * size
    aligned = [grad - share.to(grad.dtype) * way.to(grad.dtype) for grad, way in zip(grads, directions, strict=True)]
    cosine = inner / (squared_norm.sqrt() * own.sqrt()).clamp(min=tiny)
    return AlignedGradients(aligned, cosine, conflict.to(inner.dtype))


def average_over_ranks(grads: Sequence[Tensor]) -> list[Tensor]:
    """Average each tensor over all ranks, by one collective; every rank must call it with the same shapes."""
    if not grads or not is_distributed():
        return list(grads)
    flat = all_reduce_sum_(torch.cat([grad.flatten() for grad in grads])) / dist.get_world_size()
    parts = flat.split([grad.numel() for grad in grads])
    return [part.view_as(grad).to(grad.dtype) for part, grad in zip(parts, grads, strict=True)]


def any_over_ranks(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Return for each flag whether it is set on any rank; every rank must call it with as many flags."""
    if not is_distributed():  # flags need no trip to the device
        return list(flags)
    return [count > 0 for count in all_reduce_sum_(torch.tensor(flags, dtype=torch.int32, device=device)).tolist()]


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest absolute entry, in at least float32; 1 if all are 0 or the list is empty."""
    entries = [at_least_float32(tensor.abs().max()) for tensor in tensors if tensor.numel()]
    largest = torch.stack(entries).max() if entries else torch.ones(())
    return torch.where(largest == 0, 1.0, largest)


def _scaled(tensors: Sequence[Tensor]) -> list[Tensor]:
    largest = _largest(tensors)
    return [at_least_float32(tensor) / largest for tensor in tensors]


def _inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Compute the inner product of two lists read as vectors, in at least float32."""
    terms = []
    for a, b in zip(left, right, strict=True):
        dtype = torch.promote_types(a.dtype, torch.float32)
        terms.append(torch.dot(a.flatten().to(dtype), b.flatten().to(dtype)))
    return torch.stack(terms).sum() if terms else torch.zeros(())
