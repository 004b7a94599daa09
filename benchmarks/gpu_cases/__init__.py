"""Cases of `python -m benchmarks.gpu`, one file a group, their runner and their report."""

from benchmarks.gpu_cases import checks, decoding, distillation, fits, fusion, losses
from benchmarks.gpu_cases.runner import Group

__all__ = ["all_groups"]


def all_groups(*, small: bool = False) -> list[Group]:
    """All groups in the order of their worth; `small` for a CPU."""
    return [
        checks.group(small),
        losses.group(small),
        decoding.group(small),
        fusion.group(small),
        fits.group(small),
        distillation.alignment_group(small),
        distillation.graphs_group(small),
    ]
