"""A picture of which classes a classifier takes for which.

Letters: C classes.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

__all__ = ["confusion_figure"]

_MAX_NAMES = 30
_MAX_NUMBERS = 12


def confusion_figure(counts: Tensor, epoch: int, class_names: Sequence[str]) -> Figure:
    """Return a heat map of the share of each class's samples that was taken for each class.

    Args:
        counts: (C, C) samples, by label (rows) and predicted class (columns). A row without samples stays white.
        epoch: shown in the title, with the accuracy.
        class_names: names of the C classes, shown for up to 30; up to 12 classes the counts are written in the cells.
    """
    num_classes, total = len(counts), int(counts.sum())
    shares = (counts.double() / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, interpolation="nearest", cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the class's samples")
    accuracy = float(counts.diagonal().sum()) / max(1, total)
    axes.set_title(f"{total:,} samples, epoch {epoch}: accuracy {accuracy:.2%}")
    axes.set(xlabel="predicted class", ylabel="class of the label")
    if num_classes <= _MAX_NAMES:
        labels, size = [f"{name:.20}" for name in class_names], "medium" if num_classes <= _MAX_NUMBERS else "x-small"
        axes.set_xticks(range(num_classes), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(num_classes), labels, fontsize=size)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    if num_classes <= _MAX_NUMBERS:
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{int(counts[row, column]):,}", ha="center", va="center", color=colour)
    return figure
