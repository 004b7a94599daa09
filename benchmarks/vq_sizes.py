"""Heads beside the dense one over the tokens that they read, for several vocabularies in one picture.

    python -m benchmarks.vq_sizes v4k.json v16k.json v49k.json [--head two_fitted] [--picture sizes.png]

Takes what `benchmarks.vq_scratch --out` wrote. Of each vocabulary and head the settings count that are best by
validation, over the seeds that both heads have. Ratios are of perplexities of the same seed.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.measure import markdown_table, spread


def vocab_size(run: dict[str, Any]) -> int:
    return run["dense_floats"] // run["settings"]["backbone"]["hidden_size"]


def by_settings(runs: Iterable[dict[str, Any]]) -> list[dict[int, dict[str, Any]]]:
    """The runs of a head, those that differ in their seed alone together, by seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        own = {name: value for name, value in run["settings"].items() if name != "seed"}
        found.setdefault(json.dumps(own, sort_keys=True), {})[run["settings"]["seed"]] = run
    return list(found.values())


def pairs(runs: list[dict[str, Any]], head: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Runs of a head and of the dense one, seed by seed.

    Raises:
        SystemExit: If there are none of a head, or no seed that both have.
    """
    ours, dense = (by_settings(run for run in runs if run["settings"]["head"] == name) for name in (head, "dense"))
    both = [(set(one) & set(other), points(one)) for one in ours for other in dense if points(one) == points(other)]
    shared, tokens = max(both, key=lambda pair: len(pair[0]), default=(set(), []))
    if not shared:
        heads = sorted({run["settings"]["head"] for run in runs})
        raise SystemExit(
            f"Expected runs of {head!r} and 'dense' of the same seed and steps, but of V = {vocab_size(runs[0]):,} the"
            f" file has those of {heads}."
        )

    def best(of_head: list[dict[int, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
        full = [seeds for seeds in of_head if shared <= set(seeds) and points(seeds) == tokens]
        return min(full, key=lambda seeds: statistics.fmean(seeds[seed]["curve"][-1][1] for seed in shared))

    one, other = best(ours), best(dense)
    return [(one[seed], other[seed]) for seed in sorted(shared)]


def points(runs: dict[int, dict[str, Any]]) -> list[int]:
    """After how many tokens runs were validated."""
    return [point[0] for point in next(iter(runs.values()))["curve"]]


def mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[int], list[float]]:
    tokens = [int(point[0]) for point in curves[0]]
    return tokens, [statistics.fmean(curve[at][1] for curve in curves) for at in range(len(tokens))]


def picture(found: dict[int, list[tuple[dict[str, Any], dict[str, Any]]]]) -> Figure:
    figure = Figure(figsize=(8, 7), layout="constrained", dpi=110)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for number, (size, both) in enumerate(found.items()):
        color = colormaps["tab10"](number)
        share = both[0][0]["floats"] / both[0][0]["dense_floats"]
        tokens, ours = mean_curve([run["curve"] for run, _ in both])
        _, dense = mean_curve([run["curve"] for _, run in both])
        above.plot(tokens, ours, color=color, marker=".", label=f"V = {size:,}, {share:.1%} of the floats")
        above.plot(tokens, dense, color=color, linestyle="--", label=f"V = {size:,}, dense")
        below.plot(tokens, [a / b for a, b in zip(ours, dense, strict=True)], color=color, marker=".")
    above.set(xscale="log", yscale="log", ylabel="validation perplexity")
    below.set(xlabel="tokens read", ylabel="ratio to the dense head")
    below.axhline(1.0, color="black", linewidth=0.8)
    above.legend(frameon=False, fontsize="small")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--head", default="two_fitted")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args(arguments)
    sizes: dict[int, list[dict[str, Any]]] = {}
    for file in args.files:
        for run in json.loads(file.read_text())["runs"]:
            sizes.setdefault(vocab_size(run), []).append(run)
    found = {size: pairs(runs, args.head) for size, runs in sorted(sizes.items())}
    rows: list[list[object]] = []
    for size, both in found.items():
        ratios = [[ours[key] / dense[key] for ours, dense in both] for key in ("test_ppl", "step_seconds")]
        ends = [ours["curve"][-1][1] / dense["curve"][-1][1] for ours, dense in both]
        first = both[0][0]
        seeds = [ours["settings"]["seed"] for ours, _ in both]
        share = f"{first['floats'] / first['dense_floats']:.1%}"
        tokens = f"{first['curve'][-1][0]:,}"
        rows.append([f"{size:,}", share, tokens, seeds, spread(ends, 3), spread(ratios[0], 3), spread(ratios[1], 2)])
    titles = ["V", "floats", "tokens", "seeds", "validation, of dense", "test, of dense", "seconds a step, of dense"]
    print(markdown_table(titles, rows))
    if args.picture is not None:
        picture(found).savefig(args.picture)


if __name__ == "__main__":
    main()
