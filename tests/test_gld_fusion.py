"""Graphs on logits: loops from the formulas, POT as the oracle of the bound, and what the bound cannot see."""

import math
from collections import Counter
from importlib import import_module
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_logits.functional import (
    align_positions,
    co_activation_graph,
    common_span,
    edge_gw_bound,
    graph_strengths,
    gw_objective,
    gw_over_permutations,
    matched_graph_bound,
    node_strengths,
    sorted_gw_bound,
    top_k_logits,
    top_k_uld,
    top_k_values,
    uld_loss,
    vocabulary_graph,
    vocabulary_strengths,
)

ot = pytest.importorskip("ot")
seeds = st.integers(0, 2**31)


def draw(seed, *shape, dtype=torch.double):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_mask(seed, *shape, share=0.7):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def pot_gw(C1, C2, num_starts=6, seed=0):
    """The least of POT's local minima of GW² over several starts: an upper bound of GW²."""
    n, rng = len(C1), np.random.default_rng(seed)
    starts = [None, np.eye(n) / n, *(np.eye(n)[rng.permutation(n)] / n for _ in range(num_starts))]
    options = {"loss_fun": "square_loss", "symmetric": True, "max_iter": 50}  # any plan gives an upper bound
    values = [ot.gromov.gromov_wasserstein2(C1.numpy(), C2.numpy(), G0=start, **options) for start in starts]
    return max(0.0, float(min(values)))


