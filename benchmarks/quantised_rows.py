"""What people have instead of codes for a pretrained output layer: its rows in fewer bits, or of lower rank.

Letters: d hidden size, V vocabulary, r rank.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lit_logits.contracts import Calibration

__all__ = ["Rival", "gptq", "low_rank", "rivals", "round_to_nearest"]


class Rival(NamedTuple):
    """Rows (V, d) in place of the original's, and what they cost as shares of them in bfloat16."""

    label: str
    rows: Tensor
    parameters: float | None
    bytes: float


def rivals(weight: Tensor, calibration: Calibration) -> Iterator[Rival]:
    """Yield every rival of an output layer (V, d), one at a time."""
    moment = calibration.hidden_second_moment
    if moment is None:
        raise ValueError("Expected a calibration with a second moment, but got None.")
    for bits in (4, 3, 2):
        share = (bits + 32 / 64) / 16
        yield Rival(f"round to nearest, {bits} bit, groups of 64", round_to_nearest(weight, bits), None, share)
        yield Rival(f"GPTQ, {bits} bit, groups of 64", gptq(weight, moment, bits), None, share)
    for share in (0.135, 0.25):
        rank = int(share * weight.numel() / sum(weight.shape))
        yield Rival(f"low rank, {rank}", low_rank(weight, moment, calibration.token_counts, rank), share, share)


def round_to_nearest(weight: Tensor, bits: int, *, group: int = 64) -> Tensor:
    """Return the rows (V, d) in `bits`, with a scale and a zero for each `group` of columns of a row."""
    parts = weight.unflatten(1, (-1, group))
    return _rounded(parts, *_grid(parts, bits), bits).flatten(1)


def gptq(weight: Tensor, moment: Tensor, bits: int, *, group: int = 64, damping: float = 0.01) -> Tensor:
    """Return the rows (V, d) in `bits`, rounded column after column; each makes up for the errors of those before it.

    With H = E[h hᵀ] and H⁻¹ = Uᵀ U, U upper triangular, the error δ_j of column j is taken off the columns i > j that
    are still to be rounded, W_i −= δ_j U_ji / U_jj. Scale and zero of a group are those of its columns as they are when
    the first of them is rounded. Columns are taken in their order, as in the paper.

    Args:
        weight: (V, d) rows.
        moment: (d, d) E[h hᵀ].
        bits: of each number.
        group: columns that share a scale and a zero.
        damping: share of the mean diagonal of H that is added to its diagonal.

    References:
        [0]: GPTQ, 2022, arXiv 2210.17323, Algorithm 1.
    """
    metric = moment.double()
    metric = metric + damping * metric.diagonal().mean() * torch.eye(len(metric), dtype=metric.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(metric))
    factor = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    left, rows = weight.clone(), torch.empty_like(weight)
    for columns in torch.arange(weight.shape[1]).split(group):
        begin, end = int(columns[0]), int(columns[-1]) + 1
        low, step = _grid(left[:, begin:end], bits)
        scaled_errors = torch.empty_like(left[:, begin:end])
        for j in range(begin, end):
            rows[:, j] = _rounded(left[:, j : j + 1], low, step, bits).squeeze(1)
            error = (left[:, j] - rows[:, j]) / factor[j, j]
            left[:, j + 1 : end].addr_(error, factor[j, j + 1 : end], alpha=-1)
            scaled_errors[:, j - begin] = error
        left[:, end:].addmm_(scaled_errors, factor[begin:end, end:], alpha=-1)
    return rows


def low_rank(weight: Tensor, moment: Tensor, token_counts: Tensor, rank: int) -> Tensor:
    """Return the best rows (V, d) of a rank in the metric E[h hᵀ], tokens weighted as a fit by `counts` does."""
    damped = moment.double() + 1e-5 * moment.diagonal().mean() * torch.eye(len(moment))
    root = torch.linalg.cholesky(damped).float()
    scale = token_counts.clamp(min=0.5).pow(0.75).sqrt().unsqueeze(1)
    rotated = weight @ root
    _, vectors = torch.linalg.eigh((scale * rotated).T.double() @ (scale * rotated).double())
    basis = vectors[:, -rank:].float()
    return (rotated @ basis) @ torch.linalg.solve_triangular(root, basis.T, upper=False, left=False)


def _grid(parts: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Zero and scale (..., 1) of groups (..., n)."""
    low = parts.amin(-1, keepdim=True)
    return low, (parts.amax(-1, keepdim=True) - low).clamp(min=1e-12) / (2**bits - 1)


def _rounded(values: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    return ((values - low) / step).round().clamp(0, 2**bits - 1) * step + low
