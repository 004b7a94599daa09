"""A picture of how much each code is used over training.

Letters: K codes.
"""

import torch
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["usage_figure"]


def usage_figure(snapshots: Tensor, steps: list[int]) -> Figure:
    """Return a heat map of code usage over training beside the latest usage, by which codes are sorted.

    Args:
        snapshots: (S, K), the share of targets that each code carried.
        steps: the optimizer step of each snapshot.
    """
    num_codes = snapshots.shape[1]
    relative = snapshots * num_codes
    order = relative[-1].argsort(descending=True)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    heat, curve = figure.subplots(1, 2, width_ratios=(3, 1))
    image = heat.imshow(
        relative[:, order].T.clamp(min=1e-3).log10(),
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        vmin=-3,
        vmax=max(1.0, float(relative.max().clamp(min=1e-3).log10())),
    )
    ticks = torch.linspace(0, len(steps) - 1, min(6, len(steps))).round().long().unique().tolist()
    heat.set_xticks(ticks, [str(steps[tick]) for tick in ticks])
    heat.set(xlabel="optimizer step", ylabel="code, most used now at the top", title=f"use of {num_codes} codes")
    figure.colorbar(image, ax=heat, label="log10 of the share of targets × K")
    curve.plot(relative[-1, order].clamp(min=1e-3), torch.arange(num_codes))
    curve.axvline(1.0, linestyle="--", linewidth=1, color="grey", label="even use")
    curve.set(xscale="log", ylim=(num_codes - 0.5, -0.5), xlabel="share × K", title=f"step {steps[-1]}")
    curve.legend(loc="lower left", fontsize="small")
    return figure
