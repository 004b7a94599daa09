"""Weighted k-means against scikit-learn and its own definition; assignments, re-assignment and revival of codes.

Letters: P points, d dimensions, K clusters or codes, V vocabulary.
"""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.datasets import make_blobs

from lit_logits.functional import (
    code_means,
    frequency_assignment,
    kmeans,
    nearest_centroids,
    random_assignment,
    reassign_tokens,
    split_heavy_codes,
    vq_cross_entropy,
    weighted_kmeans,
)

SEEDS = st.integers(0, 2**31 - 1)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(seed=0, points=300, centers=7, d=5, spread=0.3):
    x, _ = make_blobs(points, d, centers=centers, cluster_std=spread, random_state=seed)
    return torch.tensor(x)


def inertia(points, centroids, assignments, weights=None):
    """The objective, by a loop."""
    weights = torch.ones(len(points)) if weights is None else weights
    pairs = zip(points, assignments.tolist(), weights.tolist(), strict=True)
    return sum(w * ((x - centroids[a]) ** 2).sum().item() for x, a, w in pairs)


def best(points, k, seeds=3, **kwargs):
    return min((kmeans(points, k, generator=rng(s), **kwargs) for s in range(seeds)), key=lambda r: r.inertia.item())


# ---------------------------------------------------------------------- k-means


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("points", "k"),
    [(blobs(), 7), (blobs(1, centers=12, points=801), 12), (torch.randn(501, 4, generator=rng(2)).double(), 12)],
    ids=["blobs", "more blobs", "no structure"],
)
def test_as_good_as_scikit_learn(points, k, weighted):
    weights = torch.rand(len(points), generator=rng(3)).double() ** 2 if weighted else None
    rival = KMeans(k, n_init=3, max_iter=100, random_state=0).fit(points.numpy(), sample_weight=weights)
    ours = best(points, k, seeds=10, weights=weights, num_iters=100)
    assert ours.inertia.item() <= 1.02 * rival.inertia_
    assert ours.inertia.item() == pytest.approx(inertia(points, ours.centroids, ours.assignments, weights), rel=1e-9)


def separated(points=2000, k=100, seed=1):
    x, _ = make_blobs(points, 5, centers=k, cluster_std=0.05, random_state=seed)
    return torch.tensor(x)


@pytest.mark.parametrize("num_iters", [0, 100], ids=["seeds", "converged"])
@pytest.mark.parametrize(
    ("points", "k", "weights"),
    [
        (separated(), 100, None),
        (separated(), 100, torch.rand(2000, generator=rng(3)).double() ** 4 + 1e-3),
        (torch.randn(2000, 16, generator=rng(4)).double(), 64, torch.arange(1, 2001).double() ** -0.75),
        (torch.randn(2000, 16, generator=rng(5)).double() * torch.logspace(0, -2, 16), 64, 1 / torch.arange(1.0, 2001)),
    ],
    ids=["separated", "separated and weighted", "weighted", "weighted along few directions"],
)
def test_one_start_is_as_good_as_one_of_greedy_k_means_plus_plus(points, k, weights, num_iters):
    """Seeds were no better than random: up to 35 times scikit-learn's inertia on clear clusters, 1.07 on Zipf's law."""
    ours, rival = 0.0, 0.0
    for seed in range(5):
        ours += kmeans(points, k, weights=weights, num_iters=num_iters, generator=rng(seed)).inertia.item()
        seeds, _ = kmeans_plusplus(points.numpy(), k, sample_weight=weights, random_state=seed)
        if num_iters:
            run = KMeans(k, init=seeds, n_init=1, max_iter=num_iters).fit(points.numpy(), sample_weight=weights)
            rival += run.inertia_
        else:
            nearest = torch.cdist(points, torch.tensor(seeds)).square().min(1).values
            rival += (nearest if weights is None else nearest * weights).sum().item()
    assert ours <= (1.03 if num_iters else 1.1) * rival


