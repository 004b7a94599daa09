"""What matters in the start from co-occurrence: contexts, smoothing, dimensions, weights, and the size of clusters.

    python -m benchmarks.vq_start_ablation [--steps 300] [--seeds 0 1] [--codes 128] [--sizes 32 16 16 16 16 16 16]

Each line changes one thing of the start and trains the small Llama of vq_ablation from scratch; the mapping then stays.
`sum` is the softmax over all tokens of the same vectors added, cluster and codes, in place of the two softmaxes.
Perplexity is that of the test split, mean ± sample standard deviation over the seeds.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import machine, markdown_table, spread
from benchmarks.vq_training import fit, make_model, test_ppl
from lit_logits import VQLogitsLM
from lit_logits.datamodules import TextDataModule
from lit_logits.functional import PairCounts, count_pairs, kmeans, merge_pairs, unigram_bias
from lit_logits.functional.code_hierarchy import kmeans_hierarchy
from lit_logits.functional.cooccurrence import CONTEXT_WEIGHTS, context_vectors
from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.functional.reductions import Reduction, reduce_tokens
from lit_logits.modules import HierarchicalVQLogitsHead, VQLogitsHead


class Start(NamedTuple):
    """One way to start; the defaults are the library's."""

    name: str
    before: dict[int, float] = CONTEXT_WEIGHTS
    after: dict[int, float] = {}  # noqa: RUF012  (it is not changed)
    power: float = 0.75
    dim: int = 64
    count_power: float = 0.5


STARTS = [
    Start("as it is"),
    Start("the token before", before={1: 1.0}),
    Start("four tokens before", before={1: 1.0, 2: 1 / 2, 3: 1 / 3, 4: 1 / 4}),
    Start("two tokens after", before={}, after=CONTEXT_WEIGHTS),
    Start("two before and two after", after=CONTEXT_WEIGHTS),
    Start("α = 1", power=1.0),
    Start("α = 0.5", power=0.5),
    *(Start(f"{dim} dimensions", dim=dim) for dim in (16, 32, 128, 256)),
    Start("tokens weigh alike", count_power=0.0),
    Start("weights count", count_power=1.0),
]
CAPS = {"clusters of equal size": 1, "at most twice the mean": 2, "four times, as it is": 4, "free": None}


class SummedHead(HierarchicalVQLogitsHead):
    """One softmax over all tokens: z_v = ⟨h, C_M(v)⟩ + Σ_s ⟨h, C_s[M_s(v)]⟩ + b_v."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V)."""
        stages = self.codes.split(self.codebook_sizes[1:])
        rows = self.clusters[self.token_to_cluster]
        for codebook, codes in zip(stages, self.token_codes.T, strict=True):
            rows = rows + codebook[codes]
        return F.linear(hidden, rows, self.token_bias)

    def loss(
        self, hidden: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the cross-entropy."""
        logits = self(hidden).flatten(0, -2)
        values = F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction="none")
        return reduce_tokens(values.view(labels.shape), labels != ignore_index, reduction)


def vectors_of(start: Start, batches: list[Tensor], vocab_size: int) -> Tensor:
    """The short vectors of tokens; what comes after is what comes before in the text read backwards."""
    parts: list[PairCounts] = []
    for ids in batches:
        for text, weights in ((ids, start.before), (ids.flip(1), start.after)):
            if weights:
                parts.append(count_pairs(text, text, vocab_size, context_weights=weights))
    return context_vectors(merge_pairs(parts), vocab_size, start.dim, power=start.power)


def train(model: VQLogitsLM, data: TextDataModule, steps: int) -> tuple[float, float]:
    """Test perplexity, and the seconds of a median step."""
    seconds: list[float] = []

    class Clock(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.began = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    model.head_ready.fill_(True)
    fit(model, data, steps, [Clock()], limit_val_batches=0)
    return test_ppl(model, data), statistics.median(seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--codes", type=int, default=128)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, *[16] * 6])
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = TextDataModule(block_size=128, batch_size=8)
    data.prepare_data()
    data.setup()
    size = data.vocab_size
    batches = [batch["labels"] for batch in data.train_dataloader()]
    counts = torch.stack([torch.bincount(ids.flatten(), minlength=size) for ids in batches]).sum(0).float()
    bias = unigram_bias(counts)
    rows: list[list[object]] = []

    def note(name: str, kind: str, make: Any) -> None:
        runs = []
        for seed in args.seeds:
            L.seed_everything(seed, verbose=False)
            runs.append(train(make(seed), data, args.steps))
            print(kind, name, seed, *runs[-1], flush=True)
        ppls, steps = zip(*runs, strict=True)
        rows.append([kind, name, spread(ppls, 1), f"{statistics.median(steps):.4f}"])

    def weighted(start: Start) -> dict[str, Any]:
        return {"weights": counts.clamp(min=0.5) ** start.count_power}

    for start in STARTS:
        vectors = vectors_of(start, batches, size)

        def one(seed: int, start: Start = start, vectors: Tensor = vectors) -> VQLogitsLM:
            generator = torch.Generator().manual_seed(seed)
            found = kmeans(vectors, args.codes, generator=generator, **weighted(start)).assignments
            model = make_model(partial(VQLogitsHead, codebook_size=args.codes), data, steps=args.steps)
            model.head.set_codes(token_to_code=found, token_bias=unigram_bias(counts, found, args.codes))
            return model

        note(start.name, f"one level of {args.codes}", one)
    vectors = vectors_of(STARTS[0], batches, size)
    clusters, *stages = args.sizes
    label = f"{clusters} + {len(stages)} × {stages[0]}"
    kinds: list[tuple[str, type[HierarchicalVQLogitsHead], int | None]] = [
        *((name, HierarchicalVQLogitsHead, cap) for name, cap in CAPS.items()),
        ("sum", SummedHead, 4),
    ]
    for name, kind, cap in kinds:
        largest = size if cap is None else min(size, cap * -(-size // clusters))

        def two(seed: int, kind: type = kind, largest: int = largest) -> VQLogitsLM:
            generator = torch.Generator().manual_seed(seed)
            found = kmeans_hierarchy(
                vectors, args.sizes, max_cluster_size=largest, generator=generator, **weighted(STARTS[0])
            )
            options = {"codebook_sizes": args.sizes, "max_cluster_size": largest}
            model = make_model(partial(kind, **options), data, steps=args.steps)
            model.head.set_codes(found.token_to_cluster, found.token_codes, token_bias=bias)
            if kind is SummedHead:
                model.head.token_bias.data.copy_(bias)
            return model

        note(name, label, two)
    print(f"\n{markdown_table(['head', 'start', 'test perplexity', 's a step'], rows)}\n")
    print(f"V = {size:,}, {args.steps} steps of 8 × 128 tokens, seeds {args.seeds}; {machine(torch.device('cpu'))}")


if __name__ == "__main__":
    main()
