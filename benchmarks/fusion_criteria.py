"""Every criterion of fusion beside every fixed weight, on a base that is made of the large model's own layers.

    python -m benchmarks.fusion_criteria --model my.gguf --base models/pruned --experts models/arithmetic-*
        --source gsm8k-held.jsonl [--rows 64] [--validation-rows 32] [--answers 0] [--picture picture.png]
        [--beside models/python]

The base comes from lm_prune.yaml, the experts (one a seed) from lm_instruct.yaml. The rows of a file are prompts
(`question`) and responses (`answer`) that none of them has seen: the first validate, the others test.
`--source python-questions` takes the splits of that recipe. Each model reads a text once, and all settings are judged
from the same logits (`FusionCalibration`): perplexity of the responses, mean ± standard deviation over the experts, and
paired with the best fixed weight. "Calibrated" are the settings that did best on the rows that validate. With
`--answers N` the first N prompts that test are also answered by greedy decoding. Exact match counts the right final
numbers, token F1 the words that answer and response share. With `--rows 0` nothing else is done and nothing
calibrated. With `--beside` experts of other tasks stand beside each expert, and only the ways to choose among them are
compared. With `--drafts N` as many are continued one at a time, with and without drafts of the base.
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Sequence
from itertools import islice
from math import exp
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.fusion_answers import answers, drafts, first_rows
from benchmarks.measure import machine, markdown_table, spread
from lit_logits import DynamicFusionDecoder
from lit_logits.datamodules import InstructionDataModule, PairSource
from lit_logits.modules import find_tokenizer, load_causal_lm
from lit_logits.modules.dynamic_fusion.calibration import FusionCalibration, FusionCandidate

PROXY = 1.0
"""The fixed weight of proxy tuning."""
GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
CRITERIA = ("distance", "projection", "equal", "uncertain", "prompt")
SCALED = FusionCandidate("equal", 1.5)
SETTINGS = [
    *(FusionCandidate(None, static_alpha=(alpha,)) for alpha in GRID),
    *(FusionCandidate(name) for name in CRITERIA),
    SCALED,
]
Ratings = dict[FusionCandidate, tuple[float, float]]


def read_batches(args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Batches that validate and batches that test."""
    shared: dict[str, Any] = {"batch_size": args.batch_size, "max_length": args.max_length, "tokenizer": args.model}
    rows = max(args.rows, args.answers)
    cut = args.validation_rows // args.batch_size
    if not Path(args.source).exists():
        data = InstructionDataModule(args.source, **shared, max_test_rows=rows)
        data.prepare_data()
        data.setup("validate")
        data.setup("test")
        return list(islice(data.val_dataloader(), cut)), list(data.test_dataloader())
    source = PairSource(args.source, prompt_column="question", response_column="answer")
    rows += args.validation_rows
    data = InstructionDataModule(source, **shared, val_fraction=0.0, test_fraction=1.0, max_test_rows=rows)
    data.prepare_data()
    data.setup("test")
    batches = list(data.test_dataloader())
    return batches[:cut], batches[cut:]


def rate(decoder: DynamicFusionDecoder, batches: list[Any], candidates: Sequence[FusionCandidate] = ()) -> Ratings:
    """Nats a token and mean α of each candidate, or of all."""
    calibration = FusionCalibration(decoder.fused, GRID, candidates)
    for batch in batches:
        calibration.update(decoder.fused, batch["input_ids"], batch["labels"], batch.get("attention_mask"))
    return {rating.candidate: (rating.nll, rating.alpha) for rating in calibration.compute()}


def perplexity(model: Any, tokenizer: Any, batches: list[Any]) -> float:
    """Of one model alone."""
    decoder = DynamicFusionDecoder(model, tokenizer=tokenizer)
    scores = [decoder.score(batch["input_ids"], batch["labels"], batch.get("attention_mask")) for batch in batches]
    log_probs = torch.cat([score.log_probs[score.trace.mask] for score in scores])
    return exp(-float(log_probs.double().mean()))


def fixed(alpha: float) -> FusionCandidate:
    return FusionCandidate(None, static_alpha=(alpha,))


def best_fixed(tests: list[Ratings]) -> float:
    """The fixed weight of the lowest mean loss."""
    return min(GRID, key=lambda alpha: statistics.fmean(test[fixed(alpha)][0] for test in tests))


def table(tests: list[Ratings], calibrated: list[FusionCandidate], alone: dict[str, list[float]]) -> str:
    """A line for each setting."""
    best = best_fixed(tests)
    rows: list[list[object]] = [[name, spread(values, 3), "", ""] for name, values in alone.items()]

    def add(name: str, chosen: list[FusionCandidate]) -> None:
        nll = [test[one][0] for test, one in zip(tests, chosen, strict=True)]
        ratio = [exp(value - test[fixed(best)][0]) for value, test in zip(nll, tests, strict=True)]
        alpha = [test[one][1] for test, one in zip(tests, chosen, strict=True)]
        rows.append([name, spread([exp(value) for value in nll], 3), spread(ratio, 4), spread(alpha, 2)])

    for alpha in GRID:
        add("large alone" if alpha == 0 else f"fixed α = {alpha}", [fixed(alpha)] * len(tests))
    for name in CRITERIA:
        add(f"`{name}`", [FusionCandidate(name)] * len(tests))
    add(f"`{SCALED.criterion}` times {SCALED.scale}", [SCALED] * len(tests))
    add("calibrated", calibrated)
    return markdown_table(["", "perplexity", f"of fixed α = {best}", "mean α"], rows)


