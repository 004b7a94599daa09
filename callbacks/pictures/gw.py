"""Pictures of graphs on logits, and of how close the sorted Gromov–Wasserstein bound is to the distance itself.

Letters: n nodes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

__all__ = ["graph_figure", "scatter_figure"]

_MAX_LABEL = 12  # characters


def scatter_figure(pairs: Mapping[str, Sequence[tuple[float, float]]], *, unit: str, title: str) -> Figure:
    """Return a scatter plot of distance over sorted bound for many pairs of graphs; no point lies below y = x.

    Args:
        pairs: bound and distance by the name of the source, the oldest first and drawn faintest.
        unit: of both axes.
        title: of the figure.
    """
    figure = Figure(figsize=(6.4, 6.4), layout="constrained", dpi=110)
    axes = figure.subplots()
    numbers = [number for of_source in pairs.values() for pair in of_source for number in pair]
    margin = 0.05 * (max(numbers) - min(numbers)) or 0.05 * max(numbers) or 0.05
    limits = min(numbers) - margin, max(numbers) + margin
    axes.plot(limits, limits, linestyle="--", linewidth=1, color="0.4", label="y = x", zorder=1)
    for index, (name, of_source) in enumerate(pairs.items()):
        color = colormaps["tab10"](index % 10)[:3]
        ages = [(i + 1) / len(of_source) for i in range(len(of_source))]
        points = [(*color, 0.12 + 0.78 * age**2) for age in ages]
        bounds, distances = zip(*of_source, strict=True)
        axes.scatter(bounds, distances, s=26, c=points, linewidths=0, zorder=2)
        count = "1 pair" if len(of_source) == 1 else f"{len(of_source)} pairs"
        axes.scatter([], [], s=26, color=color, linewidths=0, label=f"{count} of {_short(name, 40)}")
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.set(xlabel=f"sorted bound, mean |f↓ − g↓|  ({unit})", ylabel=f"distance, best matching found  ({unit})")
    axes.grid(linewidth=0.4, color="0.88")
    axes.set_axisbelow(True)
    for text in axes.legend(loc="upper left", fontsize="small").get_texts():
        text.set_parse_math(False)
    axes.set_title(title, fontsize=11, parse_math=False)
    return figure


def graph_figure(
    student: Tensor,
    source: Tensor,
    *,
    labels: tuple[Sequence[str], Sequence[str]],
    node_names: tuple[str, str],
    unit: str,
    name: str,
    title: str,
) -> Figure:
    """Return two co-activation graphs as heat maps on one scale of colours.

    Args:
        student: (n, n).
        source: (n, n).
        labels: of the n nodes of each.
        node_names: what a node of each is, for the axes.
        unit: of the edges.
        name: of the source.
        title: of the figure.
    """
    figure = Figure(figsize=(11.5, 5.9), layout="constrained", dpi=110)
    panels = figure.subplots(1, 2)
    low, high = (float(bound) for bound in (min(student.min(), source.min()), max(student.max(), source.max())))
    if low < 0:  # white is 0
        low, high = -max(-low, high), max(-low, high)
    colors = {"cmap": "RdBu_r" if low < 0 else "viridis", "vmin": low, "vmax": high}
    for panel, graph, texts, node_name, heading in zip(
        panels, (student, source), labels, node_names, ("student", _short(name, 60)), strict=True
    ):
        image = panel.imshow(graph.numpy(), interpolation="nearest", **colors)
        _label_nodes(panel, [_short(text, _MAX_LABEL) for text in texts])
        panel.set(xlabel=node_name, ylabel=node_name)
        panel.set_title(heading, fontsize=11, parse_math=False)
    bar = figure.colorbar(image, ax=panels, shrink=0.85, label=f"co-activation  ({unit})")
    bar.ax.yaxis.set_major_locator(MaxNLocator(6))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    return figure


def _label_nodes(panel: Any, texts: Sequence[str]) -> None:
    size = "small" if len(texts) <= 12 else "x-small" if len(texts) <= 20 else "xx-small"
    rotation = 0 if all(text.isdigit() for text in texts) else 90
    for tick in (
        *panel.set_xticks(range(len(texts)), texts, fontsize=size, rotation=rotation),
        *panel.set_yticks(range(len(texts)), texts, fontsize=size),
    ):
        tick.label1.set_parse_math(False)


def _short(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 1]}…"
