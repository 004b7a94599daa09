"""Losses on logits' graphs and top-k: against explicit graphs, exact GW, whole sorts and log_softmax of everything.

    python -m benchmarks.gld_loss [--device cuda] [--repeats 3] [--threads 2]

Logits are Zipf-like: −log of an id's rank plus Gumbel noise, so that the k largest of a position are k draws without
replacement, and `n` ids of a sample's T·k are different. Times are medians, of forward and backward together unless
said otherwise; memory is the peak above the inputs, each case in a process of its own. A graph over the vocabulary is
made by one product of the dense (T, n) matrix of a sample with itself, which is fairer than the (T, n, n) products of
`vocabulary_graph`; measured is one sample, and B times that is shown. What has V columns is measured on `--dense-rows`
positions, ours and theirs; part (b) scales the top-k, which works row by row, to B·T.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ot
import torch
from torch import Tensor

from benchmarks.measure import Measurement, in_fresh_process, machine, markdown_table, measure
from lit_logits.functional import (
    TopKLogits,
    co_activation_graph,
    graph_strengths,
    sorted_gw_bound,
    top_k_logits,
    top_k_values,
    uld_loss,
)

POT_MAX_NODES = 32
Results = dict[tuple[str, int, int], Measurement]  # of a case, V (0: does not matter) and k (0: does not matter)


def make_logits(rows: int, vocab_size: int, seed: int) -> Tensor:
    """(rows, V); which ids are frequent is the same for every seed."""
    rank = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0)) + 1
    noise = torch.empty(rows, vocab_size).exponential_(generator=torch.Generator().manual_seed(seed))
    return noise.clamp_(min=1e-7).log_().add_(rank.log()).neg_()


def kept_logits(vocab_size: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Values and ids, (B + 1, T, k): the teacher's samples are the student's shifted by one."""
    samples = [
        top_k_logits(make_logits(args.positions, vocab_size, seed), max(args.top_k)) for seed in range(args.batch + 1)
    ]
    top = TopKLogits(*(torch.stack(tensors) for tensors in zip(*samples, strict=True)))
    return top_k_values(top, "standardize"), top.token_ids


# ---------------------------------------------------------------------- graphs


def dense_vocabulary_graph(values: Tensor, token_ids: Tensor) -> Tensor:
    """(n, n) of one sample, by one product."""
    node_ids, nodes = token_ids.unique(return_inverse=True)
    dense = values.new_zeros(len(values), len(node_ids)).scatter(1, nodes, values)
    return dense.T @ dense / len(values)


def bound(case: str, student: Tensor, teacher: Tensor, ids_s: Tensor, ids_t: Tensor) -> Tensor:
    if case == "vocabulary":
        nodes_t = graph_strengths(teacher, ids_t, nodes="vocabulary")
        nodes_s = graph_strengths(student, ids_s, nodes="vocabulary")
        num_nodes = torch.minimum(nodes_s.num_nodes, nodes_t.num_nodes)
        return sorted_gw_bound(nodes_s.strengths, nodes_t.strengths, num_nodes)
    strengths: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "rank": lambda values, _: graph_strengths(values).strengths,
        "rank, T outer products": lambda values, _: co_activation_graph(values).mean(-1),
        "rank, one product": lambda values, _: (values.mT @ values / values.shape[-2]).mean(-1),
        "vocabulary, one product": lambda values, ids: dense_vocabulary_graph(values[0], ids[0]).mean(-1),
    }
    return sorted_gw_bound(strengths[case](student, ids_s), strengths[case](teacher, ids_t))


def bound_step(case: str, kept: tuple[Tensor, Tensor], repeats: int, args: argparse.Namespace) -> Measurement:
    torch.set_num_threads(args.threads)
    values, ids = (tensor.clone().to(args.device) for tensor in kept)  # not shared with the process that drew them
    student = values[:-1].clone().requires_grad_(not case.endswith("forward"))

    def step() -> None:
        student.grad = None
        loss = bound(case.removesuffix(", forward"), student, values[1:], ids[:-1], ids[1:]).mean()
        if loss.requires_grad:
            loss.backward()

    return measure(step, repeats=repeats, device=torch.device(args.device))


def exact_seconds(values: Tensor) -> float:
    """Exact GW of all samples by POT's conditional gradient in float64, forward only."""
    graphs = (values.mT @ values / values.shape[-2]).double().numpy()
    start = time.perf_counter()
    for C1, C2 in pairwise(graphs):
        ot.gromov.gromov_wasserstein2(C1, C2, loss_fun="square_loss")
    return time.perf_counter() - start


# ---------------------------------------------------------------------- what has V columns


