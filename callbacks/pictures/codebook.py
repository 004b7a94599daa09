"""Pictures of how much each code is used over training, and of the tokens that share one.

Letters: K codes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lit_logits.callbacks.pictures.tokens import FONT

__all__ = ["CodeTokens", "tokens_figure", "usage_figure"]

_LINE = 92  # characters that fit beside the bars


class CodeTokens(NamedTuple):
    """A code, its share of the targets, how many tokens it owns, and the most frequent of them as text."""

    code: int
    share: float
    num_tokens: int
    tokens: list[str]


def tokens_figure(codes: Sequence[CodeTokens]) -> Figure:
    """Return a picture of some codes, a line each: a bar for the share of the targets, and the most frequent tokens."""
    figure = Figure(figsize=(11, 0.6 + 0.28 * len(codes)), layout="constrained")
    bars, words = figure.subplots(1, 2, width_ratios=(1, 5), sharey=True)
    places = range(len(codes))
    bars.barh(places, [100 * code.share for code in codes], color="tab:blue")
    bars.set_yticks(places, [str(code.code) for code in codes])
    bars.set(xlabel="% of the targets", ylabel="code", ylim=(len(codes) - 0.5, -0.5))
    for place, code in enumerate(codes):
        text = f"{code.num_tokens:5,}  "
        for token in code.tokens:
            if len(text) + len(token) > _LINE:
                break
            text += f"{token}  "
        # A dollar sign would begin a formula.
        words.text(0, place, text.replace("$", r"\$"), family=FONT, fontsize=9, va="center")
    words.set_title("tokens, and the most frequent of them", loc="left", fontsize=10)
    words.set_axis_off()
    return figure


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
