"""How often the search for the Gromov–Wasserstein distance finds it: POT alone, and with swaps, against all matchings.

    python -m benchmarks.gw_search [--nodes 4 6 8 10 32] [--pairs 80]

Pairs of Gram graphs of T = 16 positions each: over ranks, the n largest standardised logits; over a vocabulary, the n
strongest ids among the 10 largest logits of each position; and of normal values of any sign, the hard case. Logits are
those of `benchmarks.gld_loss`, with 1,000 tokens. Shown is the share of pairs whose best value is that of the best of
all n! matchings, which for Gram matrices is GW², to 1e-9 where the largest edge is 1; so up to 8 nodes. POT alone
starts where `gw_upper_bound` does. A look is what `GWApproximationLogger` takes of one source: the graphs of 4 samples,
compared from 5 starts, nothing drawn; the median over all pairs.
"""

import argparse
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.gld_loss import make_logits
from benchmarks.measure import machine, markdown_table, measure
from lit_logits.functional import co_activation_graph, gw_objective, gw_over_permutations, top_k_logits, top_k_values
from lit_logits.functional.gw_search import _starts, compare_graphs, gw_upper_bound, load_pot, node_values

POSITIONS, VOCAB_SIZE, TOP_K = 16, 1000, 10
STARTS = (5, 20)
MAX_MATCHED = 8  # 40,320 matchings
SAMPLES = 4  # of a look


def make_values(kind: str, num_nodes: int, seed: int) -> Tensor:
    """(T, n), whose `co_activation_graph` is a graph."""
    if kind == "any sign":
        g = torch.Generator().manual_seed(seed)
        return torch.randn(POSITIONS, num_nodes, generator=g, dtype=torch.float64)
    top = top_k_logits(make_logits(POSITIONS, VOCAB_SIZE, seed), num_nodes if kind == "rank" else TOP_K)
    token_ids = top.token_ids if kind == "vocabulary" else None
    return node_values(top_k_values(top, "standardize").double(), token_ids, max_nodes=num_nodes).values


def search(C1: Tensor, C2: Tensor) -> dict[tuple[str, int], Tensor]:
    """GW² at the best that each way finds."""
    best = {}
    for count in STARTS:
        g = torch.Generator().manual_seed(0)
        best["POT", count] = torch.stack([gw_objective(C1, C2, plan) for plan in pot_plans(C1, C2, count, g)]).min()
        g = torch.Generator().manual_seed(0)
        best["search", count] = gw_upper_bound(C1, C2, num_starts=count, generator=g).square()
    return best


def pot_plans(C1: Tensor, C2: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
    """Where POT's conditional gradient ends, as `gw_upper_bound` calls it."""
    options = {"loss_fun": "square_loss", "symmetric": True, "max_iter": 1000, "tol_rel": 1e-12, "tol_abs": 1e-12}
    find = load_pot().gromov.gromov_wasserstein
    return [find(C1, C2, G0=start, **options) for start in _starts(C1, C2, count, generator)]


def look(samples: list[tuple[Tensor, Tensor]]) -> None:
    for values in samples:
        compare_graphs(*map(co_activation_graph, values), generator=torch.Generator().manual_seed(0))


def run(kind: str, num_nodes: int, num_pairs: int) -> list[object]:
    """A row of the table."""
    seeds = range(0, 2 * num_pairs, 2)
    pairs = [(make_values(kind, num_nodes, seed), make_values(kind, num_nodes, seed + 1)) for seed in seeds]
    hits = dict.fromkeys(((way, count) for way in ("POT", "search") for count in STARTS), 0)
    for values in pairs if num_nodes <= MAX_MATCHED else ():
        graphs = [co_activation_graph(of_one) for of_one in values]
        scale = max(graph.abs().max() for graph in graphs)
        C1, C2 = (graph / scale for graph in graphs)
        exact = gw_over_permutations(C1, C2)
        for way, value in search(C1, C2).items():
            hits[way] += int(value <= exact + 1e-9)
    shares = [f"{count / num_pairs:.0%}" if num_nodes <= MAX_MATCHED else "" for count in hits.values()]
    looks = [pairs[start : start + SAMPLES] for start in range(0, num_pairs, SAMPLES)]
    turns = cycle(looks)
    seconds = measure(lambda: look(next(turns)), repeats=len(looks), device=torch.device("cpu")).median
    return [kind, num_nodes, *shares, f"{seconds * 1e3:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 6, 8, 10, 32])
    parser.add_argument("--pairs", type=int, default=80)
    args = parser.parse_args()
    rows = [run(kind, nodes, args.pairs) for kind in ("rank", "vocabulary", "any sign") for nodes in args.nodes]
    header = ["graphs", "n", *(f"{way}, {count} starts" for way in ("POT", "search") for count in STARTS)]
    print(f"{args.pairs} pairs a row; {machine(torch.device('cpu'))}\n")
    print(markdown_table([*header, "a look, ms"], rows))


if __name__ == "__main__":
    main()