def test_seeds_are_drawn_without_multinomial(monkeypatch):
    """`torch.multinomial` stops at 2²⁴ points; the first seed was drawn with it."""
    monkeypatch.delattr(torch, "multinomial")
    assert kmeans(separated(300, 5), 5, generator=rng()).inertia.isfinite()


def test_one_start_is_close_to_the_best_of_many():
    """The seeding in rounds must not cost quality: a single run, averaged over seeds, is within 10 % of the best."""
    points = torch.randn(2000, 8, generator=rng(4))
    runs = torch.stack([kmeans(points, 64, generator=rng(s)).inertia for s in range(5)])
    rival = KMeans(64, n_init=3, random_state=0).fit(points.numpy()).inertia_
    assert runs.mean() <= 1.02 * rival
    assert runs.max() <= 1.05 * runs.min()


def test_a_common_offset_does_not_matter():
    """‖c‖²/2 − x·c cancels far from the origin: at 3,000 standard deviations the inertia was 60 % too large."""
    points = torch.randn(500, 8, generator=rng(0))
    near = best(points, 10)
    far = best(points + 3000.0, 10)
    exact = best((points + 3000.0).double(), 10)
    assert exact.inertia.item() <= 1.02 * near.inertia.item()
    assert far.inertia.item() <= 1.02 * exact.inertia.item()


@pytest.mark.parametrize("seed", range(3))
def test_integer_weights_are_replicated_points(seed):
    points = blobs(seed, points=60, centers=4, spread=0.2)
    weights = torch.randint(0, 5, (60,), generator=rng(seed))
    weighted = best(points, 4, weights=weights.double(), seeds=5, num_iters=100)
    replicated = best(points.repeat_interleave(weights, 0), 4, seeds=5, num_iters=100)
    torch.testing.assert_close(weighted.inertia, replicated.inertia)
    rows = [sorted(map(tuple, result.centroids.tolist())) for result in (weighted, replicated)]
    torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]))


def test_order_of_points_does_not_matter():
    points = blobs(5, centers=5, spread=0.2)
    order = torch.randperm(len(points), generator=rng(6))
    a, b = best(points, 5, num_iters=100), best(points[order], 5, num_iters=100)
    torch.testing.assert_close(a.inertia, b.inertia)
    same_cluster = a.assignments[:, None] == a.assignments
    assert torch.equal(same_cluster[order][:, order], b.assignments[:, None] == b.assignments)


@given(seed=SEEDS, p=st.integers(1, 60), d=st.integers(1, 4), weighted=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_at_convergence_centroids_are_means_and_assignments_nearest(seed, p, d, weighted, data):
    k = data.draw(st.integers(1, p))
    points = torch.randn(p, d, generator=rng(seed), dtype=torch.float64)
    weights = 0.1 + torch.rand(p, generator=rng(seed)).double() if weighted else torch.ones(p).double()
    result = kmeans(points, k, weights=weights, num_iters=300, generator=rng(seed))
    assert torch.equal(result.assignments, torch.cdist(points, result.centroids).argmin(dim=1))
    for code in range(k):
        mine = result.assignments == code
        assert mine.any()
        mean = (weights[mine, None] * points[mine]).sum(0) / weights[mine].sum()
        torch.testing.assert_close(result.centroids[code], mean)


def test_more_iterations_never_cost_more():
    points = torch.randn(400, 3, generator=rng(8))
    costs = [kmeans(points, 20, num_iters=n, generator=rng(0)).inertia.item() for n in (0, 1, 2, 5, 25)]
    assert costs == sorted(costs, reverse=True)


def test_a_cluster_for_each_point():
    points = torch.randn(37, 3, generator=rng(9))
    result = kmeans(points, 37, generator=rng())
    assert result.inertia.item() == pytest.approx(0, abs=1e-9)
    assert result.assignments.unique().numel() == 37


def test_fewer_distinct_points_than_clusters():
    points = torch.tensor([[0.0, 1.0], [2.0, 3.0], [5.0, 5.0]]).repeat(10, 1)
    for k in (3, 5, 30):
        result = kmeans(points, k, generator=rng())
        assert result.inertia.item() == pytest.approx(0, abs=1e-9)
        assert result.centroids.isfinite().all()
    assert kmeans(torch.zeros(5, 2), 3, generator=rng()).centroids.abs().sum() == 0


def test_points_of_weight_zero_pull_nothing_but_are_assigned():
    points = torch.tensor([[0.0], [1.0], [10.0], [11.0], [1000.0]])
    result = kmeans(points, 2, weights=torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), generator=rng())
    assert sorted(result.centroids.flatten().tolist()) == [0.5, 10.5]
    assert result.assignments[4] == result.assignments[3]
    assert result.inertia.item() == pytest.approx(1.0)