# ---------------------------------------------------------------------- top-k with its tail


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 1), (1.0, 4), (2.5, 4), (0.5, 13)])
def test_top_k_is_that_of_the_whole_softmax(temperature, top_k):
    """Oracle: torch's own softmax, sort and moments."""
    logits = 3 * draw(0, 2, 5, 13) + 7
    top = top_k_logits(logits, top_k, temperature=temperature)
    log_probs, order = (logits / temperature).log_softmax(-1).sort(-1, descending=True)
    torch.testing.assert_close(top.log_probs, log_probs[..., :top_k])
    assert torch.equal(top.token_ids, order[..., :top_k])
    torch.testing.assert_close(top.tail, log_probs[..., top_k:].exp().sum(-1), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(top.log_normalizer, (logits / temperature).logsumexp(-1))
    torch.testing.assert_close(top.mean, (logits / temperature).mean(-1))
    torch.testing.assert_close(top.std, (logits / temperature).std(-1, correction=0))


def test_top_k_gradient_is_that_of_torch_and_of_differences():
    logits = draw(1, 7, 11).requires_grad_()
    weights = [draw(2, 7, 4), *(draw(3 + i, 7) for i in range(4))]

    def mine(z):
        top = top_k_logits(z, 4, temperature=1.7)
        return (top.log_probs, top.tail, top.log_normalizer, top.mean, top.std)

    def theirs(z):
        u = z / 1.7
        log_probs = u.log_softmax(-1).topk(4).values
        return (log_probs, 1 - log_probs.exp().sum(-1), u.logsumexp(-1), u.mean(-1), u.std(-1, correction=0))

    assert torch.autograd.gradcheck(mine, (logits,))
    grads = [
        torch.autograd.grad(sum((w * out).sum() for w, out in zip(weights, f(logits), strict=True)), logits)[0]
        for f in (mine, theirs)
    ]
    torch.testing.assert_close(*grads)


def test_chunks_change_nothing(monkeypatch):
    logits = draw(4, 9, 10).requires_grad_()
    whole = top_k_logits(logits, 3)
    whole_grad = torch.autograd.grad(sum(t.sum() for t in whole if t.requires_grad), logits)[0]
    monkeypatch.setattr(import_module("lit_logits.functional.top_k_logits"), "_CHUNK_ELEMENTS", 20)  # two rows
    parts = top_k_logits(logits, 3)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    part_grad = torch.autograd.grad(sum(t.sum() for t in parts if t.requires_grad), logits)[0]
    torch.testing.assert_close(part_grad, whole_grad, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_top_k_is_no_worse_than_the_naive_way_in_the_same_precision(dtype):
    """Large logits of large offset, against float64."""
    logits = (8 * draw(5, 50, 999) + 30).to(dtype)
    exact = logits.double().log_softmax(-1).topk(20).values
    naive = (logits.float().log_softmax(-1).topk(20).values - exact).abs().max()
    mine = top_k_logits(logits, 20)
    assert (mine.log_probs - exact).abs().max() <= naive + 1e-5
    assert mine.log_probs.dtype == torch.float32
    torch.testing.assert_close(mine.std.double(), logits.double().std(-1, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("ruled_out", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
def test_tokens_that_are_ruled_out_leave_the_softmax_of_the_others(ruled_out):
    """The normaliser once was off by as much as a huge mean had swallowed."""
    logits = torch.tensor([[0.0, 1.0, 2.0, ruled_out]])
    top, others = top_k_logits(logits, 2), top_k_logits(logits[:, :3], 2)
    for name in ("log_probs", "token_ids", "tail", "log_normalizer"):
        torch.testing.assert_close(getattr(top, name), getattr(others, name))
    assert uld_loss(logits, logits, top_k=2).item() == 0


@pytest.mark.parametrize("ruled_out", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("nodes", ["rank", "vocabulary"])
def test_a_student_that_rules_tokens_out_learns_of_the_others(ruled_out, nodes):
    """The gradient once was NaN beside a finite loss: 0 from the moments that no loss used, times −inf."""
    student, teacher = (draw(40 + i, 5, 9, dtype=torch.float32) for i in range(2))
    padded = torch.cat([student, torch.full((5, 1), ruled_out)], -1)
    grads = []
    for logits in (student.requires_grad_(), padded.requires_grad_()):
        mine, theirs = top_k_logits(logits, 3), top_k_logits(teacher, 3)
        strengths = [graph_strengths(top_k_values(t, "softmax"), t.token_ids, nodes=nodes) for t in (mine, theirs)]
        bound = sorted_gw_bound(strengths[0].strengths, strengths[1].strengths)
        grads.append(torch.autograd.grad(uld_loss(logits, teacher, top_k=3) + bound, logits)[0])
    torch.testing.assert_close(grads[1][:, :9], grads[0])
    assert (grads[1][:, 9] == 0).all()


@pytest.mark.parametrize(("top_k", "temperature", "match"), [(0, 1, "top_k"), (8, 1, r"\[1, 7\]"), (2, 0, "positive")])
def test_top_k_out_of_range(top_k, temperature, match):
    with pytest.raises(ValueError, match=match):
        top_k_logits(torch.zeros(2, 7), top_k, temperature=temperature)


def test_values_do_not_depend_on_what_softmax_does_not_see():
    """A constant a position leaves probabilities and standardised logits alone; a factor the latter."""
    logits = draw(6, 5, 30)
    shifted = logits + draw(7, 5, 1) * 10
    for values in ("softmax", "standardize"):
        one, other = (top_k_values(top_k_logits(z, 6), values) for z in (logits, shifted))
        torch.testing.assert_close(one, other)
    scaled = top_k_values(top_k_logits(3 * shifted, 6), "standardize")
    torch.testing.assert_close(scaled, top_k_values(top_k_logits(logits, 6), "standardize"))
    raw = top_k_values(top_k_logits(shifted, 6), "logits")
    torch.testing.assert_close(raw, shifted.topk(6).values)
    oracle = ((logits - logits.mean(-1, keepdim=True)) / logits.std(-1, correction=0, keepdim=True)).topk(6).values
    torch.testing.assert_close(one, oracle)


def test_equal_logits_have_no_spread_and_give_no_nan():
    logits = torch.zeros(2, 6, requires_grad=True)
    values = top_k_values(top_k_logits(logits, 3), "standardize")
    values.sum().backward()
    assert torch.equal(values, torch.zeros(2, 3))
    assert logits.grad.isfinite().all()


# ---------------------------------------------------------------------- graphs and strengths


def graph_by_loops(values, mask):
    k, kept = values.shape[-1], [t for t in range(len(values)) if mask[t]]
    graph = torch.zeros(k, k, dtype=values.dtype)
    for t in kept:
        for i in range(k):
            for j in range(k):
                graph[i, j] += values[t, i] * values[t, j] / len(kept)
    return graph


def test_graph_and_strengths_by_loops():
    values, mask = draw(8, 3, 6, 4), random_mask(9, 3, 6)
    graphs = co_activation_graph(values, mask)
    for sample in range(3):
        torch.testing.assert_close(graphs[sample], graph_by_loops(values[sample], mask[sample]))
    torch.testing.assert_close(node_strengths(values, mask), graphs.mean(-1))
    graphs = co_activation_graph(values)
    torch.testing.assert_close(graphs, co_activation_graph(values, mask | True))
    torch.testing.assert_close(node_strengths(values), graphs.mean(-1))


def vocabulary_graph_by_loops(values, ids, mask):
    """A dictionary of pairs of tokens."""
    kept = [t for t in range(len(values)) if mask[t]]
    nodes = sorted({int(i) for t in kept for i in ids[t]})
    pairs = dict.fromkeys(((a, b) for a in nodes for b in nodes), 0.0)
    for t in kept:
        for i, a in enumerate(ids[t].tolist()):
            for j, b in enumerate(ids[t].tolist()):
                pairs[a, b] += float(values[t, i] * values[t, j]) / len(kept)
    return nodes, torch.tensor([[pairs[a, b] for b in nodes] for a in nodes], dtype=values.dtype)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_vocabulary_graph_and_strengths_by_loops(seed):
    values, mask = draw(seed, 2, 5, 3), random_mask(seed + 1, 2, 5)
    ids = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(seed + t))[:3] for t in range(10)])
    ids = ids.view(2, 5, 3)
    strengths, num_nodes = vocabulary_strengths(values, ids, mask)
    for sample in range(2):
        nodes, oracle = vocabulary_graph_by_loops(values[sample], ids[sample], mask[sample])
        graph, node_ids = vocabulary_graph(values[sample], ids[sample], mask[sample])
        assert node_ids.tolist() == nodes
        assert int(num_nodes[sample]) == len(nodes)
        if nodes:
            torch.testing.assert_close(graph, oracle)
            expected = oracle.mean(-1).sort(descending=True).values
            torch.testing.assert_close(strengths[sample, : len(nodes)], expected)
        assert (strengths[sample, len(nodes) :] == 0).all()


def random_ids(seed, *shape, size):
    """Different ids along the last dimension."""
    return torch.rand(*shape[:-1], size, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., : shape[-1]]


def matched_bound_by_loops(student, source, table):
    """Dictionaries of edges between the student's tokens, of those that both have."""
    edges = {}
    for side, (values, ids, mask) in enumerate((student, source)):
        kept = [t for t in range(len(values)) if mask[t]]
        for t in kept:
            row = {}
            for token, value in zip(ids[t].tolist(), values[t], strict=True):
                own = table[token] if side else token
                if own in table and own >= 0:
                    row[own] = row.get(own, 0.0) + value / math.sqrt(len(kept))
            for a, one in row.items():
                for b, other in row.items():
                    pair = edges.setdefault((a, b), [0.0, 0.0])
                    pair[side] = pair[side] + one * other
    nodes = {a for a, _ in edges}
    difference = lambda a, b: edges.get((a, b), [0.0, 0.0])[0] - edges.get((a, b), [0.0, 0.0])[1]  # noqa: E731
    rows = [sum(difference(a, b) for b in nodes) / len(nodes) for a in nodes]
    distortion = math.sqrt(
        sum(float(torch.as_tensor(difference(a, b)).detach()) ** 2 for a in nodes for b in nodes)
    ) / max(1, len(nodes))
    return sum(map(abs, rows)), distortion, len(nodes)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_matched_graphs_by_loops(seed):
    """Of another number of positions and another k; two tokens of the source stand for one of the student's."""
    student = draw(seed, 2, 5, 4).requires_grad_(), random_ids(seed, 2, 5, 4, size=9), random_mask(seed + 1, 2, 5)
    source = draw(seed + 2, 2, 6, 3), random_ids(seed + 3, 2, 6, 3, size=8), random_mask(seed + 4, 2, 6)
    table = [4, -1, 0, 8, -1, 2, 4, 7]
    found = matched_graph_bound(*student[:2], *source[:2], student[2], source[2], source_to_student=torch.tensor(table))
    one_vocabulary = matched_graph_bound(*student[:2], *source[:2], student[2], source[2])
    for sample in range(2):
        pair = [[part[sample] for part in side] for side in (student, source)]
        oracle, distortion, num_nodes = matched_bound_by_loops(*pair, table)
        torch.testing.assert_close(found[sample], torch.as_tensor(oracle, dtype=torch.double))
        assert float(found[sample]) <= max(1, num_nodes) * distortion + 1e-12
        oracle, *_ = matched_bound_by_loops(*pair, list(range(9)))
        torch.testing.assert_close(one_vocabulary[sample], torch.as_tensor(oracle, dtype=torch.double))


def test_matched_graphs_see_which_tokens_are_strong():
    """What sorted strengths do not: the same graph over other tokens. Padding changes nothing."""
    values, ids = draw(3, 6, 4).requires_grad_(), random_ids(4, 6, 4, size=12)
    order = torch.arange(12).roll(1)
    same = matched_graph_bound(values, ids, values, ids)
    assert same.item() == 0
    assert torch.equal(torch.autograd.grad(same, values)[0], torch.zeros_like(values))
    moved = matched_graph_bound(values, ids, values, order[ids])
    strengths, num_nodes = vocabulary_strengths(values, ids)
    other, _ = vocabulary_strengths(values, order[ids])
    assert float(moved) > 0.1 > float(sorted_gw_bound(strengths, other, num_nodes)) == pytest.approx(0, abs=1e-12)
    assert float(matched_graph_bound(values, ids, values, order[ids], source_to_student=order.argsort())) < 1e-12
    mask = torch.arange(8) < 6
    padded = [torch.nn.functional.pad(part, (0, 0, 0, 2), value=7) for part in (values, ids)]
    torch.testing.assert_close(matched_graph_bound(*padded, values, order[ids], mask), moved)
    nothing = matched_graph_bound(values, ids, values, ids, source_to_student=torch.full((12,), -1))
    nothing.backward()
    assert float(nothing) == 0
    assert torch.equal(values.grad, torch.zeros_like(values))


def test_gradient_of_matched_graphs_reaches_the_student_alone():
    student, source = (draw(seed, 3, 2).requires_grad_() for seed in (5, 6))
    ids = random_ids(7, 3, 2, size=5), random_ids(8, 3, 2, size=5)
    table = torch.tensor([1, 0, -1, 3, 4])
    bound = lambda values: matched_graph_bound(values, ids[0], source, ids[1], source_to_student=table)  # noqa: E731
    assert torch.autograd.gradcheck(bound, (student,))
    bound(student).backward()
    assert source.grad is None


def test_strengths_over_no_position_are_zero_and_have_a_graph():
    values = draw(10, 2, 4, 3).requires_grad_()
    ids, mask = torch.arange(3).expand(2, 4, 3), torch.zeros(2, 4, dtype=torch.bool)
    total = node_strengths(values, mask).sum() + vocabulary_strengths(values, ids, mask).strengths.sum()
    total.backward()
    assert total.item() == 0
    assert torch.equal(values.grad, torch.zeros_like(values))


def test_gradients_of_strengths_are_those_of_the_graphs():
    values, mask = draw(11, 6, 4).requires_grad_(), random_mask(12, 6)
    weights = draw(13, 4)
    one = torch.autograd.grad((node_strengths(values, mask) * weights).sum(), values)[0]
    other = torch.autograd.grad((co_activation_graph(values, mask).mean(-1) * weights).sum(), values)[0]
    torch.testing.assert_close(one, other)
    ids = torch.stack([torch.randperm(7)[:4] for _ in range(6)])
    assert torch.autograd.gradcheck(lambda z: vocabulary_strengths(z, ids, mask).strengths, (values,))


@pytest.mark.parametrize("nodes", ["rank", "vocabulary"])
def test_padding_changes_nothing(nodes):
    values, ids = draw(14, 1, 5, 3), torch.randint(0, 9, (1, 5, 1)) + torch.tensor([0, 20, 40])
    padded = torch.cat([draw(15, 1, 2, 3) * 1e3, values, draw(16, 1, 3, 3) * 1e3], 1)
    padded_ids = torch.cat([torch.tensor([[[1, 2, 3]]]).expand(1, 2, 3), ids, torch.ones(1, 3, 3).long()], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0, 0]]).bool()
    one, other = graph_strengths(values, ids, nodes=nodes), graph_strengths(padded, padded_ids, mask, nodes=nodes)
    count = int(one.num_nodes[0])
    assert one.num_nodes.tolist() == other.num_nodes.tolist()
    torch.testing.assert_close(one.strengths[:, :count], other.strengths[:, :count])


def test_standardising_by_the_k_values_alone_would_leave_no_strength():
    """Why the moments are those of the vocabulary: values of mean 0 at each position sum to 0, and so does a row."""
    values = draw(17, 6, 4)
    values = values - values.mean(-1, keepdim=True)
    torch.testing.assert_close(node_strengths(values), torch.zeros(4, dtype=torch.double))


def test_unknown_nodes_and_masks_of_other_shapes():
    with pytest.raises(ValueError, match="'rank', or 'vocabulary' with `token_ids`"):
        graph_strengths(torch.zeros(3, 2), nodes="vocabulary")
    with pytest.raises(ValueError, match=r"`mask` of shape \(3,\)"):
        node_strengths(torch.zeros(3, 2), torch.ones(2, dtype=torch.bool))


# ---------------------------------------------------------------------- the bound


def test_bound_by_hand_and_for_graphs_of_different_size():
    f, g = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 2.5])
    assert sorted_gw_bound(f, g).item() == pytest.approx(0.5 + 2.0)  # 3 − 2.5 and 2 − 0
    assert sorted_gw_bound(f, f.flip(0)).item() == 0
    counts = torch.tensor([2, 1])
    pairs = torch.tensor([[3.0, 2.0, 0.0], [3.0, 0.0, 0.0]]), torch.tensor([[2.5, 0.0], [1.0, 9.0]])
    assert sorted_gw_bound(*pairs, num_nodes=counts).tolist() == [2.5, 2.0]


