"""Output layers trained from scratch beside the dense one, at equal steps and in the same order of text.

    python -m benchmarks.vq_scratch [--text FILE_OR_FOLDER ...] [--vocab-size 16384 | --tokenizer FOLDER_OR_GGUF]
        [--steps 300] [--seeds 0 1 2] [--heads dense one two ...] [--share 0.01 | --codes 128 64 64]
        [--fit-at 0.9] [--lr 2e-3] [--dense-lrs 1e-3 2e-3 4e-3] [--evaluate-every 30] [--out runs.json]
        [--plot runs.png]

Heads: `dense`; `adaptive`, torch's adaptive softmax; `low_rank`, the dense layer as two factors; `one`, a codebook, and
`two`, clusters with stages of codes, both started from co-occurrence; `one_reassigned` and `two_reassigned`, the same
with `CodebookReassign` in the middle of the training (`--reassign-at`), whose reading of text is not counted as steps;
`two_fitted`, the same where tokens own vectors until `CodebookFit` codes them (`--fit-at`).
Codebooks have `--share` of the dense layer's floats, and the factors as many, or their rank is 1. With several rates
the best by validation counts, and all are printed. Each seed has an initial backbone and an order of text of its own,
which all heads share; ratios are to the dense head of the same seed. Perplexity is that of the test split, mean ±
sample standard deviation over the seeds.

With `--out` each run is written to the file when it is done, and runs that are there are not made again: the same
command goes on after a kill, prints the table once more, or takes another seed.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from torch import nn

from benchmarks.measure import machine, markdown_table, spread
from benchmarks.vq_rivals import AdaptiveSoftmaxHead, LowRankHead, equal_rank
from benchmarks.vq_training import (
    BACKBONE,
    LR,
    add_text_arguments,
    fit,
    make_model,
    make_trainer,
    open_text,
    revival,
    split_rows,
    test_ppl,
    unigram_ppl,
)
from lit_logits.callbacks import CodebookFit, CodebookReassign
from lit_logits.datamodules import TextDataModule
from lit_logits.datamodules.tokenization import tokenizer_id
from lit_logits.modules import DenseLogitsHead, HierarchicalVQLogitsHead, VQLogitsHead
from lit_logits.storage.folders import replace_file

HEADS: dict[str, tuple[str, type[nn.Module]]] = {
    "dense": ("dense", DenseLogitsHead),
    "adaptive": ("adaptive softmax", AdaptiveSoftmaxHead),
    "low_rank": ("low rank", LowRankHead),
    "one": ("one level", VQLogitsHead),
    "two": ("two levels", HierarchicalVQLogitsHead),
    "one_reassigned": ("one level, re-assigned", VQLogitsHead),
    "two_reassigned": ("two levels, re-assigned", HierarchicalVQLogitsHead),
    "two_fitted": ("two levels, fitted to vectors", HierarchicalVQLogitsHead),
}
CUTOFFS = (1 / 8, 1 / 2)
"""Where short list and first group of the adaptive softmax end, as shares of the vocabulary."""


class Case(NamedTuple):
    """A run: a head, its rate, and the seed."""

    head: str
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{HEADS[self.head][0]}, lr {self.lr:g}, seed {self.seed}"


Runs = dict[Case, dict[str, Any]]


# ---------------------------------------------------------------------- settings


def head_options(head: str, vocab_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a head."""
    rows = sum(args.codes) if args.codes else round(args.share * vocab_size)
    own: dict[str, dict[str, Any]] = {
        "dense": {},
        "adaptive": {"cutoffs": [round(share * vocab_size) for share in CUTOFFS]},
        "low_rank": {"rank": equal_rank(rows, args.hidden_size, vocab_size)},
        "one": {"codebook_size": rows},
        "two": {"codebook_sizes": args.codes or split_rows(rows)},
    }
    kind, _, way = head.partition("_") if head.startswith(("one", "two")) else (head, "", "")
    return {**own[kind], **({"own_vectors": True} if way == "fitted" else {}), **args.options.get(kind, {})}