def test_the_generator_decides():
    points = torch.randn(200, 3, generator=rng(10))
    torch.manual_seed(0)
    a = kmeans(points, 9, generator=rng(1))
    torch.manual_seed(1)
    b, c = kmeans(points, 9, generator=rng(1)), kmeans(points, 9, generator=rng(2))
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(a.centroids, c.centroids)


def test_dtypes():
    points = blobs(11)
    assert kmeans(points, 3).centroids.dtype == torch.float64
    half = kmeans(points.bfloat16(), 7, generator=rng())
    assert half.centroids.dtype == torch.float32
    assert half.inertia <= 1.05 * kmeans(points.bfloat16().double(), 7, generator=rng()).inertia


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_points_and_weights_that_are_not_finite_raise(bad):
    points, weights = torch.randn(9, 2), torch.ones(9)
    points[3, 1] = bad
    with pytest.raises(ValueError, match="`points` to be finite, but got 1 NaN or infinite"):
        kmeans(points, 2)
    weights[2] = bad
    with pytest.raises(ValueError, match="`weights` to be finite"):
        kmeans(torch.randn(9, 2), 2, weights=weights)


@pytest.mark.parametrize(
    ("points", "k", "weights", "message"),
    [
        (torch.zeros(4, 2), 0, None, r"`num_clusters` to be in \[1, 4\].*got 0"),
        (torch.zeros(4, 2), 5, None, r"`num_clusters` to be in \[1, 4\].*got 5"),
        (torch.zeros(4), 1, None, "`points` to be floating point of shape"),
        (torch.zeros(4, 2, dtype=torch.long), 1, None, "`points` to be floating point"),
        (torch.zeros(4, 2), 1, torch.ones(3), "one number for each of the 4 points"),
        (torch.zeros(4, 2), 1, torch.tensor([1.0, -1.0, 1.0, 1.0]), "non-negative with a positive sum"),
        (torch.zeros(4, 2), 1, torch.zeros(4), "non-negative with a positive sum"),
    ],
)
def test_arguments_that_do_not_fit_raise(points, k, weights, message):
    with pytest.raises(ValueError, match=message):
        kmeans(points, k, weights=weights)


def test_nearest_in_chunks_equals_brute_force(monkeypatch):
    points, centroids = torch.randn(103, 4, generator=rng(0)), torch.randn(7, 4, generator=rng(1))
    brute = torch.cdist(points, centroids).argmin(dim=1)
    assert torch.equal(nearest_centroids(points, centroids), brute)
    # `lit_logits.functional.kmeans` is the function, which hides the module of that name.
    monkeypatch.setattr(sys.modules[kmeans.__module__], "_CHUNK_ELEMENTS", 40)
    assert torch.equal(nearest_centroids(points, centroids), brute)
    whole = kmeans(points, 7, generator=rng())
    monkeypatch.undo()
    torch.testing.assert_close(whole, kmeans(points, 7, generator=rng()))
    assert nearest_centroids(torch.zeros(1, 2), torch.ones(3, 2)).item() == 0  # the lowest index among equals


