"""Every criterion of fusion beside every fixed weight, on a base that is made of the large model's own layers.

    python -m benchmarks.fusion_criteria --model my.gguf --base models/pruned --experts models/arithmetic-*
        --source gsm8k-held.jsonl [--rows 64] [--validation-rows 32] [--answers 0] [--picture picture.png]

The base comes from lm_prune.yaml, the experts (one a seed) from lm_instruct.yaml; none of them has seen the source,
whose rows are prompts (`question`) and responses (`answer`). The first of its rows validate, the others test. Each
model reads a text once, and all settings are judged from the same logits (`FusionCalibration`): perplexity of the
responses, mean ± standard deviation over the experts, and paired with the best fixed weight. "Calibrated" are the
settings that did best on the rows that validate. With `--answers N`, N problems after those are also answered by
greedy decoding, and exact match counts the right final numbers.
"""

import argparse
import logging
import statistics
import warnings
from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from benchmarks.dynamic_fusion import evaluate
from benchmarks.measure import machine, markdown_table, spread
from lit_logits import DynamicFusionDecoder
from lit_logits.datamodules import InstructionDataModule, PairSource
from lit_logits.modules import find_tokenizer, load_causal_lm
from lit_logits.modules.dynamic_fusion.calibration import FusionCalibration, FusionCandidate

GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
CRITERIA = ("distance", "equal", "uncertain", "prompt")
SETTINGS = [
    *(FusionCandidate(None, static_alpha=(alpha,)) for alpha in GRID),
    *(FusionCandidate(name) for name in CRITERIA),
]
Ratings = dict[FusionCandidate, tuple[float, float]]


def make_data(args: argparse.Namespace) -> InstructionDataModule:
    """The rows of the source, none to train on."""
    source = PairSource(args.source, prompt_column="question", response_column="answer")
    data = InstructionDataModule(
        source,
        tokenizer=args.model,
        batch_size=args.batch_size,
        max_length=args.max_length,
        val_fraction=0.0,
        test_fraction=1.0,
        max_test_rows=args.rows + args.validation_rows,
    )
    data.prepare_data()
    data.setup("test")
    return data


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


def table(tests: list[Ratings], calibrated: list[FusionCandidate], alone: dict[str, list[float]]) -> str:
    """A line for each setting."""
    best = min(GRID, key=lambda alpha: statistics.fmean(test[fixed(alpha)][0] for test in tests))
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
    add("calibrated", calibrated)
    return markdown_table(["", "perplexity", f"of fixed α = {best}", "mean α"], rows)


def draw(tests: list[Ratings], path: Path) -> None:
    """Perplexity over the fixed weight, with a line for each criterion."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()

    def mean(candidate: FusionCandidate) -> float:
        return exp(statistics.fmean(test[candidate][0] for test in tests))

    axes.plot(GRID, [mean(fixed(alpha)) for alpha in GRID], "o-", color="black", label="fixed α")
    for number, name in enumerate(CRITERIA):
        axes.axhline(mean(FusionCandidate(name)), color=f"C{number}", linestyle="--", label=name)
    axes.set(xlabel="fixed α", ylabel="perplexity of held-out responses")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=80)


def split(data: InstructionDataModule, args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Batches that validate and batches that test."""
    batches = list(data.test_dataloader())
    cut = args.validation_rows // args.batch_size
    return batches[:cut], batches[cut:]


def answers(args: argparse.Namespace, models: tuple[Any, Any, Any], tokenizer: Any, chosen: FusionCandidate) -> str:
    """Exact match of greedy answers."""
    large, base, expert = models
    fused: list[Any] = [large, base, [expert]]
    settings = {"criterion": chosen.criterion, "scale": chosen.scale}
    ways: list[tuple[str, list[Any], dict[str, Any]]] = [("large alone", [large], {}), ("expert alone", [expert], {})]
    ways += [(f"fixed α = {alpha}", fused, {"static_alpha": alpha}) for alpha in (0.5, 1.0)]
    ways += [("`distance`", fused, {})]
    ways += [("calibrated", fused, {"static_alpha": list(chosen.static_alpha)} if chosen.static_alpha else settings)]
    rows: list[list[object]] = []
    data = make_data(argparse.Namespace(**{**vars(args), "rows": args.answers}))
    problems: DataLoader[Any] = DataLoader(split(data, args)[1], batch_size=None)  # type: ignore[arg-type]
    for name, used, settings in ways:
        asked = {"exact_match": True, "generation": {"max_new_tokens": 160, "do_sample": False}, **settings}
        found = evaluate(used, problems, tokenizer=tokenizer, **asked)
        rows.append([name, f"{found['test/exact_match']:.1%}"])
        print(rows[-1], flush=True)
    return markdown_table(["", f"exact match of {args.answers}"], rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--experts", nargs="+", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--validation-rows", type=int, default=32)
    parser.add_argument("--answers", type=int, default=0)
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
    held_out, batches = split(make_data(args), args)
    tests: list[Ratings] = []
    calibrated = []
    alone = {"base alone": [perplexity(base, tokenizer, batches)], "expert alone": []}
    for name in args.experts:
        expert = load_causal_lm(name)
        decoder = DynamicFusionDecoder(large, base, [expert], tokenizer=tokenizer)
        validation = rate(decoder, held_out)
        calibrated.append(min(validation, key=lambda candidate: validation[candidate][0]))
        tests.append(rate(decoder, batches, [*SETTINGS, calibrated[-1]]))
        alone["expert alone"].append(perplexity(expert, tokenizer, batches))
        print(name, "calibrated:", calibrated[-1], tests[-1][calibrated[-1]], flush=True)
    print(f"\n{table(tests, calibrated, alone)}\n\n{args.rows} responses, {machine(torch.device('cpu'))}\n", flush=True)
    if args.picture is not None:
        draw(tests, args.picture)
    if args.answers:
        expert = load_causal_lm(args.experts[0])
        print(answers(args, (large, base, expert), tokenizer, calibrated[0]), flush=True)


if __name__ == "__main__":
    main()
