"""Greedy answers of models that are fused, for `benchmarks.fusion_criteria`: what they are worth, and drafts' speed."""

import argparse
import re
import statistics
import time
from collections import Counter
from itertools import accumulate
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.measure import markdown_table, spread
from lit_logits import DynamicFusionDecoder
from lit_logits.modules.dynamic_fusion.answers import extract_answer
from lit_logits.modules.dynamic_fusion.calibration import FusionCandidate
from lit_logits.modules.dynamic_fusion.decoding import split_prompts

DRAFTS = (0, 1, 2, 4)
"""Tokens that the base drafts at a time."""


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of the shares of words that both have, as in SQuAD (arXiv 1606.05250)."""
    words, right = (Counter(re.findall(r"\w+", text.casefold())) for text in (answer, reference))
    return 2 * (words & right).total() / max(1, words.total() + right.total())


def answer(models: list[Any], batches: list[Any], tokenizer: Any, tokens: int, **settings: Any) -> tuple[float, float]:
    """Exact match and token F1 of greedy answers."""
    generation = {"max_new_tokens": tokens, "do_sample": False}
    decoder = DynamicFusionDecoder(*models, tokenizer=tokenizer, generation=generation, **settings)
    records = [record for batch in batches for record in decoder.predict_step(batch, 0)]
    pairs = [(record["text"], record["reference"]) for record in records]
    found = [(extract_answer(text), extract_answer(right)) for text, right in pairs]
    exact = statistics.fmean(ours is not None and ours == right for ours, right in found)
    return exact, statistics.fmean(token_f1(*pair) for pair in pairs)


def ways_to_answer(
    models: tuple[Any, Any, Any], best: float, chosen: FusionCandidate
) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """Models and settings of each way, by name."""
    large, base, expert = models
    fused: list[Any] = [large, base, [expert]]
    settings: dict[str, Any] = {"criterion": chosen.criterion, "scale": chosen.scale}
    if chosen.static_alpha is not None:
        settings = {"static_alpha": list(chosen.static_alpha)}
    ways: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "large alone": ([large], {}),
        "expert alone": ([expert], {}),
        f"fixed α = {best}": (fused, {"static_alpha": best}),
        "`distance`": (fused, {}),
        "`projection`": (fused, {"criterion": "projection"}),
    }
    is_there_already = chosen.static_alpha == (best,)
    return ways if is_there_already else ways | {"calibrated": (fused, settings)}


def answers(
    args: argparse.Namespace,
    models: tuple[Any, Any, list[Any]],
    batches: list[Any],
    tokenizer: Any,
    best: float,
    calibrated: list[FusionCandidate],
) -> str:
    """What greedy answers are worth, a line for each way to decode."""
    large, base, experts = models
    found: dict[str, list[tuple[float, float]]] = {}
    for expert, chosen in zip(experts, calibrated, strict=True):
        for name, (used, settings) in ways_to_answer((large, base, expert), best, chosen).items():
            is_asked = args.answer_ways is None or any(way in name for way in args.answer_ways)
            if not is_asked or (name == "large alone" and name in found):
                continue
            found.setdefault(name, []).append(answer(used, batches, tokenizer, args.answer_tokens, **settings))
            print(name, found[name][-1], flush=True)
    rows: list[list[object]] = []
    for name, measures in found.items():
        exact, f1 = ([100 * value for value in values] for values in zip(*measures, strict=True))
        rows.append([name, spread(exact, 1), spread(f1, 1)])
    return markdown_table(["", f"exact match of {args.answers}, %", "token F1, %"], rows)


def drafts(decoder: DynamicFusionDecoder, batches: list[Any], tokens: int) -> str:
    """How fast prompts are continued one at a time with drafts of the base, in processor time, and in turns."""
    seconds: dict[int, list[float]] = {length: [] for length in DRAFTS}
    same = dict.fromkeys(DRAFTS, 0)
    prompts = [split_prompts(one, pad=0)[0] for batch in batches for one in single_rows(batch)]
    for prompt in tqdm(prompts, "drafts", leave=False):
        plain: torch.Tensor | None = None
        for length in DRAFTS:
            base = decoder.fused.base
            assert base is not None
            base.generation_config.num_assistant_tokens = length
            base.generation_config.num_assistant_tokens_schedule = "constant"
            settings = {"assistant_model": base} if length else {}
            start = time.process_time()
            text = decoder.generate(prompt, max_new_tokens=tokens, do_sample=False, **settings)
            seconds[length].append((time.process_time() - start) / (text.shape[1] - prompt.shape[1]))
            plain = text if plain is None else plain
            same[length] += torch.equal(text, plain)
    rows: list[list[object]] = []
    for length, taken in seconds.items():
        ratios = [own / other for own, other in zip(seconds[0], taken, strict=True)]
        cells = [f"{1000 * statistics.median(taken):.0f}", spread(ratios, 2), f"{same[length]} of {len(prompts)}"]
        rows.append([length or "none", *cells])
    return markdown_table(["tokens a draft", "ms a token", "speed, of none", "same text"], rows)


def single_rows(batch: Any) -> list[dict[str, torch.Tensor]]:
    """Each row as a batch."""
    keys = ("input_ids", "labels", "attention_mask")
    return [{key: batch[key][row : row + 1] for key in keys} for row in range(len(batch["input_ids"]))]


def first_rows(batches: list[Any], rows: int) -> list[Any]:
    """Batches of no more than so many rows."""
    starts = accumulate((len(batch["input_ids"]) for batch in batches), initial=0)
    cut = [
        {key: value[: max(0, rows - start)] if value.ndim else value for key, value in batch.items()}
        for batch, start in zip(batches, starts, strict=False)
    ]
    return [batch for batch in cut if len(batch["input_ids"])]