@pytest.mark.nightly
@pytest.mark.slow
def test_bound_holds_against_pot_on_thousands_of_graphs():
    """Random graphs: symmetric ones, co-activation graphs of Gaussian values, and nearly equal ones."""
    checked = 0
    for seed in range(3000):
        n = 3 + seed % 8
        if seed % 3 == 0:
            C1, C2 = (M + M.T for M in (draw(seed, n, n), draw(seed + 1, n, n)))
        else:
            Z1, Z2 = draw(seed, 9, n).sort(-1, descending=True).values, draw(seed + 1, 9, n).abs()
            C1 = co_activation_graph(Z1)
            C2 = co_activation_graph(Z1 + 0.05 * Z2) if seed % 3 == 1 else co_activation_graph(Z2)
        bound = sorted_gw_bound(C1.mean(-1), C2.mean(-1)) / n
        gw = math.sqrt(pot_gw(C1, C2, num_starts=2, seed=seed))
        assert float(bound) <= gw + 1e-7
        assert float(edge_gw_bound(C1, C2)) <= gw + 1e-7
        checked += 1
    assert checked == 3000


@pytest.mark.slow
def test_bound_holds_against_pot_on_a_thousand_graphs_of_real_text():
    """Of the next-word counts of Python's documentation, as two models that read different halves of it have them."""
    words = [word for text in sorted(map(str, topics.values())) for word in text.split()]
    most = [word for word, _ in Counter(words).most_common(400)]
    places = {word: number for number, word in enumerate(most)}
    ids = [places[word] for word in words if word in places]
    half, models = len(ids) // 2, []
    for part in (ids[:half], ids[half:]):
        counts = torch.full((400, 400), 0.1, dtype=torch.double)
        counts.index_put_(
            (torch.tensor(part[:-1]), torch.tensor(part[1:])), torch.tensor(1.0).double(), accumulate=True
        )
        models.append(counts.log())
    for number in range(1000):
        k, text = 4 + number % 7, torch.tensor(ids[17 * number : 17 * number + 17])
        tops = [top_k_logits(model[text], k) for model in models]
        C1, C2 = (co_activation_graph(top_k_values(top, "standardize")) for top in tops)
        gw = math.sqrt(pot_gw(C1, C2, num_starts=1, seed=number))
        assert float(sorted_gw_bound(C1.mean(-1), C2.mean(-1))) / k <= gw + 1e-7
        assert float(edge_gw_bound(C1, C2)) <= gw + 1e-7
        assert gw > 0.01  # the halves differ


