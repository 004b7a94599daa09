"""Fusion weights of one decoding step: exponential tilting against the paper's grid of 21 points.

    python -m benchmarks.fusion_weights [--device cuda] [--repeats 7]

Both solve the same sequences; cases take turns. Logits follow a Zipf-like profile with noise, the base resembles the
large model, experts move away from the base. Times are medians and hold all that a step does: softmaxes, divergences
and the search. `passes` are those of the slowest sequence; the others drop out. `objective` is the mean of what is
reached over what the grid reaches, `worse` counts sequences in which tilting ends above the grid by more than a
millionth; both evaluate the weights found once more in float64, as float32's rounding is of that order.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import machine, markdown_table
from lit_logits.functional import expert_divergences, fuse_logits, fusion_weights


def make_logits(batch: int, vocab: int, experts: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    profile = -1.1 * torch.arange(1, vocab + 1).log()
    ranks = torch.stack([torch.randperm(vocab, generator=g) for _ in range(batch)])
    large = 1.5 * profile[ranks] + torch.randn(batch, vocab, generator=g)
    base = profile[ranks] + torch.randn(batch, vocab, generator=g)
    expert = base + torch.randn(experts, batch, vocab, generator=g)
    return large.to(device), base.to(device), expert.to(device)


def objective(data: tuple[torch.Tensor, torch.Tensor, torch.Tensor], alpha: torch.Tensor) -> torch.Tensor:
    large, base, experts = (logits.double() for logits in data)
    reached = expert_divergences(large, fuse_logits(large, base, experts, alpha).unsqueeze(0))
    wanted = expert_divergences(base, experts)
    return sum(((a - b).square().sum(0) for a, b in zip(reached, wanted, strict=True)), torch.zeros(()).to(large))


def take_turns(functions: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 49_152, 128_256])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    rows: list[list[object]] = []
    for vocab in args.vocab:
        for batch in args.batch:
            for experts in args.experts:
                data = make_logits(batch, vocab, experts, args.device)
                cases: dict[str, Callable[[], Any]] = {
                    "grid": functools.partial(fusion_weights, *data, solver="grid"),
                    "tilting": functools.partial(fusion_weights, *data),
                    "joint": functools.partial(fusion_weights, *data, mode="joint"),
                }
                seconds = take_turns(cases, args.repeats, args.device)
                found = {name: case() for name, case in cases.items()}
                ends = {name: objective(data, weights.alpha) for name, weights in found.items()}
                grid = ends["grid"]
                ms = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
                worse = int((ends["tilting"] > grid * (1 + 1e-6)).sum())
                rows.append(
                    [
                        f"{vocab:,}",
                        batch,
                        experts,
                        f"{ms['grid']:.2f}",
                        f"{ms['tilting']:.2f}",
                        f"{ms['tilting'] / ms['grid']:.2f}",
                        f"{found['tilting'].num_evals} / {found['grid'].num_evals}",
                        f"{(ends['tilting'] / grid).mean():.4f}",
                        worse,
                        f"{ms['joint'] / ms['grid']:.2f}" if experts > 1 else "",
                        f"{(ends['joint'] / grid).mean():.4f}" if experts > 1 else "",
                    ]
                )
    print(f"float32; {args.repeats} turns; {machine(torch.device(args.device))}\n")
    header = ["V", "batch", "experts", "grid, ms", "tilting, ms", "of grid", "passes", "objective", "worse"]
    print(markdown_table([*header, "joint, of grid", "objective"], rows))


if __name__ == "__main__":
    main()
