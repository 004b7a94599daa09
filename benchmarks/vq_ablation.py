"""Codebook size × start × mapping on the embedded corpus, beside the dense baseline at equal steps.

    python -m benchmarks.vq_ablation [--steps 300] [--seeds 0 1 2] [--starts cooccurrence] [--tables scratch]

Two tables: models trained from scratch, and models whose dense output layer was replaced after as many steps of
pretraining and then trained on as long. Perplexity is that of the test split, mean ± sample standard deviation over
the seeds; the floor is what the mapping and bias allow at best on the running training counts.
"""

import argparse
import itertools
import math
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from benchmarks.measure import machine, markdown_table, spread
from benchmarks.vq_training import BACKBONE, fit, make_model, revival, test_ppl, unigram_ppl
from lit_logits import VQLogitsLM
from lit_logits.contracts import WatchedHead
from lit_logits.datamodules import TextDataModule
from lit_logits.modules import DenseLogitsHead, HierarchicalVQLogitsHead, VQLogitsHead

SCRATCH: list[dict[str, Any]] = [
    {"init": "cooccurrence"},
    {"init": "cooccurrence", "bias": False},
    {"init": "cooccurrence", "mapping": "learned", "reassign_every_n_steps": 5},
    {"init": "random"},
    {"init": "random", "bias": False},
    {"init": "frequency"},
    {"init": "frequency", "bias": False},
    {"init": "frequency", "mapping": "reassigned", "reassign_every_n_steps": 20},
    {"init": "frequency", "mapping": "learned", "reassign_every_n_steps": 5},
    {"init": "frequency", "mapping": "learned", "reassign_every_n_steps": 5, "codebook_update": "ema", "decay": 0.9},
    {"init": "frequency", "codebook_update": "ema", "decay": 0.9},
]
HIERARCHICAL: dict[int, list[tuple[int, ...]]] = {
    128: [(64, 64), (64, *[16] * 4), (32, *[16] * 6)],
    512: [(256, 256), (256, *[64] * 4), (128, *[64] * 6), (128, *[32] * 12)],
}
"""Clusters and stages whose codes are as many in all as those of one level."""
REPLACED: list[dict[str, Any]] = [
    {"init": "random"},
    {"init": "frequency"},
    {"init": "kmeans"},
    {"init": "weighted_kmeans"},
    {"init": "weighted_kmeans", "mapping": "learned", "reassign_every_n_steps": 5},
]


class Run(NamedTuple):
    """What a training run came to; `start_ppl` is before its first step."""

    start_ppl: float
    ppl: float
    floor: float
    used_codes: float


def train(settings: dict[str, Any], data: TextDataModule, steps: int, seed: int, save: Path | None = None) -> Run:
    L.seed_everything(seed, verbose=False)
    backbone, head = settings.pop("backbone", BACKBONE), settings.pop("head", VQLogitsHead)
    model = make_model(partial(head, **settings), data, steps=steps, backbone=backbone)
    model.initialize_head(data.train_dataloader())
    start = test_ppl(model, data)
    fit(model, data, steps, [revival(steps)] if head is VQLogitsHead else [], limit_val_batches=0)
    ppl = test_ppl(model, data)
    if save is not None:
        _save_dense(model, save)
    if isinstance(model.head, WatchedHead):
        return Run(start, ppl, float(model.head.ppl_floor()), float((model.head.usage() > 0).sum()))
    return Run(start, ppl, 1.0, float("nan"))


def _save_dense(model: VQLogitsLM, folder: Path) -> None:
    """The trained dense model as a plain transformers model with an output layer of its own."""
    from transformers import AutoModelForCausalLM

    causal_lm = AutoModelForCausalLM.from_config(model.backbone.config)
    causal_lm.base_model.load_state_dict(model.backbone.state_dict())
    causal_lm.get_output_embeddings().weight.data.copy_(model.head.weight.data)
    causal_lm.save_pretrained(folder)


def _describe(settings: dict[str, Any]) -> list[object]:
    codes = settings.get("codebook_size", "dense")
    if "codebook_sizes" in settings:
        clusters, *stages = settings["codebook_sizes"]
        return [f"{clusters} + {len(stages)} × {stages[0]}", "cooccurrence", "fixed", "yes"]
    if codes == "dense":
        return ["dense", "", "", ""]
    mapping = settings.get("mapping", "fixed")
    update = " + EMA codebook" if settings.get("codebook_update") == "ema" else ""
    return [codes, settings["init"], f"{mapping}{update}", "yes" if settings.get("bias", True) else "no"]


def _table(cases: list[dict[str, Any]], data: TextDataModule, args: argparse.Namespace, sources: dict[int, str]) -> str:
    header = ["K", "init", "mapping", "bias", "before", "test perplexity", "ratio to dense", "floor", "used codes"]
    rows: list[list[object]] = []
    dense: list[Run] = []
    for settings in cases:
        runs = []
        for seed in args.seeds:
            backbone = {"backbone": sources[seed]} if sources else {}
            runs.append(train({**settings, **backbone}, data, args.steps, seed))
            print(settings, seed, runs[-1], flush=True)
        dense = dense or runs
        rows.append(
            [
                *_describe(settings),
                spread([run.start_ppl for run in runs], 1),
                spread([run.ppl for run in runs], 1),
                spread([run.ppl / base.ppl for run, base in zip(runs, dense, strict=True)]),
                spread([run.floor for run in runs], 2),
                f"{sum(run.used_codes for run in runs) / len(runs):.0f}" if not math.isnan(runs[0].used_codes) else "",
            ]
        )
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--codes", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--starts", nargs="+", help="of these starts only, and two levels with cooccurrence")
    parser.add_argument("--tables", nargs="+", default=["scratch", "replaced"])
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    data = TextDataModule(block_size=128, batch_size=8)
    data.prepare_data()
    data.setup()
    scratch: list[dict[str, Any]] = []
    for codes in args.codes:
        scratch += [
            {"codebook_size": codes, **case} for case in SCRATCH if case["init"] in (args.starts or case["init"])
        ]
        if args.starts is None or "cooccurrence" in args.starts:
            sizes = HIERARCHICAL.get(codes, [])
            scratch += [{"head": HierarchicalVQLogitsHead, "codebook_sizes": given} for given in sizes]
    replaced = [{"codebook_size": codes, **case} for codes, case in itertools.product(args.codes, REPLACED)]
    dense: dict[str, Any] = {"head": DenseLogitsHead}
    with tempfile.TemporaryDirectory() as folder:
        sources = {seed: f"{folder}/{seed}" for seed in args.seeds}
        if "replaced" in args.tables:
            for seed, source in sources.items():
                train({"head": DenseLogitsHead, "bias": False}, data, args.steps, seed, save=Path(source))
        first = _table([dense, *scratch], data, args, {}) if "scratch" in args.tables else ""
        second = _table([dense, *replaced], data, args, sources) if "replaced" in args.tables else ""
    print(f"\nV = {data.vocab_size:,}, {args.steps} steps of 8 × 128 tokens, seeds {args.seeds};", end=" ")
    print(f"unigram test perplexity {unigram_ppl(data):.1f}; {machine(torch.device('cpu'))}\n")
    for title, table in (("From scratch", first), ("Dense output layer replaced after pretraining", second)):
        if table:
            print(f"{title}:\n\n{table}\n")


if __name__ == "__main__":
    main()
