"""What fusion does to a pivot: fine-tuning alone, with the token-wise loss, and with the graphs; one source and two.

    python -m benchmarks.gld_fusion [--sources wide=models/source_4096 narrow=models/source_2048] [--pivot llama.json]
        [--seeds 0 1 2] [--steps 300] [--rows 300] [--train-rows 1000] [--kd-weight 0.3] [--gld-weight 0.001]

The sources come from lm.yaml and lm_instruct.yaml, as gld_fusion.yaml tells. Their logits are cached once for all runs.
A seed gives every way the same initial pivot and the same batches. Means ± sample standard deviations over the seeds,
on the first responses of the test split, which no way trained on: perplexity in the pivot's tokens; agreement, the
share of aligned positions where the most likely tokens of pivot and source begin alike; the distances that are
minimised, ULD and GLD over ranks, to each source; and the time of a training step. With `--train-rows` the pivot, its
BPE and the caches have so many of the training pairs only.
"""

import argparse
import contextlib
import io
import json
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.measure import machine, markdown_table, spread
from lit_logits import GLDFusionModule
from lit_logits.callbacks import LogitCacheWriter
from lit_logits.datamodules import InstructionDataModule
from lit_logits.functional import align_positions, common_span
from lit_logits.modules import LogitCache, find_tokenizer
from lit_logits.modules.gld_fusion.sources import counted_positions

PIVOT = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def make_ways(sources: list[str], gld_weight: float) -> dict[str, dict[str, Any]]:
    """Arguments of each way, with the `sources` that it learns from."""
    ways: dict[str, dict[str, Any]] = {"SFT": {"sources": [], "kd_weight": 0.0}}
    for chosen in [sources[:1], sources] if len(sources) > 1 else [sources]:
        names = " + ".join(chosen)
        ways[f"SFT + ULD, {names}"] = {"sources": chosen, "gld_weight": 0.0}
        for nodes in ("rank", "vocabulary"):
            ways[f"SFT + ULD + GLD ({nodes}), {names}"] = {"sources": chosen, "gld_weight": gld_weight, "nodes": nodes}
    return ways


def draw_pairs(source: str, train_rows: int, folder: str) -> None:
    """Write some of the training pairs, always the same, 200 to validate and all to test with, as JSON Lines."""
    splits = InstructionDataModule(source).pairs.splits
    drawn = {
        "train": random.Random(0).sample(splits["train"], train_rows),
        "validation": splits["val"][:200],
        "test": splits["test"],
    }
    for name, pairs in drawn.items():
        lines = [json.dumps({"prompt": pair.prompt, "response": pair.response}) + "\n" for pair in pairs]
        Path(folder, f"{name}.jsonl").write_text("".join(lines))


def make_data(args: argparse.Namespace, sources: dict[str, str], **kwargs: Any) -> InstructionDataModule:
    shared: dict[str, Any] = {"bpe_vocab_size": 3072, "max_length": 256, "batch_size": 8, "max_test_rows": args.rows}
    shared["cache_dir"] = args.cache_dir
    return InstructionDataModule(args.data, tokenizer=args.tokenizer, source_tokenizers=sources, **shared, **kwargs)


def run(trainer_kwargs: dict[str, Any]) -> L.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return L.Trainer(**quiet, enable_checkpointing=False, **trainer_kwargs)


def write_caches(args: argparse.Namespace, sources: dict[str, str], folder: str) -> dict[str, str]:
    model = GLDFusionModule(None, sources, top_k=32)
    data = make_data(args, sources, predict_split="all")
    with contextlib.redirect_stdout(io.StringIO()):
        run({"callbacks": [LogitCacheWriter(folder)]}).predict(model, data, return_predictions=False)
    return {name: str(Path(folder, name)) for name in sources}


def train(args: argparse.Namespace, data: Any, caches: dict[str, str], way: dict[str, Any], seed: int) -> Any:
    """The trained module, and seconds a step."""
    L.seed_everything(seed, verbose=False)
    data.seed = seed
    module = GLDFusionModule(
        args.pivot,
        {name: caches[name] for name in way["sources"]},
        data.vocab_size,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.05, betas=(0.9, 0.95)),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps + 1),
        **{"kd_weight": args.kd_weight, **{key: value for key, value in way.items() if key != "sources"}},
    )
    start = time.perf_counter()
    options = {"max_steps": args.steps, "max_epochs": -1, "gradient_clip_val": 1.0, "limit_val_batches": 0}
    run(options).fit(module, data)
    return module, (time.perf_counter() - start) / args.steps


class TokenTexts:
    """What the tokens of a vocabulary write, whatever sign it has for a space."""

    def __init__(self, tokenizer: Any) -> None:
        signs = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})
        self.texts = [str(token).translate(signs) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]

    def __call__(self, token_ids: torch.Tensor) -> list[str]:
        """The text of each."""
        return [self.texts[token] if token < len(self.texts) else "" for token in token_ids.tolist()]