@given(seeds, st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_bounds_lie_below_the_exact_distance(seed, n):
    """For Gram matrices the best of all permutations is exact, and POT never ends below it."""
    C1, C2 = (co_activation_graph(draw(seed + i, 5, n)) for i in range(2))
    exact = gw_over_permutations(C1, C2)
    assert float(sorted_gw_bound(C1.mean(-1), C2.mean(-1)) / n) <= math.sqrt(exact) + 1e-9
    assert float(edge_gw_bound(C1, C2)) <= math.sqrt(exact) + 1e-9
    assert pot_gw(C1, C2, num_starts=3) >= float(exact) - 1e-9


def test_objective_by_loops_and_by_pot():
    C1, C2 = (M + M.T for M in (draw(20, 4, 4), draw(21, 3, 3)))
    plan = torch.rand(4, 3, dtype=torch.double)
    plan /= plan.sum()
    total = sum(
        float((C1[i, j] - C2[k, m]) ** 2 * plan[i, k] * plan[j, m])
        for i in range(4)
        for j in range(4)
        for k in range(3)
        for m in range(3)
    )
    assert float(gw_objective(C1, C2, plan)) == pytest.approx(total)
    p, q = plan.sum(1).numpy(), plan.sum(0).numpy()
    constant, h1, h2 = ot.gromov.init_matrix(C1.numpy(), C2.numpy(), p, q, "square_loss")
    assert ot.gromov.gwloss(constant, h1, h2, plan.numpy()) == pytest.approx(total)


def test_permuted_graphs_are_at_distance_zero():
    values = draw(22, 7, 5)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    C1, C2 = co_activation_graph(values), co_activation_graph(values[:, order])
    assert float(sorted_gw_bound(C1.mean(-1), C2.mean(-1))) == pytest.approx(0, abs=1e-12)
    assert float(edge_gw_bound(C1, C2)) == pytest.approx(0, abs=1e-12)
    assert float(gw_over_permutations(C1, C2)) == pytest.approx(0, abs=1e-12)
    ids = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(t))[:5] for t in range(7)])
    renamed = torch.randperm(9, generator=torch.Generator().manual_seed(99))[ids]
    one, other = vocabulary_strengths(values, ids), vocabulary_strengths(values, renamed)
    torch.testing.assert_close(one, other)


