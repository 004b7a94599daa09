"""What fusion does to perplexity and answers: the worked example of docs/measured/dynamic_fusion.md.

    python -m benchmarks.dynamic_fusion --model my.gguf --gsm8k gsm8k-train.jsonl [--base models/base]
        [--python models/python] [--arithmetic models/arithmetic] [--rows 64] [--answers 0] [--max-length 512]
        [--tasks python arithmetic] [--ways dynamic static ...]

The base comes from lm.yaml, the experts from lm_instruct.yaml, all with the tokenizer of the large model; the docs give
the commands. Each way scores the responses of the test splits, which neither base nor experts were trained on:
perplexity, mean weight (summed over experts) and mean KL(P~ ‖ P). `--tasks` and parts of the names of `--ways` choose
some of them; with one task no other expert is needed. With `--answers N`, the first N problems of
arithmetic are also answered by greedy decoding, and exact match counts the right final numbers.
"""

import argparse
import contextlib
import io
import logging
import warnings
from typing import Any

import lightning as L
import torch

from benchmarks.measure import machine, markdown_table
from lit_logits import DynamicFusionDecoder
from lit_logits.datamodules import InstructionDataModule, PairSource
from lit_logits.modules import find_tokenizer, load_causal_lm
from lit_logits.modules.language_models.tokenizers import check_same_tokenizer


def make_data(args: argparse.Namespace, rows: int) -> dict[str, InstructionDataModule]:
    shared: dict[str, Any] = {
        "tokenizer": args.model,
        "max_test_rows": rows,
        "max_length": args.max_length,
        "batch_size": 8,
    }
    arithmetic = PairSource(args.gsm8k, prompt_column="question", response_column="answer")
    return {
        "python": InstructionDataModule("python-questions", **shared),
        "arithmetic": InstructionDataModule(arithmetic, **shared),
    }


def make_ways(large: Any, base: Any, experts: dict[str, Any], task: str) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """Label, [large, base, experts] and arguments of each way to decode; `task` names the matching expert."""
    own, both = [experts[task]], list(experts.values())
    ways: list[tuple[str, list[Any], dict[str, Any]]] = [("base alone", [base], {})]
    ways += [(f"{name} expert alone", [expert], {}) for name, expert in experts.items()]
    ways += [("large alone", [large], {})]
    alphas = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    ways += [(f"{task} expert, static α = {a}", [large, base, own], {"static_alpha": a}) for a in alphas]
    ways += [(f"{task} expert, dynamic, {s}", [large, base, own], {"solver": s}) for s in ("grid", "tilting")]
    criteria: list[Any] = ["projection", "equal", "uncertain", "prompt"]
    ways += [
        (f"{task} expert, dynamic, {criterion}", [large, base, own], {"criterion": criterion}) for criterion in criteria
    ]
    if len(both) == 1:
        return ways
    ways += [("both, static α = 0.5 each", [large, base, both], {"static_alpha": 0.5})]
    ways += [(f"both, dynamic, single, {s}", [large, base, both], {"solver": s}) for s in ("grid", "tilting")]
    ways += [("both, dynamic, joint, tilting", [large, base, both], {"mode": "joint"})]
    ways += [("both merged (λ = 0.5), dynamic, tilting", [large, base, [both]], {"merge_weight": 0.5})]
    return ways


def evaluate(models: list[Any], data: Any, **kwargs: Any) -> dict[str, float]:
    decoder = DynamicFusionDecoder(*models, **kwargs)
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False)
    with contextlib.redirect_stdout(io.StringIO()):
        return dict(trainer.test(decoder, data, verbose=False)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gsm8k", required=True)
    parser.add_argument("--base", default="models/base")
    parser.add_argument("--python", default="models/python")
    parser.add_argument("--arithmetic", default="models/arithmetic")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--answers", type=int, default=0)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--tasks", nargs="+", default=["python", "arithmetic"], choices=["python", "arithmetic"])
    parser.add_argument("--ways", nargs="+", default=[""])
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    large, base = load_causal_lm(args.model), load_causal_lm(args.base)
    experts = {name: load_causal_lm(getattr(args, name)) for name in args.tasks}
    tokenizer: Any = find_tokenizer(args.model, required=True)
    for name in (args.base, *(getattr(args, task) for task in args.tasks)):
        other: Any = find_tokenizer(name, required=True)
        check_same_tokenizer(tokenizer, other, args.model, name)
    generation = {"max_new_tokens": 160, "do_sample": False}
    for task in args.tasks:
        data = make_data(args, args.rows)[task]
        rows: list[list[object]] = []
        answers = make_data(args, args.answers)[task] if args.answers and task == "arithmetic" else None
        for label, models, kwargs in make_ways(large, base, experts, task):
            if not any(part in label for part in args.ways):
                continue
            found = evaluate(models, data, tokenizer=tokenizer, **kwargs)
            row: list[object] = [label, f"{found['test/ppl']:.2f}"]
            row += [f"{found[name]:.2f}" if name in found else "" for name in ("fusion/alpha", "fusion/kl_forward")]
            if answers is not None:
                asked = {"exact_match": True, "generation": generation, **kwargs}
                match = evaluate(models, answers, tokenizer=tokenizer, **asked)["test/exact_match"]
                row.append(f"{match:.1%}")
            rows.append(row)
            print(row, flush=True)
        header = [f"{task}, {args.rows} responses", "perplexity", "mean α", "KL(P~ ‖ P)"]
        header += [f"exact match of {args.answers}"] if answers is not None else []
        print(f"\n{markdown_table(header, rows)}\n\n{machine(torch.device('cpu'))}\n", flush=True)


if __name__ == "__main__":
    main()