def naive_top_k(logits: Tensor, top_k: int) -> Tensor:
    log_probs = logits.log_softmax(-1).topk(top_k).values
    return log_probs.sum() + logits.mean(-1).sum() + logits.std(-1, correction=0).sum()


def our_top_k(logits: Tensor, top_k: int) -> Tensor:
    top = top_k_logits(logits, top_k)
    return top.log_probs.sum() + top.mean.sum() + top.std.sum()


def dense_uld(student: Tensor, teacher: Tensor) -> Tensor:
    with torch.no_grad():
        target = teacher.softmax(-1).sort(-1, descending=True).values
    return (student.softmax(-1).sort(-1, descending=True).values - target).abs().sum(-1).mean()


def logits_step(case: str, vocab_size: int, top_k: int, repeats: int, args: argparse.Namespace) -> Measurement:
    """Memory beyond the logits and their gradient."""
    torch.set_num_threads(args.threads)
    student = make_logits(args.dense_rows, vocab_size, 0).to(args.device).requires_grad_(case != "topk")
    teacher = make_logits(args.dense_rows if "ULD" in case else 1, vocab_size, 1).to(args.device)
    steps: dict[str, Callable[[], Any]] = {
        "topk": lambda: student.topk(top_k),
        "top_k_logits": lambda: our_top_k(student, top_k).backward(),
        "log_softmax": lambda: naive_top_k(student, top_k).backward(),
        "ULD": lambda: uld_loss(student, teacher, top_k=top_k).backward(),
        "ULD, sorted": lambda: dense_uld(student, teacher).backward(),
    }

    def step() -> None:
        student.grad = None
        steps[case]()

    result = measure(step, repeats=repeats, device=torch.device(args.device))
    gradient = student.nbytes if case != "topk" else 0
    return result._replace(peak_bytes=max(0, result.peak_bytes - gradient))


# ---------------------------------------------------------------------- tables


def _ms(result: Measurement, factor: float = 1.0) -> str:
    return f"{result.median * factor * 1e3:,.2f}"


def _mib(result: Measurement) -> str:
    return f"{result.peak_bytes / 2**20:,.0f}"


def _faster(ours: Measurement, other: Measurement, factor: float = 1.0) -> str:
    return f"{other.median * factor / ours.median:,.1f}×"


def _less(ours: Measurement, other: Measurement) -> str:
    return f"{other.peak_bytes / max(2**20, ours.peak_bytes):,.1f}×"


def _rank_rows(kept: tuple[Tensor, Tensor], results: Results, args: argparse.Namespace) -> list[list[object]]:
    rows: list[list[object]] = []
    graphs = ("rank, T outer products", "rank, one product")
    for k in args.top_k:
        data = kept[0][..., :k].contiguous(), kept[1][..., :k].contiguous()
        for case in ("rank", *graphs):
            results[case, 0, k] = in_fresh_process(bound_step, case, data, args.repeats, args)
        ours = results["rank", 0, k]
        exact = ["k too large", ""]
        if k <= POT_MAX_NODES:
            forward = bound_step("rank, forward", data, args.repeats, args)  # of time alone, which needs no new process
            seconds = exact_seconds(data[0])
            exact = [f"{seconds * 1e3:,.2f}", f"{seconds / forward.median:,.1f}×"]
        for case in graphs:
            graph = results[case, 0, k]
            cells = [_ms(ours), _ms(graph), _faster(ours, graph), _mib(ours), _mib(graph), _less(ours, graph)]
            rows.append([case, "any", k, k, *cells, *exact])
    return rows


def _vocabulary_rows(
    vocab_size: int, kept: tuple[Tensor, Tensor], results: Results, args: argparse.Namespace
) -> list[list[object]]:
    rows: list[list[object]] = []
    for k in args.top_k:
        data = kept[0][..., :k].contiguous(), kept[1][..., :k].contiguous()
        sizes = [len(ids.unique()) for ids in data[1]]
        n = sum(sizes) // len(sizes)
        ours = results["vocabulary", vocab_size, k] = in_fresh_process(
            bound_step, "vocabulary", data, args.repeats, args
        )
        cells = [_ms(ours), f"skipped: a graph of {4 * n**2 / 1e9:.1f} GB", "", _mib(ours), "", ""]
        if 4 * n**2 <= args.max_graph_gb * 1e9:
            pair = data[0][:2].contiguous(), data[1][:2].contiguous()
            case = "vocabulary, one product"
            graph = results[case, vocab_size, k] = in_fresh_process(bound_step, case, pair, args.slow_repeats, args)
            time_cells = [_ms(ours), _ms(graph, args.batch), _faster(ours, graph, args.batch)]
            cells = [*time_cells, _mib(ours), _mib(graph), _less(ours, graph)]
        rows.append(["vocabulary, one product", f"{vocab_size:,}", k, f"{n:,}", *cells, "", ""])
    return rows