def begin_alike(texts: Sequence[str], others: Sequence[str]) -> list[bool]:
    """Of each pair whose tokens write something, whether one is the beginning of the other."""
    pairs = zip(texts, others, strict=True)
    return [one.startswith(two) or two.startswith(one) for one, two in pairs if one and two]


@torch.no_grad()
def evaluate(pivot: Any, data: Any, caches: dict[str, str], texts: dict[str, TokenTexts]) -> dict[str, float]:
    """Perplexity, and for each source the aligned share, the agreement and both distances."""
    module = GLDFusionModule(pivot, caches, data.vocab_size, top_k=10).eval()
    sums: dict[str, float] = {}

    def add(name: str, value: float, count: float) -> None:
        sums[name] = sums.get(name, 0.0) + value * count
        sums[f"#{name}"] = sums.get(f"#{name}", 0.0) + count

    for batch in data.test_dataloader():
        losses = module.losses(batch)
        labels, mask = batch["labels"], counted_positions(batch)
        logits = module(batch["input_ids"], batch["attention_mask"])
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        add("nll", float(nll), float((labels[:, 1:] != -100).sum()))
        ends = batch["response_bytes"].masked_fill(~mask, -1)
        best = logits[..., : data.vocab_size].argmax(-1)
        for name in caches:
            source = LogitCache(caches[name]).read(batch["sample_ids"], top_k=1)
            own, other = common_span(ends, source.ends)
            partner = align_positions(ends.masked_fill(~own, -1), source.ends.masked_fill(~other, -1))
            rows, places = (partner >= 0).nonzero(as_tuple=True)
            theirs = source.top_k.token_ids[rows, partner[rows, places], 0]
            alike = begin_alike(texts["pivot"](best[rows, places]), texts[name](theirs))
            add(f"agree {name}", sum(alike) / max(1, len(alike)), len(alike))
            add(f"aligned {name}", float(losses.sources[name].aligned), float(own.sum()))
            add(f"uld {name}", float(losses.sources[name].uld), len(labels))
            add(f"gld {name}", float(losses.sources[name].gld), len(labels))
    found = {name: value / sums[f"#{name}"] for name, value in sums.items() if not name.startswith("#")}
    return {"ppl": float(torch.tensor(found.pop("nll")).exp()), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", default=["wide=models/source_4096", "narrow=models/source_2048"])
    parser.add_argument("--pivot", help="JSON file of a config, or a model; default a small Llama")
    parser.add_argument("--tokenizer", help="of the pivot; default a BPE trained on the pairs")
    parser.add_argument("--data", default="python-questions")
    parser.add_argument("--train-rows", type=int, help="draw so many of the training pairs; default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kd-weight", type=float, default=0.3)
    parser.add_argument("--gld-weight", type=float, default=0.001)
    parser.add_argument("--ways", nargs="+", help="only those whose label holds one of these")
    parser.set_defaults(cache_dir=None)
    args = parser.parse_args()
    if args.pivot is None:
        args.pivot = PIVOT
    elif args.pivot.endswith(".json"):
        args.pivot = json.loads(Path(args.pivot).read_text())
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    sources = dict(source.split("=", 1) for source in args.sources)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as drawn:
        if args.train_rows is not None:
            draw_pairs(args.data, args.train_rows, drawn)
            args.data, args.cache_dir = drawn, folder  # a cache of a temporary folder's pairs would not be found again
        start = time.perf_counter()
        caches = write_caches(args, sources, folder)
        print(f"caches written in {time.perf_counter() - start:.0f} s", flush=True)
        data = make_data(args, sources)
        data.prepare_data()
        data.setup()
        texts = {name: TokenTexts(find_tokenizer(path, required=True)) for name, path in sources.items()}
        texts["pivot"] = TokenTexts(data.tokenizer)
        rows: list[list[object]] = []
        for label, way in make_ways(list(sources), args.gld_weight).items():
            if args.ways and not any(part in label for part in args.ways):
                continue
            results = []
            for seed in args.seeds:
                module, seconds = train(args, data, caches, way, seed)
                results.append({**evaluate(module.pivot, data, caches, texts), "s": seconds})
                print(label, seed, {name: round(value, 4) for name, value in results[-1].items()}, flush=True)
            digits = {"ppl": 2, "agree": 3, "uld": 3, "gld": 1, "s": 2}
            columns = ["ppl", *(f"{part} {name}" for name in sources for part in ("agree", "uld", "gld")), "s"]
            rows.append(
                [label, *(spread([r[column] for r in results], digits[column.split()[0]]) for column in columns)]
            )
    header = ["way", "perplexity", *(f"{part} {name}" for name in sources for part in ("agreement", "ULD", "GLD"))]
    aligned = ", ".join(f"{name} {results[-1][f'aligned {name}']:.1%}" for name in sources)
    print(f"\n{markdown_table([*header, 's a step'], rows)}\n\naligned: {aligned}; λ = {args.kd_weight}, γ =")
    print(f"{args.gld_weight}, {args.steps} steps, {args.rows} responses; {machine(torch.device('cpu'))}")


if __name__ == "__main__":
    main()