def test_what_the_bound_cannot_see():
    """Two graphs of equal node strengths: GW~ is 0, and exact GW and the bound by edges are not."""
    Z1 = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]], dtype=torch.double)
    Z2 = torch.full((2, 4), 0.5, dtype=torch.double)
    C1, C2 = co_activation_graph(Z1), co_activation_graph(Z2)
    torch.testing.assert_close(C1.mean(-1), C2.mean(-1))
    assert float(sorted_gw_bound(node_strengths(Z1), node_strengths(Z2))) == pytest.approx(0, abs=1e-12)
    assert float(gw_over_permutations(C1, C2)) > 0.05
    assert pot_gw(C1, C2) > 0.05
    assert float(edge_gw_bound(C1, C2)) > 0.2


def test_too_many_nodes_for_all_permutations():
    with pytest.raises(ValueError, match="at most 9 nodes"):
        gw_over_permutations(torch.zeros(10, 10), torch.zeros(10, 10))


# ---------------------------------------------------------------------- token-wise loss


def uld_by_sorting(student, teacher):
    """ULD as its paper has it: both distributions sorted whole, the shorter filled up with zeros."""
    size, total = max(student.shape[-1], teacher.shape[-1]), 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = (sorted(z.softmax(-1).tolist(), reverse=True) for z in (s, t))
        p, q = p + [0.0] * (size - len(p)), q + [0.0] * (size - len(q))
        total += sum(abs(a - b) for a, b in zip(p, q, strict=True))
    return total / len(student)


