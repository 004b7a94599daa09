"""A decoding step of the output layer: dense, and residual product codes by look-up.

    python -m benchmarks.vq_decode [--heads two tiers gemma] [--batch 1 8] [--repeats 15] [--threads 2]

Codes are random, of SmolLM2-135M's shape (two stages of all tokens, or five that ever fewer own) and of Gemma-3-270M's.
Two things are as they are in heads fitted to SmolLM2, since greedy decoding by look-up depends on them: later stages
are smaller, and a group of hidden coordinates ranges 13 times as far as the others. All ways take turns in one process,
with cold caches: between any two, more memory is written than caches hold, as a model's layers do between two tokens.
Times are medians; ratios are to the dense float32 layer of the same head and batch.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import machine, markdown_table
from lit_logits.functional import LookupLayout, lookup_greedy, lookup_layout, lookup_logits, packed_lookup_logits

Step = Callable[[], Tensor]


class Shape(NamedTuple):
    """Hidden size, groups, and the tokens of each stage; 256 codes."""

    hidden_size: int
    num_groups: int
    stages: list[int]


STAGE_SCALES = torch.tensor([1, 0.35, 0.2, 0.12, 0.06])
HEADS = {
    "two": Shape(576, 72, [49_152, 49_152]),
    "tiers": Shape(576, 72, [49_152, 16_384, 8_192, 4_096, 2_048]),
    "gemma": Shape(640, 80, [262_144, 262_144]),
}


def make_layout(shape: Shape) -> LookupLayout:
    vocab_size, width = shape.stages[0], shape.hidden_size // shape.num_groups
    codebooks = torch.randn(len(shape.stages), shape.num_groups, 256, width) * shape.hidden_size**-0.5
    codebooks *= STAGE_SCALES[: len(shape.stages), None, None, None]
    codes = [torch.randint(256, (size, shape.num_groups), dtype=torch.uint8) for size in shape.stages]
    members = [None if size == vocab_size else torch.arange(size) for size in shape.stages]
    return lookup_layout(codebooks, codes, members)


def make_ways(hidden: Tensor, weight: Tensor, layout: LookupLayout) -> dict[str, dict[str, Step]]:
    """Way → result → step."""
    half, half_weight = hidden.bfloat16(), weight.bfloat16()
    scale = weight.abs().amax(dim=1) / 127
    bytes_weight, scale = (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()
    ways: dict[str, dict[str, Step]] = {
        "dense, float32": {"logits": lambda: F.linear(hidden, weight)},
        "dense, bfloat16": {"logits": lambda: F.linear(half, half_weight)},
        "dense, int8": {"logits": lambda: torch.ops.aten._weight_int8pack_mm(half, bytes_weight, scale)},
        "look-up, torch": {"logits": lambda: lookup_logits(hidden, *layout[:4])},
        "look-up": {"logits": lambda: packed_lookup_logits(hidden, layout)},
    }
    for steps in ways.values():
        logits = steps["logits"]
        steps["greedy"] = lambda logits=logits: logits().argmax(dim=-1)  # type: ignore[misc]
    ways["look-up"]["greedy"] = lambda: lookup_greedy(hidden, layout)
    return ways


def rows_of(name: str, batch_size: int, repeats: int) -> list[list[object]]:
    torch.manual_seed(0)
    shape = HEADS[name]
    hidden = torch.randn(batch_size, shape.hidden_size)
    hidden[:, : shape.hidden_size // shape.num_groups] *= 13
    weight = torch.randn(shape.stages[0], shape.hidden_size)
    ways = make_ways(hidden, weight, make_layout(shape))
    beyond_caches = torch.zeros(1 << 24)
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(repeats + 2):
        for way, steps in ways.items():
            for result, step in steps.items():
                beyond_caches.add_(1)
                start = time.perf_counter()
                step()
                if turn > 1:
                    times.setdefault((way, result), []).append(time.perf_counter() - start)
    rows: list[list[object]] = []
    for way in ways:
        row: list[object] = [way, name, batch_size]
        for result in ("logits", "greedy"):
            seconds, dense = times[way, result], statistics.median(times["dense, float32", result])
            low, high = min(seconds) * 1e3, max(seconds) * 1e3
            row += [f"{statistics.median(seconds) * 1e3:.2f} ({low:.2f}–{high:.2f})"]
            row += [f"{dense / statistics.median(seconds):.1f}×"]
        rows.append(row)
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for name in args.heads for batch_size in args.batch for row in rows_of(name, batch_size, args.repeats)]
    print(f"{machine(torch.device('cpu'))}\n")
    header = ["output layer", "head", "batch", "logits, ms (min–max)", "faster than dense", "greedy, ms (min–max)"]
    print(markdown_table([*header, "faster than dense"], rows))


if __name__ == "__main__":
    main()
