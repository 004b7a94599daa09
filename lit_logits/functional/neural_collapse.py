"""Neural collapse: how far features and a linear classifier are from the simplex that training drives them to.

In the end of a healthy training features of a class meet in their mean (NC1), the centred class means and the rows of
the classifier are of equal length and at equal angles of cosine −1/(C−1) (NC2), and both agree up to scale (NC3). A
head whose losses fight shows rows that crowd together instead.

Letters: B samples, d features, C classes.

References:
    [0]: Prevalence of Neural Collapse, 2020, arXiv 2008.08186.
    [1]: Dual-Head Knowledge Distillation, 2024, arXiv 2411.08937.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ClassMoments",
    "NeuralCollapse",
    "class_moments",
    "cosine_matrix",
    "neural_collapse",
    "relative_spread",
    "simplex_gap",
]


class ClassMoments(NamedTuple):
    """Sums over samples, from which the figures follow; those of two batches or ranks simply add.

    Attributes:
        counts: (C,) samples of each class.
        sums: (C, d) sums of features.
        second_moment: (d, d) sum of h hᵀ over all samples.
    """

    counts: Tensor
    sums: Tensor
    second_moment: Tensor


class NeuralCollapse(NamedTuple):
    """Result of `neural_collapse`, scalars; each is 0 at the simplex.

    Attributes:
        nc1: tr(Σ_W Σ_B†) / C, spread within classes against that between them; infinite where all class means agree.
        nc2_norm_means: standard deviation over mean of the lengths of the centred class means.
        nc2_norm_rows: the same of the classifier's rows.
        nc2_angle_means: mean |cos + 1/(C−1)| over pairs of centred class means.
        nc2_angle_rows: the same over pairs of the classifier's rows.
        nc3: ‖W/‖W‖ − Ḣ/‖Ḣ‖‖² in Frobenius norm, Ḣ the centred class means; 2 when they have nothing in common.
    """

    nc1: Tensor
    nc2_norm_means: Tensor
    nc2_norm_rows: Tensor
    nc2_angle_means: Tensor
    nc2_angle_rows: Tensor
    nc3: Tensor


def class_moments(features: Tensor, labels: Tensor, num_classes: int) -> ClassMoments:
    """Compute count, sum and second moment of features; samples with a label outside [0, C) are left out.

    Args:
        features: (B, d).
        labels: (B,) int64.
        num_classes: C.

    Returns:
        Float64 sums, as differences of large sums follow.

    Example:
        >>> class_moments(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]), 2).sums.tolist()
        [[4.0], [0.0]]
    """
    known = (labels >= 0) & (labels < num_classes)
    features, labels = features[known].double(), labels[known]
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    counts = torch.bincount(labels, minlength=num_classes).to(features)
    return ClassMoments(counts, sums, features.T @ features)


def neural_collapse(moments: ClassMoments, weight: Tensor) -> NeuralCollapse:
    """Compute NC1, NC2 and NC3 [0] of the classes that occur; NaN if fewer than two do or a feature is not finite.

    Departure from [0] for unequal class sizes: means are centred at the mean of class means, so that every class
    weighs the same in Σ_B = Σ_c (μ_c − μ)(μ_c − μ)ᵀ / C; Σ_W is over all samples.

    Args:
        moments: of all samples, from `class_moments`.
        weight: (C, d) rows of the classifier.

    Raises:
        ValueError: If the shapes of moments and weight differ.

    Example:
        >>> simplex = torch.eye(3) - 1 / 3
        >>> values = neural_collapse(class_moments(simplex, torch.arange(3), 3), 5 * simplex)
        >>> [round(value.item(), 6) + 0.0 for value in values]
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    if weight.shape != moments.sums.shape:
        raise ValueError(
            f"Expected `weight` to have shape {tuple(moments.sums.shape)}, a row a class, but got"
            f" {tuple(weight.shape)}."
        )
    seen = moments.counts > 0
    counts, rows = moments.counts[seen], weight.detach()[seen].to(moments.sums)
    num_classes = counts.numel()
    if num_classes < 2 or not bool(moments.sums.isfinite().all()):  # an SVD would raise
        return NeuralCollapse(*(rows.new_full((), torch.nan) for _ in NeuralCollapse._fields))
    means = moments.sums[seen] / counts.unsqueeze(1)
    centred = means - means.mean(0)
    # Σ_W from sums alone, Σ h hᵀ − Σ_c n_c μ_c μ_cᵀ, so that one pass over the samples suffices and ranks can be added.
    within = (moments.second_moment - (means.T * counts) @ means) / counts.sum()
    return NeuralCollapse(
        nc1=_spread_within(within, centred, size=means.abs().max()),
        nc2_norm_means=relative_spread(centred),
        nc2_norm_rows=relative_spread(rows),
        nc2_angle_means=simplex_gap(cosine_matrix(centred)),
        nc2_angle_rows=simplex_gap(cosine_matrix(rows)),
        nc3=(_unit(rows) - _unit(centred)).square().sum(),
    )


def cosine_matrix(rows: Tensor) -> Tensor:
    """Compute cosines (C, C) between the rows (C, d); 0 with a row of zeros.

    Example:
        >>> cosine_matrix(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.7071],
                [0.7071, 1.0000]])
    """
    unit = F.normalize(rows, dim=1)
    return unit @ unit.T


def relative_spread(rows: Tensor) -> Tensor:
    """Compute standard deviation over mean of the lengths of the rows (C, d); 0 if all are of one length.

    Example:
        >>> relative_spread(torch.tensor([[3.0, 4.0], [0.0, 15.0]]))
        tensor(0.5000)
    """
    lengths = rows.norm(dim=1)
    return lengths.std(correction=0) / lengths.mean().clamp(min=torch.finfo(lengths.dtype).tiny)


def simplex_gap(cosines: Tensor) -> Tensor:
    """Compute the mean |cos + 1/(C−1)| off the diagonal of cosines (C, C), C ≥ 2; 0 at the simplex.

    Example:
        >>> simplex_gap(torch.eye(3))
        tensor(0.5000)
    """
    num_classes = cosines.shape[0]
    off_diagonal = ~torch.eye(num_classes, dtype=torch.bool, device=cosines.device)
    return (cosines[off_diagonal] + 1 / (num_classes - 1)).abs().mean()


def _spread_within(within: Tensor, centred: Tensor, size: Tensor) -> Tensor:
    """Compute NC1 of Σ_W (d, d) and centred class means (C, d), which are differences of numbers of the given size."""
    num_classes = centred.shape[0]
    # Σ_B has rank C − 1 at most: its pseudo-inverse comes from as many right singular vectors of the centred means.
    _, scales, axes = torch.linalg.svd(centred, full_matrices=False)
    noise = max(centred.shape) * torch.finfo(centred.dtype).eps
    if bool(scales.max() <= noise * size):  # what is left of the means is rounding: they agree
        return scales.new_full((), torch.inf)
    scales, axes = scales[: num_classes - 1], axes[: num_classes - 1]
    keep = scales > noise * scales.max()
    # Σ_W is a difference too, and may come out a little below 0.
    return (((axes @ within) * axes).sum(1).clamp(min=0)[keep] / scales[keep].square()).sum()


def _unit(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm().clamp(min=torch.finfo(matrix.dtype).tiny)