def run_settings(case: Case, data: TextDataModule, args: argparse.Namespace) -> dict[str, Any]:
    """All that decides what a run comes to, as JSON has it."""
    backbone = {
        **BACKBONE,
        "hidden_size": args.hidden_size,
        "intermediate_size": 3 * args.hidden_size,
        "num_hidden_layers": args.layers,
        "max_position_embeddings": args.block_size,
    }
    shared = ("steps", "evaluate_every", "batch_size", "block_size", "val_batches", "test_batches")
    settings = {
        **case._asdict(),
        "options": head_options(case.head, data.vocab_size, args),
        "revive": case.head.removesuffix("_reassigned") in args.revive,
        **({"fit_at": args.fit_at} if case.head.endswith("_fitted") else {}),
        "reassign": [round(share * args.steps) for share in args.reassign_at if case.head.endswith("_reassigned")],
        "backbone": backbone,
        "text": data.corpus.key,
        "tokenizer": tokenizer_id(data.tokenizer),
        **{name: getattr(args, name) for name in shared},
    }
    return json.loads(json.dumps(settings))


# ---------------------------------------------------------------------- training


class Progress(L.Callback):
    """Notes seconds of each step and the perplexity of each validation, and prints a line of it."""

    def __init__(self, case: Case, settings: dict[str, Any]) -> None:
        self.case, self.steps = case, settings["steps"]
        self.tokens = settings["batch_size"] * settings["block_size"]
        self.seconds: list[float] = []
        self.curve: list[tuple[int, float]] = []
        self.began = self.step_began = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.step_began = _now()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop the clock."""
        self.seconds.append(_now() - self.step_began)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Note the perplexity."""
        if trainer.state.fn == "fit":
            self.add(trainer.global_step, float(trainer.callback_metrics["val/ppl"]))

    def add(self, step: int, ppl: float) -> None:
        """Note a perplexity after so many steps."""
        self.curve.append((step * self.tokens, ppl))
        left = (time.perf_counter() - self.began) / step * (self.steps - step)
        took = f"{statistics.median(self.seconds):.3f} s a step, {left / 60:.1f} min left"
        print(f"{self.case}: step {step:,} of {self.steps:,}, validation {ppl:.2f}, {took}", flush=True)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(case: Case, settings: dict[str, Any], data: TextDataModule) -> dict[str, Any]:
    """Train a head from scratch, and return what is kept of the run."""
    data.seed = case.seed  # of the order of training
    L.seed_everything(case.seed, verbose=False)
    steps, val_batches = settings["steps"], settings["val_batches"]
    loader = data.train_dataloader()
    model = make_model(
        partial(HEADS[case.head][1], **settings["options"]),
        data,
        steps=steps,
        lr=case.lr,
        backbone=settings["backbone"],
        calibration_batches=len(loader),  # all heads count all of the text
    )
    began = time.perf_counter()
    model.initialize_head(loader)
    start_seconds = time.perf_counter() - began
    progress = Progress(case, settings)
    fit(
        model,
        data,
        steps,
        [
            progress,
            *([revival(steps)] if settings["revive"] else []),
            *([CodebookReassign(settings["reassign"])] if settings["reassign"] else []),
            *([CodebookFit(settings["fit_at"])] if "fit_at" in settings else []),
        ],
        val_check_interval=settings["evaluate_every"],
        check_val_every_n_epoch=None,
        limit_val_batches=val_batches,
        num_sanity_val_steps=0,
    )
    if steps % settings["evaluate_every"]:
        validator = make_trainer(limit_val_batches=val_batches)
        progress.add(steps, validator.validate(model, data, verbose=False)[0]["val/ppl"])
    sizes = {name: parameter.numel() for name, parameter in model.head.named_parameters()}
    return {
        "settings": settings,
        "floats": sum(size for name, size in sizes.items() if not name.endswith("bias")),
        "floats_with_biases": sum(sizes.values()),
        "dense_floats": data.vocab_size * settings["backbone"]["hidden_size"],
        "start_seconds": start_seconds,
        "step_seconds": statistics.median(progress.seconds),
        "curve": progress.curve,
        "test_ppl": test_ppl(model, data, limit_test_batches=settings["test_batches"]),
        "machine": machine(model.device),
    }


