"""Training step and decoding step of output layers: dense, scatter, collapsed, two levels, and what else there is.

    python -m benchmarks.vq_loss [--device cuda] [--repeats 9]

The rivals are torch's `F.linear_cross_entropy` in chunks, which makes no (N, V) logits either (torch 2.13 or newer),
its adaptive softmax, and the dense layer as two factors of as many floats as K codes. Labels follow Zipf's law, which
the adaptive softmax lives on. Times are medians; memory is the peak above inputs and parameters, of forward and
backward together, each case in a process of its own. Everything is a ratio to the dense layer of the same run.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import Measurement, in_fresh_process, machine, markdown_table, measure
from benchmarks.vq_rivals import LowRankHead, equal_rank
from lit_logits.functional import scatter_code_logits
from lit_logits.modules import DenseLogitsHead, HierarchicalVQLogitsHead, ResidualVQLogitsHead, VQLogitsHead

VOCAB_SIZE, HIDDEN_SIZE = 49_152, 576
TWO_LEVELS = {"256 clusters + 256": (256, 256), "256 clusters + 4 × 64": (256, *[64] * 4)}
OWN = "256 clusters, own vectors"
SUM = "256 + 256 codes, one softmax over their sums"
CUTOFFS = [2_000, 10_000]  # of the adaptive softmax, frequent ids first
CHUNKED = "dense, linear_cross_entropy in chunks"


def training_step(case: str, codebook_size: int, num_tokens: int, device: str, repeats: int) -> Measurement:
    torch.manual_seed(0)
    target = torch.device(device)
    hidden = torch.randn(num_tokens, HIDDEN_SIZE, device=target, requires_grad=True)
    labels = ((VOCAB_SIZE + 1) ** torch.rand(num_tokens, dtype=torch.float64)).long().to(target) - 1  # p ∝ about 1/rank
    module, loss = _make_loss(case, codebook_size)
    module.to(target)

    def step() -> None:
        hidden.grad = None
        module.zero_grad(set_to_none=True)
        loss(hidden, labels).backward()

    return measure(step, repeats=repeats, device=target)


def _make_loss(case: str, codebook_size: int) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    if case == "dense":
        dense = DenseLogitsHead(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
        return dense, lambda hidden, labels: F.cross_entropy(F.linear(hidden, dense.weight), labels)
    if case == CHUNKED:
        dense, options = DenseLogitsHead(HIDDEN_SIZE, VOCAB_SIZE, bias=False), nn.LinearCrossEntropyOptions()
        return dense, lambda hidden, labels: F.linear_cross_entropy(hidden, dense.weight, labels, options=options)
    if case == "low rank":
        factors = LowRankHead(HIDDEN_SIZE, VOCAB_SIZE, equal_rank(codebook_size, HIDDEN_SIZE, VOCAB_SIZE))
        return factors, lambda hidden, labels: factors.loss(hidden, labels)
    if case == "adaptive softmax":
        adaptive = nn.AdaptiveLogSoftmaxWithLoss(HIDDEN_SIZE, VOCAB_SIZE, CUTOFFS)
        return adaptive, lambda hidden, labels: adaptive(hidden, labels).loss
    if case == OWN:
        own = HierarchicalVQLogitsHead(HIDDEN_SIZE, VOCAB_SIZE, (256, 1), own_vectors=True)
        return own, lambda hidden, labels: own.loss(hidden, labels)
    if case == SUM:
        added = ResidualVQLogitsHead(HIDDEN_SIZE, VOCAB_SIZE, 256, num_stages=2)
        codes, stages = torch.randint(256, (2 * VOCAB_SIZE,)), torch.full((VOCAB_SIZE,), 2)
        added.set_codes(torch.randn_like(added.codebook), codes, stages)
        return added, lambda hidden, labels: added.loss(hidden, labels)
    if case in TWO_LEVELS:
        levels = HierarchicalVQLogitsHead(HIDDEN_SIZE, VOCAB_SIZE, TWO_LEVELS[case])
        return levels, lambda hidden, labels: levels.loss(hidden, labels)
    head = VQLogitsHead(HIDDEN_SIZE, VOCAB_SIZE, codebook_size, bias="bias" in case)
    if case.startswith("collapsed"):
        return head, lambda hidden, labels: head.loss(hidden, labels)
    return head, lambda hidden, labels: F.cross_entropy(
        scatter_code_logits(hidden @ head.codebook.T, head.token_to_code), labels
    )


def decoding_step(case: str, codebook_size: int, batch_size: int, device: str, repeats: int) -> Measurement:
    torch.manual_seed(0)
    target = torch.device(device)
    hidden = torch.randn(batch_size, HIDDEN_SIZE, device=target)
    with torch.device(target):
        dense = DenseLogitsHead(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
        head = VQLogitsHead(HIDDEN_SIZE, VOCAB_SIZE, codebook_size).eval()
    steps: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense.greedy(hidden),
        "scatter": lambda: head(hidden).argmax(dim=-1),
        "greedy": lambda: head.greedy(hidden),
        "sample": lambda: head.sample(hidden),
    }
    with torch.no_grad():
        steps[case]()  # makes the tables
        return measure(steps[case], repeats=20 * repeats, device=target)


def _training_cases(codes: list[int]) -> list[tuple[str, int]]:
    alone = ["dense", CHUNKED, "adaptive softmax", OWN, *TWO_LEVELS, SUM]
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        alone.remove(CHUNKED)
        print(f"torch {torch.__version__} has no F.linear_cross_entropy in chunks, as 2.13 has: left out.\n")
    several = itertools.product(("low rank", "scatter", "collapsed", "collapsed + bias"), codes)
    return [*((case, 0) for case in alone), *several]


def _label(case: str, codebook_size: int) -> str:
    if case == "low rank":
        return f"low rank, r = {equal_rank(codebook_size, HIDDEN_SIZE, VOCAB_SIZE)}"
    return f"{case}, K = {codebook_size:,}" if codebook_size else case


def _floats(case: str, codebook_size: int) -> int:
    return sum(parameter.numel() for parameter in _make_loss(case, codebook_size)[0].parameters())


def _training_rows(args: argparse.Namespace) -> list[list[object]]:
    rows: list[list[object]] = []
    cases = _training_cases(args.codes)
    for num_tokens in args.tokens:
        results = {
            case: in_fresh_process(training_step, *case, num_tokens, args.device, args.repeats) for case in cases
        }
        dense = results["dense", 0]
        for (case, codes), result in results.items():
            low, high = min(result.seconds) * 1e3, max(result.seconds) * 1e3
            rows.append(
                [
                    _label(case, codes),
                    f"{_floats(case, codes) / (VOCAB_SIZE * HIDDEN_SIZE):.1%}",
                    num_tokens,
                    f"{result.median * 1e3:.2f} ({low:.2f}–{high:.2f})",
                    f"{dense.median / result.median:.1f}×",
                    f"{result.peak_bytes / 2**20:.0f}",
                    f"{dense.peak_bytes / max(1, result.peak_bytes):.1f}×",
                ]
            )
    return rows


def _decoding_rows(args: argparse.Namespace) -> list[list[object]]:
    rows: list[list[object]] = []
    for batch_size in (1, 8, 32):
        dense = in_fresh_process(decoding_step, "dense", 512, batch_size, args.device, args.repeats)
        rows.append(["dense", batch_size, f"{dense.median * 1e3:.3f}", "1.0×"])
        for case, codes in itertools.product(("scatter", "greedy", "sample"), args.codes):
            result = in_fresh_process(decoding_step, case, codes, batch_size, args.device, args.repeats)
            ratio = f"{dense.median / result.median:.1f}×"
            rows.append([f"{case}, K = {codes:,}", batch_size, f"{result.median * 1e3:.3f}", ratio])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--codes", type=int, nargs="+", default=[512, 2048])
    args = parser.parse_args()
    print(f"V = {VOCAB_SIZE:,}, d = {HIDDEN_SIZE}, float32; {machine(torch.device(args.device))}\n")
    header = [
        "training step",
        "floats",
        "N",
        "ms, median (min–max)",
        "faster than dense",
        "peak MiB",
        "less memory than dense",
    ]
    print(markdown_table(header, _training_rows(args)) + "\n")
    print(markdown_table(["decoding step", "batch", "ms", "faster than dense"], _decoding_rows(args)))


if __name__ == "__main__":
    main()
