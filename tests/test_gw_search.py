"""The search for the Gromov–Wasserstein distance, against all permutations of small graphs and against POT."""

import itertools

import pytest
import torch

from lit_logits.functional import co_activation_graph, gw_over_permutations, gw_search, vocabulary_graph
from lit_logits.functional.gw_search import GWComparison, compare_graphs, gw_upper_bound, node_values

ot = pytest.importorskip("ot")


def gram(size, seed, positions=8):
    """Of values of any sign: the hard case."""
    g = torch.Generator().manual_seed(seed)
    return co_activation_graph(torch.randn(positions, size, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_exact_is_the_best_permutation_in_most_cases_and_never_below_it(size):
    """POT alone, of the same starts, finds it in a few of a hundred such graphs: most permutations are stationary."""
    hits, count, pot_hits = 0, 40, 0
    for seed in range(count):
        C1, C2 = gram(size, 2 * seed), gram(size, 2 * seed + 1)
        exact = gw_over_permutations(C1, C2).sqrt().item()
        found = compare_graphs(C1, C2, generator=torch.Generator().manual_seed(0))
        assert found.exact >= exact - 1e-9
        assert found.exact <= 1.5 * exact
        assert found.sorted_bound <= exact + 1e-12
        assert found.edge_bound <= exact + 1e-12
        hits += found.exact <= exact + 1e-9
        value = ot.gromov.gromov_wasserstein2(C1, C2, loss_fun="square_loss", symmetric=True)
        assert found.exact <= value.clamp(min=0).sqrt().item() + 1e-7
        pot_hits += value.clamp(min=0).sqrt().item() <= exact + 1e-6
    assert hits >= 0.85 * count
    assert hits > pot_hits or size < 4


def test_of_largest_logits_the_search_does_not_miss():
    """What graphs over ranks are made of, also in units that are tiny."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        values = torch.randn(2, 9, 300, generator=g, dtype=torch.float64).topk(7).values
        for scale in (1.0, 1e-6):
            C1, C2 = (scale * co_activation_graph(of_one) for of_one in values)
            exact = gw_over_permutations(C1, C2).sqrt().item()
            assert gw_upper_bound(C1, C2).item() == pytest.approx(exact, rel=1e-12)


def test_no_swap_betters_the_matching():
    for seed in range(20):
        C1, C2 = gram(7, seed), gram(7, 100 + seed)
        order = gw_search._swapped(C1, C2, torch.arange(7))
        assert sorted(order.tolist()) == list(range(7))
        value = (C1 - C2[order][:, order]).square().sum()
        assert value <= (C1 - C2).square().sum()
        for i, j in itertools.combinations(range(7), 2):
            other = order.clone()
            other[i], other[j] = order[j], order[i]
            assert value <= (C1 - C2[other][:, other]).square().sum() + 1e-9


def test_more_starts_never_hurt():
    for seed in range(10):
        C1, C2 = gram(9, seed), gram(9, 100 + seed)
        values = [
            gw_upper_bound(C1, C2, num_starts=n, generator=torch.Generator().manual_seed(1)) for n in (1, 2, 3, 5, 20)
        ]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("size", [2, 6, 12])
def test_permuted_graphs(size):
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        values = torch.randn(7, size, generator=g, dtype=torch.float64).exp()
        C1 = co_activation_graph(values)
        C2 = co_activation_graph(values.flip(0)[:, torch.randperm(size, generator=g)])
        found = compare_graphs(C1, C2)
        assert found == GWComparison(0.0, 0.0, 0.0)
        assert found.ratio == 1


def test_different_graphs_of_equal_strengths():
    """The bound is blind to them; the edges tell the first pair apart, and nothing but the distance the second."""
    found = compare_graphs(torch.tensor([[3.0, 0], [0, 3]]).double(), torch.tensor([[2.0, 1], [1, 2]]).double())
    assert found == pytest.approx((0, 1, 1))
    assert found.ratio == 0
    hexagon, triangles = 2 * torch.eye(6).double(), 2 * torch.eye(6).double()  # with 2 on the diagonal, Gram matrices
    for i in range(6):
        hexagon[i, (i + 1) % 6] = hexagon[(i + 1) % 6, i] = 1
        for j in range(3):
            if i % 3 != j:
                triangles[i, i // 3 * 3 + j] = 1
    assert torch.linalg.eigvalsh(hexagon).min() > -1e-9
    assert torch.linalg.eigvalsh(triangles).min() > -1e-9
    found = compare_graphs(hexagon, triangles)
    assert found.sorted_bound == found.edge_bound == found.ratio == 0
    assert found.exact == pytest.approx(gw_over_permutations(hexagon, triangles).sqrt().item())
    assert found.exact > 0.3


def test_no_graph_at_all():
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    assert compare_graphs(nothing, nothing) == (0, 0, 0)
    assert compare_graphs(nothing, torch.eye(4).double()).exact == pytest.approx(0.5)


@pytest.mark.parametrize("max_nodes", [1, 3, 10, 999])
def test_vocabulary_nodes_are_rows_and_columns_of_the_whole_graph(max_nodes):
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        values = torch.randn(6, 4, generator=g, dtype=torch.float64)
        ids = torch.stack([torch.randperm(15, generator=g)[:4] for _ in range(6)])
        whole = vocabulary_graph(values, ids)
        found = node_values(values, ids, max_nodes=max_nodes)
        assert len(found.node_ids) == min(max_nodes, len(whole.node_ids))
        places = torch.searchsorted(whole.node_ids, found.node_ids)
        assert torch.equal(whole.node_ids[places], found.node_ids)
        torch.testing.assert_close(co_activation_graph(found.values), whole.graph[places][:, places])
        strengths = whole.graph.mean(1)
        torch.testing.assert_close(strengths[places], strengths.sort(descending=True).values[:max_nodes])


def test_a_large_vocabulary_makes_no_large_graph():
    """60,000 nodes: the whole graph would take 29 GB."""
    ids = torch.arange(60_000).view(-1, 20)
    found = node_values(torch.rand(len(ids), 20, dtype=torch.float64), ids, max_nodes=32)
    assert found.values.shape == (3000, 32)