def run_all(cases: Sequence[Case], data: TextDataModule, args: argparse.Namespace) -> Runs:
    """Make the runs that the file of results does not hold yet."""
    kept: list[dict[str, Any]] = json.loads(args.out.read_text())["runs"] if args.out and args.out.exists() else []
    runs: Runs = {}
    for number, case in enumerate(cases, 1):
        settings = run_settings(case, data, args)
        found = next((run for run in kept if run["settings"] == settings), None)
        print(f"{number} of {len(cases)}: {case}{'' if found is None else ', done before'}", flush=True)
        if found is None:
            found = train(case, settings, data)
            kept.append(found)
            if args.out:
                text = json.dumps({"runs": kept}, indent=1)
                replace_file(args.out, lambda path, text=text: path.write_text(text))  # type: ignore[misc]
        runs[case] = found
    return runs


# ---------------------------------------------------------------------- results


def best_rates(runs: Runs) -> dict[str, float]:
    """Of each head, the rate with the lowest validation perplexity at the end, in the mean over the seeds."""
    ends: dict[tuple[str, float], list[float]] = {}
    for case, run in runs.items():
        ends.setdefault((case.head, case.lr), []).append(run["curve"][-1][1])
    means = {key: statistics.mean(values) for key, values in ends.items()}
    heads = dict.fromkeys(case.head for case in runs)
    return {head: min((mean, lr) for (of, lr), mean in means.items() if of == head)[1] for head in heads}


def table(runs: Runs, best: dict[str, float], seeds: Sequence[int]) -> str:
    rows: list[list[object]] = []
    for head, lr in dict.fromkeys((case.head, case.lr) for case in runs):
        own = [runs[Case(head, lr, seed)] for seed in seeds]
        ratio = ""
        if "dense" in best:
            dense = [runs[Case("dense", best["dense"], seed)]["test_ppl"] for seed in seeds]
            ratio = spread([run["test_ppl"] / ppl for run, ppl in zip(own, dense, strict=True)])
        others = any(case.head == head and case.lr != lr for case in runs)
        options = ", ".join(f"{name} {value}" for name, value in own[0]["settings"]["options"].items())
        rows.append(
            [
                f"{HEADS[head][0]}{f' ({options})' if options else ''}",
                f"{lr:g}{', best' if others and best[head] == lr else ''}",
                f"{own[0]['floats'] / own[0]['dense_floats']:.2%}",
                f"{own[0]['floats_with_biases'] / own[0]['dense_floats']:.2%}",
                spread([run["curve"][-1][1] for run in own], 2),
                spread([run["test_ppl"] for run in own], 2),
                ratio,
                f"{statistics.median(run['step_seconds'] for run in own):.4f}",
                f"{statistics.median(run['start_seconds'] for run in own):.1f}",
            ]
        )
    header = ["head", "lr", "floats", "with biases", "validation", "test perplexity", "ratio to dense", "s a step"]
    return markdown_table([*header, "s to start"], rows)