@pytest.mark.parametrize(("student_size", "teacher_size"), [(7, 7), (7, 12), (12, 7)])
def test_uld_of_whole_vocabularies(student_size, teacher_size):
    student, teacher = 2 * draw(30, 4, student_size), 2 * draw(31, 4, teacher_size)
    assert float(uld_loss(student, teacher)) == pytest.approx(uld_by_sorting(student, teacher))
    assert float(uld_loss(student, student[:, torch.randperm(student_size)])) == pytest.approx(0, abs=1e-12)


@given(seeds, st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_uld_of_the_top_k_lies_below_that_of_all(seed, top_k):
    student, teacher = 2 * draw(seed, 4, 9), 2 * draw(seed + 1, 4, 11)
    below, whole = (uld_loss(student, teacher, top_k=k, reduction="none") for k in (top_k, None))
    assert (below <= whole + 1e-12).all()
    p, q = (z.softmax(-1).topk(top_k).values for z in (student, teacher))
    torch.testing.assert_close(below, (p - q).abs().sum(-1) + (p.sum(-1) - q.sum(-1)).abs())


def test_uld_gradient_reaches_the_student_only():
    student, teacher = draw(32, 3, 6).requires_grad_(), draw(33, 3, 8).requires_grad_()
    uld_loss(student, teacher, top_k=4).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    for kwargs in ({}, {"top_k": 3}, {"top_k": 3, "values": "standardize"}, {"values": "logits", "temperature": 2.0}):
        assert torch.autograd.gradcheck(lambda z, kw=kwargs: uld_loss(z, teacher, **kw), (student,))


def test_uld_mask_and_errors():
    student, teacher, mask = draw(34, 2, 3, 5), draw(35, 2, 3, 6), random_mask(36, 2, 3)
    each = uld_loss(student, teacher, reduction="none")
    assert float(uld_loss(student, teacher, mask)) == pytest.approx(float(each[mask].mean()))
    nothing = uld_loss(student.requires_grad_(), teacher, torch.zeros(2, 3, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))
    with pytest.raises(ValueError, match="Align them first"):
        uld_loss(student[:, :2], teacher)
    with pytest.raises(ValueError, match=r"\[1, 5\]"):
        uld_loss(student, teacher, top_k=6)


def test_a_longer_teacher_list_is_cut_with_its_mass_kept():
    student, teacher = draw(37, 4, 9), draw(38, 4, 11)
    short = top_k_uld(top_k_logits(student, 3), top_k_logits(teacher, 3))
    torch.testing.assert_close(top_k_uld(top_k_logits(student, 3), top_k_logits(teacher, 7)), short)


# ---------------------------------------------------------------------- alignment


def align_by_loops(ends1, ends2):
    """For each end the last position of either side that has it; −1 elsewhere."""
    result = torch.full_like(ends1, -1)
    for row in range(len(ends1)):
        for t, end in enumerate(ends1[row].tolist()):
            later = ends1[row, t + 1 :].tolist()
            there = [u for u, other in enumerate(ends2[row].tolist()) if other == end]
            if end >= 0 and end not in later and there:
                result[row, t] = there[-1]
    return result


def random_ends(seed, rows, length, limit):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, limit, (rows, length), generator=generator).sort(-1).values
    before = torch.randint(0, length, (rows, 1), generator=generator)
    return ends.masked_fill(torch.arange(length) < before, -1)


