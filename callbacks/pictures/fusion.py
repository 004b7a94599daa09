"""Pictures of texts whose tokens were fused: coloured by their weights, and as curves.

Letters: N tokens of a text, S experts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lit_logits.callbacks.pictures.tokens import FONT

__all__ = ["curve_figure", "text_figure"]


_FONT_SIZE = 10.0  # points
_CHARACTER = 0.602 * _FONT_SIZE / 72
_LINE_HEIGHT = 0.215
_COLUMNS = 84
_MAX_LINES = 60
_BARS = 3  # side by side
_BAR_HEIGHT = 0.66


# ---------------------------------------------------------------------- tokens


def _lay_out(pieces: Sequence[str]) -> Iterator[tuple[int, int, int, str]]:
    """Yield line, column, token and characters; lines break in front of words where possible."""
    line = column = 0
    for word in _words(pieces):
        if column and column + len("".join(piece for _, piece in word).rstrip()) > _COLUMNS:
            line, column = line + 1, 0
        for token, piece in word:
            for part in piece.splitlines(keepends=True):
                characters = part.rstrip("\n")
                while characters:
                    room = _COLUMNS + 1 - column if characters == "⏎" else _COLUMNS - column
                    if room > 0:
                        yield line, column, token, characters[:room]
                    column, characters = column + len(characters[:room]), characters[max(0, room) :]
                    if characters:
                        line, column = line + 1, 0
                if part.endswith("\n"):
                    line, column = line + 1, 0


def _words(pieces: Sequence[str]) -> list[list[tuple[int, str]]]:
    """Return tokens with their numbers, grouped to words: a space in front, or a line end before, starts the next."""
    words: list[list[tuple[int, str]]] = []
    for number, piece in enumerate(pieces):
        if not words or piece[0] == " " or words[-1][-1][1].endswith("\n"):
            words.append([])
        words[-1].append((number, piece))
    return words


# ---------------------------------------------------------------------- pictures


def text_figure(
    pieces: Sequence[str], alpha: Tensor, *, expert_names: Sequence[str], alpha_range: tuple[float, float], title: str
) -> Figure:
    """Return a running text whose tokens lie on the colour of the expert with the largest weight, deeper if larger.

    Args:
        pieces: N tokens, of `token_texts`; at least one.
        alpha: (S, N).
        expert_names: of the S experts.
        alpha_range: ends of the colour bars.
        title: of the figure.
    """
    fragments = [fragment for fragment in _lay_out(pieces) if fragment[0] < _MAX_LINES]
    num_lines, num_shown = fragments[-1][0] + 1, fragments[-1][2] + 1
    num_rows = -(-len(alpha) // _BARS)
    width, text_height, bars_height = _CHARACTER * (_COLUMNS + 1), _LINE_HEIGHT * num_lines, _BAR_HEIGHT * num_rows
    figure = Figure(figsize=(width + 0.4, text_height + bars_height + 0.7), dpi=130)
    size = figure.get_size_inches()

    def axes(left: float, bottom: float, width: float, height: float) -> Any:
        return figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))

    left_out = f", {len(pieces) - num_shown} more not shown" if num_shown < len(pieces) else ""
    figure.text(0.2 / size[0], 1 - 0.25 / size[1], f"{title}{left_out}", fontsize=11, va="center", parse_math=False)
    scales = [ScalarMappable(Normalize(*alpha_range), _colormap(i, alpha_range)) for i in range(len(alpha))]
    acting = alpha.abs().argmax(0).tolist()
    colors = [scales[i].to_rgba(float(alpha[i, n])) for n, i in enumerate(acting)]
    _write(axes(0.2, 0.2 + bars_height, width, text_height), fragments, colors)
    for index, scale in enumerate(scales):
        row, column = divmod(index, _BARS)
        step = width / min(_BARS, len(alpha))
        bar = axes(0.2 + column * step, 0.1 + bars_height - _BAR_HEIGHT * (row + 1) + 0.3, min(3.0, step - 0.3), 0.12)
        figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=torch.linspace(*alpha_range, 5).tolist())
        bar.tick_params(labelsize=8)
        bar.set_title(f"α of {expert_names[index]:.24}", fontsize=9, loc="left", pad=3, parse_math=False)
    return figure


def _write(page: Any, fragments: Sequence[tuple[int, int, int, str]], colors: Sequence[Any]) -> None:
    """Draw characters on the colours of their tokens; a unit of the axes is a column, or a line."""
    page.set(xlim=(0, _COLUMNS + 1), ylim=(fragments[-1][0] + 1, 0))
    page.set_axis_off()
    corners = [
        [(x, y + 0.04), (x + len(text), y + 0.04), (x + len(text), y + 0.96), (x, y + 0.96)]
        for y, x, _, text in fragments
    ]
    fills = [colors[token] for _, _, token, _ in fragments]
    page.add_collection(PolyCollection(corners, facecolors=fills, edgecolors="0.8", linewidths=0.4))
    for line, column, _, text in fragments:
        place = column, line + 0.54
        page.text(*place, text, family=FONT, fontsize=_FONT_SIZE, va="center_baseline", parse_math=False)


def curve_figure(
    pieces: Sequence[str],
    alpha: Tensor,
    kl_forward: Tensor,
    kl_reverse: Tensor,
    *,
    expert_names: Sequence[str],
    alpha_range: tuple[float, float],
    title: str,
) -> Figure:
    """Return the weight of each expert over the position in a text, above the divergences from the large model.

    Args:
        pieces: N tokens, of `token_texts`; those of the largest divergence are spelled out.
        alpha: (S, N).
        kl_forward: (N,) in nats.
        kl_reverse: (N,) in nats.
        expert_names: of the S experts.
        alpha_range: of the axis.
        title: of the figure.
    """
    figure = Figure(figsize=(10, 5.2), layout="constrained", dpi=110)
    weights, divergences = figure.subplots(2, 1, sharex=True)
    _draw_weights(weights, alpha, expert_names, alpha_range)
    _draw_divergences(divergences, pieces, kl_forward, kl_reverse)
    for axes in (weights, divergences):
        legend = axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize="small")
        for text in legend.get_texts():
            text.set_parse_math(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _draw_weights(axes: Any, alpha: Tensor, expert_names: Sequence[str], alpha_range: tuple[float, float]) -> None:
    edges = (torch.arange(alpha.shape[1] + 1) - 0.5).numpy()
    for index, (name, values) in enumerate(zip(expert_names, alpha, strict=True)):
        color, label = _hue(index), f"α of {name:.24}, mean {float(values.mean()):.2f}"
        axes.stairs(values.numpy(), edges, fill=True, color=color, alpha=0.2)
        axes.stairs(values.numpy(), edges, color=color, linewidth=1.2, label=label)
    margin = 0.05 * (alpha_range[1] - alpha_range[0])
    axes.set(ylabel="α", ylim=(alpha_range[0] - margin, alpha_range[1] + margin))


def _draw_divergences(axes: Any, pieces: Sequence[str], kl_forward: Tensor, kl_reverse: Tensor) -> None:
    for label, values, shade in (("fused ‖ large", kl_forward, "black"), ("large ‖ fused", kl_reverse, "tab:pink")):
        label = f"KL({label}), mean {float(values.mean()):.3f}"
        marker = "." if len(pieces) <= 50 else ""
        axes.plot(values.numpy(), color=shade, linewidth=1, marker=marker, label=label)
    highest = max(float(kl_forward.max()), float(kl_reverse.max()), 1e-3)
    axes.set(xlabel="token", ylabel="nats", xlim=(-0.5, len(pieces) - 0.5), ylim=(0, 1.45 * highest))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for position in _peaks(torch.maximum(kl_forward, kl_reverse), len(pieces) // 40 + 1):
        axes.annotate(
            f"{pieces[position].strip() or '␣':.8}", (position, max(kl_forward[position], kl_reverse[position])),
            xytext=(0, 4), textcoords="offset points", rotation=90, ha="center", va="bottom", fontsize=8, family=FONT,
            parse_math=False,
        )  # fmt: skip


def _peaks(values: Tensor, distance: int) -> list[int]:
    """Return up to 12 positions of the largest values, at least `distance` apart."""
    found: list[int] = []
    for position in values.argsort(descending=True).tolist():
        if values[position] > 0 and all(abs(position - other) >= distance for other in found) and len(found) < 12:
            found.append(position)
    return found


def _hue(index: int) -> tuple[float, float, float, float]:
    return colormaps["tab10"](index % 10)


def _colormap(index: int, alpha_range: tuple[float, float]) -> LinearSegmentedColormap:
    """Map α to colours: white at 0, a tint of the expert's hue at the upper end, grey at a negative lower end."""
    low, high = alpha_range
    zero, (red, green, blue, _) = -low / (high - low), _hue(index)
    tint = (0.75 * red + 0.25, 0.75 * green + 0.25, 0.75 * blue + 0.25)  # black letters stay legible
    stops = [(0.0, (0.5, 0.5, 0.5)), (zero, (1.0, 1.0, 1.0)), (1.0, tint)]
    return LinearSegmentedColormap.from_list("alpha", [stops[i] for i in (0, 1, 2) if (zero > 0, 1, zero < 1)[i]])
