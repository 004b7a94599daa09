"""A picture of the cosines between the rows of a classifier.

Letters: C classes.
"""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lit_logits.functional.neural_collapse import simplex_gap

__all__ = ["cosine_figure"]


_MAX_NAMES = 30


def cosine_figure(cosines: Tensor, epoch: int, class_names: Sequence[str] | None = None) -> Figure:
    """Return a heat map of the cosines between a classifier's rows beside their histogram, with the simplex marked.

    Args:
        cosines: (C, C), C ≥ 2.
        epoch: shown in the title.
        class_names: names of the C rows; shown for up to 30.
    """
    num_classes = len(cosines)
    figure = Figure(figsize=(10.5, 5), layout="constrained")
    heat, counts = figure.subplots(1, 2, width_ratios=(6, 5))
    image = heat.imshow(cosines.numpy(), interpolation="nearest", cmap="RdBu_r", vmin=-1, vmax=1)
    figure.colorbar(image, ax=heat, label="cosine")
    heat.set_title(f"cosines between {num_classes} rows, epoch {epoch}: nc2 = {float(simplex_gap(cosines)):.3f}")
    if class_names is not None and num_classes <= _MAX_NAMES:
        labels, size = [f"{name:.20}" for name in class_names], "medium" if num_classes <= 12 else "x-small"
        heat.set_xticks(range(num_classes), labels, rotation=90, fontsize=size)
        heat.set_yticks(range(num_classes), labels, fontsize=size)
    else:
        heat.set(xlabel="row of the classifier", ylabel="row of the classifier")
        for axis in (heat.xaxis, heat.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    pairs = cosines[tuple(torch.triu_indices(num_classes, num_classes, offset=1))].clamp(-1, 1)
    simplex, mean = -1 / (num_classes - 1), float(pairs.mean())
    counts.hist(pairs.numpy(), bins=80, range=(-1, 1), color="tab:blue")
    counts.axvline(simplex, linestyle="--", color="black", label=f"simplex, −1/(C−1): {simplex:.3f}")
    counts.axvline(mean, color="tab:orange", label=f"mean: {mean:.3f}")
    counts.set(xlim=(-1, 1), xticks=(-1, -0.5, 0, 0.5, 1), xlabel="cosine", ylabel="pairs of rows")
    counts.yaxis.set_major_locator(MaxNLocator(integer=True))
    counts.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return figure