@given(seeds, st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_alignment_by_loops(seed, limit):
    ends1, ends2 = random_ends(seed, 3, 8, limit), random_ends(seed + 1, 3, 11, limit)
    assert torch.equal(align_positions(ends1, ends2), align_by_loops(ends1, ends2))


def test_alignment_within_characters_and_of_white_space_in_front():
    """The first reads white space as a token of its own; in either, tokens end within a character."""
    ends1, ends2 = torch.tensor([[-1, 0, 0, 1, -1, 2, 5]]), torch.tensor([[0, 1, -1, -1, 2, -1]])
    assert align_positions(ends1, ends2).tolist() == [[-1, -1, 0, 1, -1, 4, -1]]


def test_alignment_of_nothing():
    none, some = torch.full((2, 3), -1), torch.tensor([[0, 1, 2], [0, 1, 2]])
    assert (align_positions(none, some) == -1).all()
    assert (align_positions(some, none) == -1).all()
    assert align_positions(none[:, :0], some).shape == (2, 0)


def test_positions_within_a_character_lie_in_the_span():
    """They once were left out of graphs, which need no alignment. One that reads on beyond the other's end is out."""
    ends1 = torch.tensor([[-1, 0, -1, 3, -1, 6, -1], [-1, 0, -1, 3, -1, 6, -1]])
    ends2 = torch.tensor([[0, 3, -1, -1, 6], [0, -1, -1, 3, -1]])
    one, other = common_span(ends1, ends2)
    assert one.tolist() == [[False, True, True, True, True, True, False], [False, True, True, True] + [False] * 3]
    assert other.tolist() == [[True] * 5, [True, True, True, True, False]]


def test_span_that_both_tokenisations_reach():
    """The second sample has been cut in the other tokenisation, the third has nothing there."""
    ends1 = torch.tensor([[0, 3, 7], [0, 3, 7], [0, 3, 7]])
    ends2 = torch.tensor([[0, 5, 7], [0, 5, -1], [-1, -1, -1]])
    one, other = common_span(ends1, ends2)
    assert one.tolist() == [[True, True, True], [True, True, False], [False, False, False]]
    assert other.tolist() == [[True, True, True], [True, True, False], [False, False, False]]