# ---------------------------------------------------------------------- k-means weighted by what occurs


def layer(seed=0, v=200, d=12, n=4000):
    """Output rows, counts with a long tail, and hidden states far from isotropic."""
    g = rng(seed)
    weight = torch.randn(v, d, generator=g)
    hidden = torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) * torch.logspace(0, -2, d) + 0.3
    counts = (1000 / torch.arange(1, v + 1) ** 1.2).floor()
    return weight, counts, hidden


def logit_error(weight, codebook, mapping, hidden, token_weights):
    """Σ_v w_v E_h[(h·W_v − h·C_{M(v)})²], straight from the hidden states."""
    difference = hidden.double() @ (weight - codebook[mapping]).double().T  # (N, V)
    return (token_weights.double() * difference.square().mean(dim=0)).sum()


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_weighted_inertia_is_the_error_of_the_logits(power):
    weight, counts, hidden = layer()
    moment = hidden.T @ hidden / len(hidden)
    result = weighted_kmeans(
        weight, 20, token_counts=counts, hidden_second_moment=moment, power=power, generator=rng(), num_iters=100
    )
    token_weights = counts.clamp(min=0.5) ** power
    error = logit_error(weight, result.centroids, result.assignments, hidden, token_weights)
    torch.testing.assert_close(result.inertia.double(), error, rtol=1e-3, atol=0)


def test_weighted_beats_plain_k_means_on_the_error_that_matters():
    weight, counts, hidden = layer(1)
    held_out = layer(1, n=8000)[2][4000:]
    moment = hidden.T @ hidden / len(hidden)
    weighted = weighted_kmeans(weight, 20, token_counts=counts, hidden_second_moment=moment, generator=rng())
    plain = kmeans(weight, 20, generator=rng())
    errors = [logit_error(weight, r.centroids, r.assignments, held_out, counts**0.75) for r in (weighted, plain)]
    assert errors[0] < 0.5 * errors[1]
    labels = torch.multinomial(counts, len(held_out), replacement=True, generator=rng(2))
    losses = [vq_cross_entropy(held_out, r.centroids, r.assignments, labels) for r in (weighted, plain)]
    assert all(loss.isfinite() for loss in losses)


def test_weighted_k_means_of_few_hidden_states_is_finite_and_still_good():
    """Fewer hidden states than dimensions: E[h hᵀ] is singular."""
    weight, counts, hidden = layer(2, d=32, n=10)
    moment = hidden.T @ hidden / len(hidden)
    result = weighted_kmeans(weight, 30, token_counts=counts, hidden_second_moment=moment, generator=rng())
    assert result.centroids.isfinite().all()
    plain = kmeans(weight, 30, generator=rng())
    errors = [logit_error(weight, r.centroids, r.assignments, hidden, counts) for r in (result, plain)]
    assert errors[0] < errors[1]


def test_an_identity_moment_and_even_counts_give_plain_k_means():
    weight = blobs(3).float()
    ours = weighted_kmeans(weight, 7, token_counts=torch.ones(300), hidden_second_moment=torch.eye(5), generator=rng(0))
    plain = kmeans(weight, 7, generator=rng(0))
    assert torch.equal(ours.assignments, plain.assignments)
    torch.testing.assert_close(ours.centroids, plain.centroids, rtol=1e-4, atol=1e-5)


def test_weighted_k_means_checks_its_arguments():
    weight, moment = torch.randn(9, 3), torch.eye(3)
    with pytest.raises(ValueError, match="one count for each of the 9 rows"):
        weighted_kmeans(weight, 2, token_counts=torch.ones(8), hidden_second_moment=moment)
    with pytest.raises(ValueError, match=r"`hidden_second_moment` to be \(3, 3\)"):
        weighted_kmeans(weight, 2, token_counts=torch.ones(9), hidden_second_moment=torch.eye(4))
    with pytest.raises(ValueError, match="`hidden_second_moment` to be finite"):
        weighted_kmeans(weight, 2, token_counts=torch.ones(9), hidden_second_moment=moment * torch.nan)


