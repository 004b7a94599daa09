"""What fusion does to a pretrained pivot: fine-tuning alone, with each term of each source, and with several.

    python -m benchmarks.gld_fusion_pretrained --twin models/smollm2.gguf --other models/gemma3.gguf
        [--data python-questions | gsm8k-train.jsonl] [--folder runs/pretrained] [--train-rows 64]
        [--seeds 0 1 2] [--steps 40]
        [--lrs 1e-4 3e-4 1e-3] [--kd-weights 0.5 0.9] [--ways SFT KL ...] [--out runs.json] [--answers 100]

The pivot is the twin with `--layers` of its layers, healed by KL to the whole of it (`CausalLM(keep_layers=...)`) on
pairs that are drawn for nothing else. Sources are the whole twin, of the pivot's tokenizer, fine-tuned for
`--tune-steps` on these other pairs too, and another model of another tokenizer, as it is, both from caches. Pairs,
pivot and caches are made once, in `--folder`. Embeddings stay frozen.

The first seed chooses on validation: the rate of fine-tuning (SFT), which all ways take over, then λ of every other
way. The choice is then run with all seeds, each with an order of batches of its own, which all ways share. A way has
the steps of SFT. Means ± sample standard deviations over the seeds, on held-out responses: perplexity, its ratio to
that of SFT of the same seed, and agreement with each source, the share of aligned positions where the most likely
tokens begin alike. Speed is in the pivot's tokens a second of CPU time, the median step of all seeds of one process.

With `--out` each run is written to the file when it is done, and runs that are there are not made again: the same
command goes on after a kill, prints the table once more, or takes another seed. With `--answers` the pivot also writes
answers to so many held-out prompts, of which final numbers are compared, as in GSM8K.
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F

from benchmarks.gld_fusion import TokenTexts, begin_alike
from benchmarks.measure import machine, markdown_table, spread
from benchmarks.pretrained_pivot import OTHER, TWIN, cosine_with_warmup, make_trainer, prepare
from lit_logits import GLDFusionModule
from lit_logits.modules import LogitCache, find_tokenizer, load_causal_lm, split_prompts
from lit_logits.modules.dynamic_fusion.answers import extract_answer
from lit_logits.modules.gld_fusion.alignment import align_source
from lit_logits.modules.gld_fusion.sources import ends_to_align
from lit_logits.modules.language_models.calls import counted_states
from lit_logits.modules.language_models.inspect import freeze_tables
from lit_logits.storage.folders import replace_file

GLD, CHUNK = 0.01, 100.0
"""Weights that bring the bound, a sum of strengths, and the chunks, whose divergence falls with their τ, to nats."""

Terms = dict[str, dict[str, float]]

EVERYTHING: Terms = {"kl": {TWIN: 1.0}, "matched": {OTHER: 1.0}, "chunk": {TWIN: CHUNK, OTHER: CHUNK}}

WAYS: dict[str, Terms] = {
    "SFT": {},
    **{f"ULD, {name}": {"uld": {name: 1.0}} for name in (TWIN, OTHER)},
    **{f"GLD, {name}": {"gld": {name: GLD}} for name in (TWIN, OTHER)},
    "KL, twin": {"kl": {TWIN: 1.0}},
    "matched, other": {"matched": {OTHER: 1.0}},
    **{f"chunk, {name}": {"chunk": {name: CHUNK}} for name in (TWIN, OTHER)},
    "KL + GLD, twin": {"kl": {TWIN: 1.0}, "gld": {TWIN: GLD}},
    "KL + chunk, twin": {"kl": {TWIN: 1.0}, "chunk": {TWIN: CHUNK}},
    "matched + chunk, other": {"matched": {OTHER: 1.0}, "chunk": {OTHER: CHUNK}},
    "all three, both averaged": EVERYTHING,
    "all three, both routed": EVERYTHING,
}
"""Terms of each way with their weights by source."""


class Case(NamedTuple):
    """A run: a way, its rate, its λ, and the seed."""

    way: str
    lr: float
    kd_weight: float
    seed: int

    def __str__(self) -> str:
        share = f", λ {self.kd_weight:g}" if self.kd_weight else ""
        return f"{self.way}, lr {self.lr:g}{share}, seed {self.seed}"


class Bench(NamedTuple):
    """What all runs share."""

    args: argparse.Namespace
    data: Any
    caches: dict[str, str]
    texts: dict[str, TokenTexts]


Run = dict[str, Any]


# ---------------------------------------------------------------------- a run


class Clock(L.Callback):
    """Notes seconds of CPU time and tokens of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.began = time.process_time()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock."""
        self.steps.append((time.process_time() - self.began, int(batch["attention_mask"].sum())))

    @property
    def tokens_a_second(self) -> float:
        """Median over the steps."""
        return statistics.median(tokens / seconds for seconds, tokens in self.steps)


def make_module(bench: Bench, case: Case) -> GLDFusionModule:
    pivot, terms = load_causal_lm(str(bench.args.folder / "pivot")), WAYS[case.way]
    freeze_tables(pivot)
    used = [name for name in bench.caches if any(name in weights for weights in terms.values())]
    return GLDFusionModule(
        pivot,
        {name: bench.caches[name] for name in used},
        bench.data.vocab_size,
        kd_weight=case.kd_weight,
        terms=terms,  # type: ignore[arg-type]
        source_routing="nll" if case.way.endswith("routed") else None,
        top_k=bench.args.top_k,
        **cosine_with_warmup(case.lr, bench.args.steps),
    )


def train(bench: Bench, case: Case, settings: Run) -> Run:
    """Train the pivot one way, and return what is kept of the run."""
    L.seed_everything(case.seed, verbose=False)
    bench.data.seed = case.seed  # of the order of training
    module, clock = make_module(bench, case), Clock()
    trainer = make_trainer(
        max_steps=bench.args.steps,
        max_epochs=-1,
        precision=bench.args.precision,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=[clock],
    )
    trainer.fit(module, bench.data)
    shares = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("train/share")}
    return {
        "settings": settings,
        "val_ppl": evaluate(bench, module, bench.data.val_dataloader())["ppl"],
        **evaluate(bench, module, bench.data.test_dataloader(), bench.caches),
        **({"answers": answer(bench, module)} if bench.args.answers else {}),
        "shares": shares,
        "tokens_a_second": clock.tokens_a_second,
        "machine": machine(module.device),
    }


@torch.no_grad()
def evaluate(bench: Bench, module: GLDFusionModule, loader: Any, caches: Mapping[str, str] | None = None) -> Run:
    """Perplexity, and for each source the aligned share and the agreement."""
    module.eval()
    sums: dict[str, float] = {"nll": 0.0, "tokens": 0.0}
    sources = {name: LogitCache(folder) for name, folder in (caches or {}).items()}
    for batch in loader:
        mask, hidden, labels = counted_states(module.pivot, batch)  # type: ignore[arg-type]
        logits = module.pivot.get_output_embeddings()(hidden)[:, : bench.data.vocab_size]  # type: ignore[union-attr]
        sums["nll"] += float(F.cross_entropy(logits, labels, reduction="sum"))
        sums["tokens"] += len(labels)
        best = logits.argmax(-1)
        for name, cache in sources.items():
            source = cache.read(batch["sample_ids"], top_k=1)
            partner = align_source(source, mask, ends_to_align(name, cache, batch)).partner[mask]
            theirs = source.top_k.token_ids[mask.nonzero()[:, 0], partner.clamp(min=0), 0]
            aligned = partner >= 0
            alike = begin_alike(bench.texts[TWIN](best[aligned]), bench.texts[name](theirs[aligned]))
            for column, value in {"alike": sum(alike), "of": len(alike)}.items():
                sums[f"{column} {name}"] = sums.get(f"{column} {name}", 0.0) + value
    found = {f"agree {name}": sums[f"alike {name}"] / max(1.0, sums[f"of {name}"]) for name in sources}
    return {"ppl": float(torch.tensor(sums["nll"] / sums["tokens"]).exp()), **found}


@torch.no_grad()
def answer(bench: Bench, module: GLDFusionModule) -> float:
    """The share of held-out prompts whose answer ends in the right number."""
    right = total = 0
    for batch in bench.data.test_dataloader():
        if total >= bench.args.answers:
            break
        prompts, mask = split_prompts(batch, bench.data.pad_token_id)
        options: dict[str, Any] = {"max_new_tokens": bench.args.max_length, "do_sample": False}
        texts = module.pivot.generate(prompts, attention_mask=mask, **options)[:, prompts.shape[1] :]  # type: ignore[union-attr, operator]
        labels = batch["labels"].masked_fill(batch["labels"] == -100, bench.data.pad_token_id)
        written, wanted = (bench.data.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (texts, labels))
        for one, two in zip(written, wanted, strict=True):
            right += extract_answer(one) == extract_answer(two) is not None
            total += 1
    return right / max(1, total)


# ---------------------------------------------------------------------- all runs


def run_all(bench: Bench, cases: Sequence[Case]) -> dict[Case, Run]:
    """Make the runs that the file of results does not hold yet."""
    args, runs = bench.args, {}
    kept: list[Run] = json.loads(args.out.read_text())["runs"] if args.out and args.out.exists() else []
    seconds: list[float] = []
    for number, case in enumerate(cases, 1):
        settings = run_settings(args, case)
        found = next((run for run in kept if run["settings"] == settings), None)
        if found is None:
            began = time.perf_counter()
            found = train(bench, case, settings)
            seconds.append(time.perf_counter() - began)
            kept.append(found)
            if args.out:
                text = json.dumps({"runs": kept}, indent=1)
                replace_file(args.out, lambda path, text=text: path.write_text(text))  # type: ignore[misc]
            left = statistics.mean(seconds) * (len(cases) - number) / 60
            ppl = f"validation {found['val_ppl']:.3f}, test {found['ppl']:.3f}"
            print(f"{number} of {len(cases)}: {case}: {ppl}, {left:.0f} min left", flush=True)
        runs[case] = found
    return runs


def run_settings(args: argparse.Namespace, case: Case) -> Run:
    """All that decides what a run comes to, as JSON has it."""
    prepared = json.loads((args.folder / "settings.json").read_text())
    shared = {name: getattr(args, name) for name in ("train_rows", "steps", "answers", "precision")}
    return json.loads(json.dumps({**prepared, **shared, **case._asdict(), "terms": WAYS[case.way]}))


def choose(bench: Bench) -> tuple[dict[str, Case], dict[Case, Run]]:
    """Run the first seed at all rates and shares; return for each way the case of the best validation, and the runs."""
    args = bench.args
    rates = [Case("SFT", lr, 0.0, args.seeds[0]) for lr in args.lrs]
    runs = run_all(bench, rates)
    chosen = {"SFT": min(rates, key=lambda case: runs[case]["val_ppl"])}
    cases = [Case(way, chosen["SFT"].lr, kd, args.seeds[0]) for way in args.ways[1:] for kd in args.kd_weights]
    runs |= run_all(bench, cases)
    for way in args.ways[1:]:
        chosen[way] = min((case for case in cases if case.way == way), key=lambda case: runs[case]["val_ppl"])
    return chosen, runs


# ---------------------------------------------------------------------- results


def table(bench: Bench, chosen: Mapping[str, Case], runs: Mapping[Case, Run]) -> str:
    seeds, rows = bench.args.seeds, []
    base = [runs[chosen["SFT"]._replace(seed=seed)] for seed in seeds]
    for way, case in chosen.items():
        own = [runs[case._replace(seed=seed)] for seed in seeds]
        row: list[object] = [way if way == "SFT" else f"SFT + {way}", f"{case.kd_weight:g}"]
        row.append(spread([run["ppl"] for run in own], 2))
        row.append(spread([run["ppl"] / other["ppl"] for run, other in zip(own, base, strict=True)]))
        row += [spread([run[f"agree {name}"] for run in own]) for name in bench.caches]
        row += [spread([run["answers"] for run in own])] if bench.args.answers else []
        rows.append([*row, f"{statistics.median(run['tokens_a_second'] for run in own):.0f}"])
    header = ["way", "λ", "perplexity", "ratio to SFT", *(f"agreement {name}" for name in bench.caches)]
    return markdown_table([*header, *(["exact match"] if bench.args.answers else []), "tokens a second"], rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--twin", default="models/smollm2.gguf", help="the pivot is cut from it")
    parser.add_argument("--other", default="models/gemma3.gguf", help="a source of another tokenizer")
    parser.add_argument("--data", default="python-questions", help="or a file of pairs")
    parser.add_argument("--columns", nargs=2, default=["question", "answer"], help="of a file of pairs")
    parser.add_argument("--folder", type=Path, default=Path("runs/pretrained"), help="of pairs, pivot and caches")
    parser.add_argument("--drawn-rows", type=int, default=320, help="pairs to train on; the others heal the pivot")
    parser.add_argument("--train-rows", type=int, help="use so many of them; default all")
    parser.add_argument("--rows", type=int, default=128, help="to test with; half as many to validate")
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 6, 11, 16, 21, 28, 29])
    parser.add_argument("--heal-steps", type=int, default=80)
    parser.add_argument("--heal-batch", type=int, default=4)
    parser.add_argument("--heal-block", type=int, default=128)
    parser.add_argument("--heal-lr", type=float, default=1e-3)
    parser.add_argument("--state-weight", type=float, default=0.1)
    parser.add_argument("--tune-steps", type=int, default=100, help="of the twin, before it is a source; 0 is as it is")
    parser.add_argument("--tune-lr", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--kd-weights", type=float, nargs="+", default=[0.5, 0.9])
    parser.add_argument("--ways", nargs="+", help="SFT and those whose label holds one of these; default all")
    parser.add_argument("--answers", type=int, default=0, help="prompts to answer, whose last numbers are compared")
    parser.add_argument("--precision", default="32-true", help="of Lightning; bf16-mixed where the CPU has it")
    parser.add_argument("--out", type=Path, help="JSON file of finished runs")
    args = parser.parse_args(arguments)
    args.train_rows = args.train_rows or args.drawn_rows
    args.ways = [way for way in WAYS if way == "SFT" or not args.ways or any(part in way for part in args.ways)]
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    caches = {name: str(args.folder / name) for name in (TWIN, OTHER)}
    data = prepare(args, list(caches))
    texts = {TWIN: TokenTexts(data.tokenizer), OTHER: TokenTexts(find_tokenizer(args.other, required=True))}
    bench = Bench(args, data, caches, texts)
    chosen, runs = choose(bench)
    # Seed by seed, so that a table of fewer seeds is there as early as it can be.
    runs |= run_all(bench, [case._replace(seed=seed) for seed in args.seeds for case in chosen.values()])
    print(f"\n{table(bench, chosen, runs)}\n\nSFT at lr {chosen['SFT'].lr:g} of {args.lrs},", end=" ")
    print(f"λ of {args.kd_weights};", end=" ")
    print(f"{args.steps} steps of {args.batch_size} pairs, seeds {args.seeds}; {machine(torch.device('cpu'))}")


if __name__ == "__main__":
    main()