def _share_rows(results: Results, args: argparse.Namespace) -> list[list[object]]:
    rows: list[list[object]] = []
    scale = args.batch * args.positions / args.dense_rows
    for vocab_size in args.vocab:
        for k in args.top_k:
            ours, plain = results["top_k_logits", vocab_size, k], results["topk", vocab_size, k]
            row: list[object] = [f"{vocab_size:,}", k, _ms(ours, scale), _ms(plain, scale)]
            for key in (("rank", 0, k), ("vocabulary", vocab_size, k)):
                seconds = results[key].median / scale
                row += [f"{seconds / ours.median:.1%}", f"{seconds / plain.median:.1%}"]
            graph = results.get(("vocabulary, one product", vocab_size, k))
            row.append(_faster(ours, graph, args.batch / scale) if graph else "skipped")
            rows.append(row)
    return rows


def _pair_rows(case: str, other: str, results: Results, args: argparse.Namespace) -> list[list[object]]:
    rows: list[list[object]] = []
    for vocab_size in args.vocab:
        for k in args.top_k:
            ours = results[case, vocab_size, k]
            rival = results.get((other, vocab_size, k)) or results[other, vocab_size, 0]
            cells = [_ms(ours), _ms(rival), _faster(ours, rival), _mib(ours), _mib(rival), _less(ours, rival)]
            rows.append([f"{vocab_size:,}", k, *cells])
    return rows


def _measure_logits(results: Results, args: argparse.Namespace) -> None:
    for vocab_size in args.vocab:
        case = "ULD, sorted"
        results[case, vocab_size, 0] = in_fresh_process(logits_step, case, vocab_size, 1, args.slow_repeats, args)
        for k in args.top_k:
            results["topk", vocab_size, k] = logits_step("topk", vocab_size, k, args.repeats, args)  # of time alone
            for case in ("top_k_logits", "log_softmax", "ULD"):
                results[case, vocab_size, k] = in_fresh_process(logits_step, case, vocab_size, k, args.repeats, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slow-repeats", type=int, default=1, help="of graphs over the vocabulary and whole sorts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=8, help="B, samples")
    parser.add_argument("--positions", type=int, default=512, help="T of a sample")
    parser.add_argument("--vocab", type=int, nargs="+", default=[49_152, 262_144])
    parser.add_argument("--top-k", type=int, nargs="+", default=[10, 32, 128])
    parser.add_argument("--dense-rows", type=int, default=512, help="positions of what has V columns")
    parser.add_argument("--max-graph-gb", type=float, default=4.0, help="skip graphs over the vocabulary above this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="ot")
    print(f"B = {args.batch}, T = {args.positions}, float32; {machine(torch.device(args.device))}\n")

    results: Results = {}
    rows: list[list[object]] = []
    for index, vocab_size in enumerate(args.vocab):
        kept = kept_logits(vocab_size, args)
        rows += _rank_rows(kept, results, args) if index == 0 else []
        rows += _vocabulary_rows(vocab_size, kept, results, args)
    print("(a) GW~ of B pairs of samples from their top-k, by strengths and by graphs; exact GW forward only\n")
    header = ["nodes, and how the graph is made", "V", "k", "n", "strengths, ms", "graph, ms", "faster"]
    header += ["strengths, peak MiB", "graph, peak MiB", "less memory", "exact GW, ms", "forward faster"]
    print(markdown_table(header, rows) + "\n", flush=True)

    _measure_logits(results, args)
    print("(b) The strengths of both sides with their loss, as a share of the top-k of the student's B·T positions:")
    print(f"top_k_logits forward and backward, topk forward only, both scaled from {args.dense_rows} positions\n")
    header = ["V", "k", "top_k_logits, ms", "topk, ms", "rank, of top_k_logits", "of topk"]
    header += ["vocabulary, of top_k_logits", "of topk", "vocabulary graph, of top_k_logits"]
    print(markdown_table(header, _share_rows(results, args)) + "\n")

    beyond = ["ours, peak MiB beyond logits and gradient", "theirs", "less memory"]
    print(f"(c) ULD of the k largest against softmax and sort of the whole vocabulary, {args.dense_rows} positions\n")
    header = ["V", "k", "top-k, ms", "sort, ms", "faster", *beyond]
    print(markdown_table(header, _pair_rows("ULD", "ULD, sorted", results, args)) + "\n")
    print(f"(d) top_k_logits against log_softmax, topk, mean and std, {args.dense_rows} positions\n")
    header = ["V", "k", "top_k_logits, ms", "log_softmax, ms", "faster", *beyond]
    print(markdown_table(header, _pair_rows("top_k_logits", "log_softmax", results, args)))


if __name__ == "__main__":
    main()