def picture(runs: Runs, best: dict[str, float], seeds: Sequence[int], title: str) -> Figure:
    """Validation perplexity over tokens read, of each head at its best rate, above its ratio to the dense head's."""
    figure = Figure(figsize=(8, 7.5), layout="constrained", dpi=110)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    curves = {head: [runs[Case(head, lr, seed)]["curve"] for seed in seeds] for head, lr in best.items()}
    for head, of_seeds in curves.items():
        color = colormaps["tab10"](list(HEADS).index(head))
        tokens = [point[0] for point in of_seeds[0]]
        ppl = torch.tensor([[point[1] for point in curve] for curve in of_seeds])
        size = runs[Case(head, best[head], seeds[0])]
        label = f"{HEADS[head][0]}, {100 * size['floats'] / size['dense_floats']:.1f} % of the floats"
        panels = [(above, ppl)]
        if "dense" in curves:
            panels.append((below, ppl / torch.tensor([[point[1] for point in curve] for curve in curves["dense"]])))
        for axes, values in panels:
            axes.plot(tokens, values.mean(0).numpy(), color=color, marker=".", linewidth=1.4, label=label)
            axes.fill_between(tokens, values.amin(0).numpy(), values.amax(0).numpy(), color=color, alpha=0.18, lw=0)
    above.set(xscale="log", yscale="log", ylabel="validation perplexity")
    below.set(xlabel="tokens read", ylabel="ratio to the dense head")
    above.yaxis.set_minor_formatter(LogFormatter())
    for axes in (above, below):
        axes.grid(which="both", linewidth=0.4, color="0.88")
        axes.set_axisbelow(True)
    above.legend(frameon=False, fontsize="small")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser, vocab_size=4096, block_size=128, batch_size=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--share", type=float, default=0.01, help="floats of the codebooks, of the dense layer's")
    parser.add_argument("--codes", type=int, nargs="+", help="clusters and stages; one level has as many in all")
    parser.add_argument("--options", type=json.loads, default={}, help='JSON, as {"two": {"max_cluster_size": 99}}')
    parser.add_argument("--revive", nargs="*", default=["one"], help="heads whose dead codes are revived")
    parser.add_argument("--reassign-at", nargs="+", type=float, default=[0.5], help="shares of the training")
    parser.add_argument("--fit-at", type=float, default=0.9, help="share of the training after which vectors are coded")
    parser.add_argument("--lr", type=float, nargs="+", default=[LR])
    parser.add_argument("--dense-lrs", type=float, nargs="+", help="of the dense head; default as the others")
    parser.add_argument("--hidden-size", type=int, default=BACKBONE["hidden_size"])
    parser.add_argument("--layers", type=int, default=BACKBONE["num_hidden_layers"])
    parser.add_argument("--evaluate-every", type=int, help="steps; default a tenth of them")
    parser.add_argument("--val-batches", type=int, default=64, help="of each validation")
    parser.add_argument("--test-batches", type=int, default=1 << 30, help="default all")
    parser.add_argument("--out", type=Path, help="JSON file of finished runs")
    parser.add_argument("--plot", type=Path, help="picture of the curves")
    args = parser.parse_args(arguments)
    args.evaluate_every = args.evaluate_every or max(1, args.steps // 10)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    data = open_text(args)
    rates = {head: args.dense_lrs if head == "dense" and args.dense_lrs else args.lr for head in args.heads}
    # Seed by seed, so that a table of fewer seeds is there as early as it can be.
    cases = [Case(head, lr, seed) for seed in args.seeds for head in args.heads for lr in rates[head]]
    runs = run_all(cases, data, args)
    best = best_rates(runs)
    tokens = args.steps * args.batch_size * args.block_size
    passes = args.steps / len(data.train_dataloader())
    title = (
        f"V = {data.vocab_size:,}, d = {args.hidden_size}, {args.layers} layers, {args.steps:,} steps of"
        f" {args.batch_size} × {args.block_size} tokens"
    )
    print(f"\n{table(runs, best, args.seeds)}\n\n{title}: {tokens:,}, {passes:.2f} times the text;", end=" ")
    print(f"seeds {args.seeds}; unigram test perplexity {unigram_ppl(data):.1f}; {runs[cases[0]]['machine']}")
    if args.plot:
        picture(runs, best, args.seeds, title).savefig(args.plot)


if __name__ == "__main__":
    main()