# ---------------------------------------------------------------------- assignments


@given(
    counts=st.lists(st.integers(0, 10**6), min_size=1, max_size=50),
    power=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_frequency_assignment_leaves_no_code_empty_and_follows_the_ranks(counts, power, data):
    """A token with more than 2/K of the mass pushed the first run, and with it all codes, beyond code 0."""
    k = data.draw(st.integers(1, len(counts)))
    mapping = frequency_assignment(torch.tensor(counts).float(), k, power=power)
    assert mapping.unique().tolist() == list(range(k))
    order = sorted(range(len(counts)), key=lambda v: -counts[v])  # stable
    ranked = mapping[order].tolist()
    assert ranked == sorted(ranked)


def test_frequency_assignment_of_a_natural_vocabulary():
    """Zipf's law, 49,152 tokens, 2,048 codes, the default power: two codes had no token."""
    counts = (1e6 / torch.arange(1, 49_153)).floor()
    assert frequency_assignment(counts, 2048).unique().numel() == 2048


def test_frequency_assignment_gives_frequent_tokens_smaller_codes():
    counts = 1000 / torch.arange(1, 501)
    sizes = frequency_assignment(counts, 20).bincount()
    assert (sizes.diff() >= -1).all()
    assert sizes[0] * 10 < sizes[-1]
    assert frequency_assignment(counts, 20, power=0).bincount().tolist() == [25] * 20
    mass = torch.zeros(20).index_add(0, frequency_assignment(counts, 20), (counts + 1).sqrt())
    assert mass.max() < 2 * mass.min()


@given(v=st.integers(1, 60), data=st.data())
@settings(max_examples=30, deadline=None)
def test_random_assignment_is_even(v, data):
    k = data.draw(st.integers(1, v))
    sizes = random_assignment(v, k, generator=rng(v)).bincount(minlength=k)
    assert sizes.max() - sizes.min() <= 1


def test_code_means_against_a_loop_and_in_bfloat16():
    vectors, mapping = torch.randn(50, 3, generator=rng(0)), torch.randint(4, (50,), generator=rng(1))
    weights = torch.rand(50, generator=rng(2))
    means, mass = code_means(vectors, mapping, 5, weights)
    for k in range(4):
        mine = mapping == k
        torch.testing.assert_close(mass[k], weights[mine].sum())
        torch.testing.assert_close(means[k], (weights[mine, None] * vectors[mine]).sum(0) / weights[mine].sum())
    assert mass[4] == 0
    assert means[4].tolist() == [0.0] * 3


def test_code_means_of_large_codes_in_bfloat16():
    """A bfloat16 count stops at 256: codes of more tokens got a mean that was many times too long."""
    means, mass = code_means(torch.ones(1000, 2, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.long), 1)
    torch.testing.assert_close(mass.float(), torch.tensor([1000.0]))
    torch.testing.assert_close(means.float(), torch.ones(1, 2), rtol=1e-2, atol=0)


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_reassignment_lowers_the_distortion(seed):
    vectors, mapping = torch.randn(40, 3, generator=rng(seed)).double(), random_assignment(40, 6, generator=rng(seed))
    mapping[mapping == 2] = 3  # an empty code stays empty
    after = reassign_tokens(vectors, mapping, 6)
    assert not (after == 2).any()
    costs = [((vectors - code_means(vectors, m, 6)[0][m]) ** 2).sum() for m in (mapping, after)]
    assert costs[1] <= costs[0] + 1e-9


# ---------------------------------------------------------------------- revival


@given(seed=SEEDS, with_vectors=st.booleans(), with_counts=st.booleans(), data=st.data())
@settings(max_examples=100, deadline=None)
def test_revival_invariants(seed, with_vectors, with_counts, data):
    v, k = 40, 8
    mapping = torch.randint(k - 2, (v,), generator=rng(seed))  # the last two codes are empty
    living = data.draw(st.integers(0, int(mapping.max())))
    living = int(mapping[living])
    dead = torch.tensor(data.draw(st.lists(st.integers(0, k - 1).filter(lambda c: c != living), unique=True)))
    dead = dead.long()
    counts = torch.randint(0, 20, (v,), generator=rng(seed)).float() if with_counts else torch.zeros(v)
    vectors = torch.randn(v, 3, generator=rng(seed)) if with_vectors else None
    before = mapping.clone()
    after, sources = split_heavy_codes(mapping, k, dead, token_counts=counts, vectors=vectors, generator=rng(seed))
    assert torch.equal(mapping, before)  # its argument is left alone
    assert after.shape == (v,)
    assert ((after >= 0) & (after < k)).all()
    sizes = after.bincount(minlength=k)
    changed = {code: sizes[code].item() for code in dead[sources >= 0].tolist()}
    assert all(changed.values()), "a revived code has tokens"
    assert all(sizes[code] > 0 for code in sources[sources >= 0].tolist()), "so has what it was split from"
    assert not torch.isin(after, dead[sources < 0]).any(), "a code that was not revived is left without tokens"
    untouched = ~torch.isin(before, dead) & ~torch.isin(after, dead)
    assert torch.equal(after[untouched], before[untouched]), "only tokens of dead and of split codes move"
    assert not torch.isin(sources, dead[sources < 0]).any()


def test_revival_splits_the_code_that_costs_most_into_its_clusters():
    """Four tokens near 0, two far groups in code 1; code 2 is dead: its one token joins code 0, code 1 is halved."""
    vectors = torch.tensor([[0.0], [0.1], [0.2], [0.1], [10.0], [10.1], [20.0], [20.1], [0.3]])
    mapping = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    counts = torch.tensor([5.0, 5.0, 5.0, 5.0, 1.0, 1.0, 2.0, 2.0, 0.0])
    after, sources = split_heavy_codes(
        mapping, 3, torch.tensor([2]), token_counts=counts, vectors=vectors, generator=rng()
    )
    assert sources.tolist() == [1]
    assert after.tolist() == [0, 0, 0, 0, 2, 2, 1, 1, 0]  # the heavier half keeps its name


def test_revival_without_vectors_deals_out_tokens_by_count():
    """Code 0 costs 9·H(1/9..) less than code 1's even use; its tokens are dealt out by falling count."""
    mapping = torch.tensor([0, 0, 1, 1, 1, 1])
    counts = torch.tensor([8.0, 1.0, 4.0, 3.0, 2.0, 1.0])
    after, sources = split_heavy_codes(mapping, 3, torch.tensor([2]), token_counts=counts)
    assert sources.tolist() == [1]
    assert after.tolist() == [0, 0, 1, 2, 1, 2]


def test_a_revived_code_may_be_split_again():
    vectors = torch.arange(8.0).unsqueeze(1) ** 2
    after, sources = split_heavy_codes(
        torch.zeros(8, dtype=torch.long),
        4,
        torch.tensor([1, 2, 3]),
        token_counts=torch.ones(8),
        vectors=vectors,
        generator=rng(),
    )
    assert (sources >= 0).all()
    assert after.unique().numel() == 4


def test_nothing_to_split_and_nothing_alive():
    mapping = torch.tensor([0, 1, 1])
    after, sources = split_heavy_codes(mapping, 3, torch.tensor([2]), token_counts=torch.tensor([9.0, 1.0, 0.0]))
    assert sources.tolist() == [-1]
    assert after.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="at least one living code"):
        split_heavy_codes(mapping, 3, torch.tensor([0, 1, 2]), token_counts=torch.ones(3))
    with pytest.raises(ValueError, match="at least one living code that holds tokens"):
        split_heavy_codes(mapping, 3, torch.tensor([0, 1]), token_counts=torch.ones(3))