def rate_beside(
    models: tuple[Any, Any, list[Any]], others: list[Any], batches: list[Any], tokenizer: Any
) -> dict[str, list[float]]:
    """Perplexities of the experts, one at a time: alone, and beside those of other tasks, by who acts."""
    large, base, experts = models
    found: dict[str, list[float]] = {}
    for expert in experts:
        ways: list[tuple[str, list[Any], dict[str, Any]]] = [("alone", [expert], {})]
        ways += [(f"routing: {routing}", [expert, *others], {"routing": routing}) for routing in ("step", "text")]
        ways += [("mode: joint", [expert, *others], {"mode": "joint"})]
        for name, chosen, settings in ways:
            decoder = DynamicFusionDecoder(large, base, chosen, tokenizer=tokenizer, **settings)
            candidates = [
                FusionCandidate("projection"),
                *([] if name == "mode: joint" else [FusionCandidate("distance")]),
            ]
            for candidate, (nll, _) in rate(decoder, batches, candidates).items():
                found.setdefault(f"`{candidate.criterion}`, {name}", []).append(exp(nll))
    return found


def draw(tests: list[Ratings], path: Path) -> None:
    """Perplexity over the fixed weight, with a line for each criterion."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()

    def mean(candidate: FusionCandidate) -> float:
        return exp(statistics.fmean(test[candidate][0] for test in tests))

    axes.plot(GRID, [mean(fixed(alpha)) for alpha in GRID], "o-", color="black", label="fixed α")
    for number, name in enumerate(CRITERIA):
        axes.axhline(mean(FusionCandidate(name)), color=f"C{number}", linestyle="--", label=name)
    axes.set(xlabel="fixed α", ylabel="perplexity of held-out responses", yscale="log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.legend(frameon=False)
    figure.savefig(path, dpi=80)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--experts", nargs="+", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--validation-rows", type=int, default=32)
    parser.add_argument("--answers", type=int, default=0)
    parser.add_argument("--answer-tokens", type=int, default=160)
    parser.add_argument("--answer-experts", type=int, help="the first so many; all without it")
    parser.add_argument("--answer-ways", nargs="+", help="those whose names hold one of these words; all without it")
    parser.add_argument("--beside", nargs="+", default=[], help="experts of other tasks, beside each of `--experts`")
    parser.add_argument("--drafts", type=int, default=0, help="prompts to continue with drafts of the base")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args(arguments)
    if args.validation_rows < 1 or args.validation_rows % args.batch_size:
        parser.error(f"--validation-rows must be a multiple of {args.batch_size}, but is {args.validation_rows}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    large, base = load_causal_lm(args.model), load_causal_lm(args.base)
    tokenizer = find_tokenizer(args.model, required=True)
    held_out, answered = read_batches(args)
    batches = first_rows(answered, args.rows)
    experts = [load_causal_lm(name) for name in args.experts]
    if args.beside:
        others = [load_causal_lm(name) for name in args.beside]
        found = rate_beside((large, base, experts), others, batches, tokenizer)
        rows = sorted([name, spread(values, 3)] for name, values in found.items())
        print(f"{markdown_table([f'beside {len(others)} more', 'perplexity'], rows)}\n\n{args.rows} responses")
        print(machine(torch.device("cpu")))
        return
    tests: list[Ratings] = []
    calibrated = []
    alone: dict[str, list[float]] = {"base alone": [], "expert alone": []}
    if batches:
        alone["base alone"].append(perplexity(base, tokenizer, batches))
    for name, expert in zip(args.experts, experts if batches else [], strict=False):
        decoder = DynamicFusionDecoder(large, base, [expert], tokenizer=tokenizer)
        validation = rate(decoder, held_out)
        calibrated.append(min(validation, key=lambda candidate: validation[candidate][0]))
        tests.append(rate(decoder, batches, [*SETTINGS, calibrated[-1]]))
        alone["expert alone"].append(perplexity(expert, tokenizer, batches))
        print(name, "calibrated:", calibrated[-1], tests[-1][calibrated[-1]], flush=True)
    if tests:
        print(f"\n{table(tests, calibrated, alone)}\n\n{args.rows} responses", flush=True)
        if args.picture is not None:
            draw(tests, args.picture)
    print(f"{machine(torch.device('cpu'))}\n", flush=True)
    if args.drafts:
        decoder = DynamicFusionDecoder(large, base, [experts[0]], tokenizer=tokenizer)
        print(f"{drafts(decoder, first_rows(answered, args.drafts), args.answer_tokens)}\n", flush=True)
    if args.answers:
        asked = first_rows(answered, args.answers)
        used = len(experts) if args.answer_experts is None else args.answer_experts
        models = large, base, experts[:used]
        chosen = calibrated[:used] or [fixed(PROXY)] * used
        best = best_fixed(tests) if tests else PROXY
        print(answers(args, models, asked, tokenizer, best, chosen), flush=True)


if __name__ == "__main__":
    main()
