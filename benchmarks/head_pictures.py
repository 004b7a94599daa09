"""Heads that learn from labels, from the paper's loss too, and from both on heads of their own, side by side.

    python -m benchmarks.head_pictures --settings banking77-few --data FOLDER --picture heads.png

The students are those of `benchmarks.dual_head_kd`, with the paper's own loss and weight: a sum over classes, α = 1.
The picture has the cosines between the rows of each main head, which on a simplex are all −1/(C − 1).
"""

import argparse
import logging
import warnings
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.dual_head_kd import Bench, Run, parse
from lit_logits.functional.neural_collapse import cosine_matrix, simplex_gap

PAPER = "BinaryKL-Norm, the paper's sum"
HEADS = [
    ("labels alone", "CE", "one head"),
    ("one head for both", PAPER, "one head"),
    ("two heads", PAPER, "two heads"),
]


def main(arguments: list[str] | None = None) -> None:
    """Train the three and draw their heads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, required=True, help="file to write; the others as in dual_head_kd")
    own, others = parser.parse_known_args(arguments)
    args = parse(others)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bench, name, seed = Bench(args), args.settings[0], args.seeds[0]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    panels = figure.subplots(1, len(HEADS))
    for panel, (title, loss, form) in zip(panels, HEADS, strict=True):
        model, data, trainer = bench.fit(Run(name, seed, loss, form, 1.0))
        accuracy = trainer.test(model, datamodule=data, verbose=False)[0]["test/acc"]
        cosines = cosine_matrix(model.net.main_head.weight.detach())
        image = panel.imshow(cosines, interpolation="nearest", cmap="RdBu_r", vmin=-1, vmax=1)
        gap = float(simplex_gap(cosines))
        panel.set(title=f"{title}: {accuracy:.1%}, NC2 {gap:.2f}", xlabel="class", ylabel="class")
        print(title, accuracy, gap, flush=True)
    figure.colorbar(image, ax=panels, label="cosine of two rows of the head")
    figure.savefig(own.picture, dpi=80)


if __name__ == "__main__":
    main()
