"""Fusion weights against plain Python loops over the definitions, SciPy's minimiser and known answers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from lit_logits.functional import expert_divergences, fuse_logits, fusion_weights


def logits(batch=4, vocab=60, experts=1, seed=0, scale=2.0, moved=1.0, dtype=torch.float64):
    """A peaked large model, a base that resembles it, and experts near the base."""
    g = torch.Generator().manual_seed(seed)
    large = scale * torch.randn(batch, vocab, generator=g, dtype=dtype)
    base = 0.7 * large + scale * 0.5 * torch.randn(batch, vocab, generator=g, dtype=dtype)
    expert = base + moved * torch.randn(experts, batch, vocab, generator=g, dtype=dtype)
    return large, base, expert


def softmax(row):
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def kl(p, q):
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def objective(large, base, experts, alpha):
    """The paper's objective for one sequence, from its definition; all arrays are NumPy's."""
    fused = softmax(large + sum(a * (e - base) for a, e in zip(alpha, experts, strict=True)))
    p, q = softmax(large), softmax(base)
    return sum((kl(fused, p) - kl(softmax(e), q)) ** 2 + (kl(p, fused) - kl(q, softmax(e))) ** 2 for e in experts)


def exact_objective(large, base, experts, alpha):
    """The same for a batch, in float64: float32 may call the worse of two nearly equal points the better one."""
    large, base, experts, alpha = (x.double() for x in (large, base, experts, alpha))
    fused = (large + (alpha.unsqueeze(-1) * (experts - base)).sum(0)).log_softmax(-1)
    log_p, log_q, log_t = large.log_softmax(-1), base.log_softmax(-1), experts.log_softmax(-1)

    def divergence(a, b):
        return (a.exp() * (a - b)).sum(-1)

    forward = divergence(fused, log_p) - divergence(log_t, log_q)
    reverse = divergence(log_p, fused) - divergence(log_q, log_t)
    return (forward.square() + reverse.square()).sum(0)


def rows(large, base, experts):
    for b in range(len(large)):
        yield large[b].numpy(), base[b].numpy(), [expert[b].numpy() for expert in experts]


# --- fused logits ---


def test_fused_logits_are_the_sum():
    large, base, experts = logits(experts=3)
    alpha = torch.rand(3, 4, dtype=torch.float64)
    expected = large.clone()
    for t in range(3):
        for b in range(4):
            expected[b] += alpha[t, b] * (experts[t, b] - base[b])
    torch.testing.assert_close(fuse_logits(large, base, experts, alpha), expected)


def test_proxy_tuning_of_the_base_is_the_expert():
    _, base, experts = logits()
    torch.testing.assert_close(fuse_logits(base, base, experts, torch.ones(1, 4)), experts[0])


def test_tokens_that_are_ruled_out():
    inf = math.inf
    large = torch.tensor([[1.0, 1.0, 1.0, -inf]])
    base = torch.tensor([[0.0, -inf, 0.0, 0.0]])
    expert = torch.tensor([[[-inf, 0.0, 2.0, 1.0]]])
    assert fuse_logits(large, base, expert, torch.tensor([[0.5]])).tolist() == [[-inf, 1.0, 2.0, -inf]]
    assert fuse_logits(large, base, expert, torch.tensor([[0.0]])).tolist() == [[1.0, 1.0, 1.0, -inf]]


def test_half_precision_is_summed_in_float32():
    large, base, experts = logits(dtype=torch.float32)
    fused = fuse_logits(*(x.bfloat16() for x in (large, base, experts)), torch.ones(1, 4))
    assert fused.dtype == torch.float32
    torch.testing.assert_close(
        fused,
        fuse_logits(large.bfloat16().float(), base.bfloat16().float(), experts.bfloat16().float(), torch.ones(1, 4)),
    )


# --- divergences ---


def test_divergences_are_the_definitions():
    _, base, experts = logits(experts=2)
    forward, reverse = expert_divergences(base, experts)
    for t in range(2):
        for b in range(4):
            p, q = softmax(experts[t, b].numpy()), softmax(base[b].numpy())
            assert forward[t, b].item() == pytest.approx(kl(p, q), rel=1e-10)
            assert reverse[t, b].item() == pytest.approx(kl(q, p), rel=1e-10)


def test_divergences_are_over_the_common_support():
    _, base, experts = logits(vocab=10)
    base[:, 3], experts[0, :, 5] = -math.inf, -math.inf
    keep = [v for v in range(10) if v not in (3, 5)]
    for masked, cut in zip(
        expert_divergences(base, experts), expert_divergences(base[:, keep], experts[..., keep]), strict=True
    ):
        torch.testing.assert_close(masked, cut)


# --- known answers ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("moved", [0.05, 1.0, 4.0])
def test_large_equal_to_base_gives_the_expert(dtype, moved):
    _, base, experts = logits(vocab=500, moved=moved, dtype=dtype)
    found = fusion_weights(base, base, experts)
    torch.testing.assert_close(found.alpha, torch.ones_like(found.alpha), atol=1e-3, rtol=0)
    assert (found.objective <= 1e-5 * (1 + found.kl_forward)).all()
    fused = fuse_logits(base, base, experts, found.alpha).log_softmax(-1)
    torch.testing.assert_close(fused, experts[0].log_softmax(-1), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("solver", ["tilting", "grid"])
@pytest.mark.parametrize("mode", ["single", "joint"])
def test_expert_equal_to_base_gives_the_large_model(solver, mode):
    large, base, _ = logits(dtype=torch.float32)
    experts = base.expand(2, -1, -1)
    found = fusion_weights(large, base, experts, solver=solver, mode=mode)
    assert found.alpha.tolist() == [[0.0] * 4] * 2
    assert torch.equal(fuse_logits(large, base, experts, found.alpha), large)


def test_grid_of_the_paper_finds_one_for_large_equal_to_base():
    _, base, experts = logits()
    found = fusion_weights(base, base, experts, solver="grid")
    torch.testing.assert_close(found.alpha, torch.ones(1, 4, dtype=torch.float64))
    assert found.num_evals == 21


# --- the minimum ---


@pytest.mark.parametrize("moved", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_tilting_finds_the_minimum_of_the_definition(moved, seed):
    """SciPy's bounded minimiser, started in each tenth of the interval, on the paper's objective."""
    data = logits(seed=seed, moved=moved)
    found = fusion_weights(*data)
    for b, row in enumerate(rows(*data)):
        minima = [
            minimize_scalar(lambda a, r=row: objective(*r, [a]), bounds=(i / 5, i / 5 + 0.2), method="bounded").fun
            for i in range(10)
        ]
        own = objective(*row, [found.alpha[0, b].item()])
        scale = found.kl_forward[b].item() ** 2 + found.kl_reverse[b].item() ** 2
        assert own <= min(minima) + 1e-5 * scale
        assert found.objective[b].item() == pytest.approx(own, rel=1e-8, abs=1e-12)


def test_reported_divergences_are_those_of_the_fused_distribution():
    data = logits(experts=3)
    found = fusion_weights(*data, mode="joint")
    for b, (large, base, experts) in enumerate(rows(*data)):
        fused = softmax(large + sum(found.alpha[t, b].item() * (experts[t] - base) for t in range(3)))
        assert found.kl_forward[b].item() == pytest.approx(kl(fused, softmax(large)), rel=1e-8)
        assert found.kl_reverse[b].item() == pytest.approx(kl(softmax(large), fused), rel=1e-8)
        assert found.objective[b].item() == pytest.approx(
            objective(large, base, experts, found.alpha[:, b].tolist()), rel=1e-8
        )


@pytest.mark.parametrize("mode", ["single", "joint"])
def test_grid_is_a_loop_over_the_definition(mode):
    data = logits(batch=2, experts=2, vocab=20)
    found = fusion_weights(*data, solver="grid", mode=mode, step=0.5)
    points = [0.0, 0.5, 1.0, 1.5, 2.0]
    pairs = [(a, b) for a in points for b in points if mode == "joint" or a == 0 or b == 0]
    for b, row in enumerate(rows(*data)):
        values = {pair: objective(*row, pair) for pair in pairs}
        best = min(values, key=values.get)
        assert tuple(found.alpha[:, b].tolist()) == best
        assert found.objective[b].item() == pytest.approx(values[best], rel=1e-9)


def check_never_worse(seed, experts, moved, scale, vocab):
    data = logits(seed=seed, experts=experts, moved=moved, scale=scale, vocab=vocab, dtype=torch.float32)
    grid = fusion_weights(*data, solver="grid")
    single = fusion_weights(*data)
    joint = fusion_weights(*data, mode="joint")
    slack = 1e-5 * (grid.kl_forward + grid.kl_reverse).double().square() + 1e-9
    reached = [exact_objective(*data, found.alpha) for found in (grid, single, joint)]
    assert (reached[1] <= reached[0] * (1 + 1e-5) + slack).all()
    assert (reached[2] <= reached[1] * (1 + 1e-5) + slack).all()
    return single, joint


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.floats(0.05, 4),
    st.floats(0.3, 6),
    st.sampled_from([5, 60, 300, 1500]),
)
def test_never_worse_than_the_grid(seed, experts, moved, scale, vocab):
    single, joint = check_never_worse(seed, experts, moved, scale, vocab)
    for found in (single, joint):
        assert found.alpha.shape == (experts, 4)
        assert ((found.alpha >= 0) & (found.alpha <= 2)).all()
    assert ((single.alpha > 0).sum(0) <= 1).all()
    assert single.num_evals <= 21


@pytest.mark.parametrize(
    ("seed", "experts", "moved", "scale", "vocab"), [(848, 2, 4.0, 6.0, 60), (1280, 4, 2.515625, 5.625, 5)]
)
def test_never_worse_than_the_grid_where_there_are_two_minima(seed, experts, moved, scale, vocab):
    """A secant search between the roots of f and g alone once ended in the worse of two minima, far above the grid."""
    check_never_worse(seed, experts, moved, scale, vocab)


def test_joint_search_survives_a_singular_system():
    """One expert alone is free: a system of rank one, beside which float32 once lost the damping, so that LU failed."""
    check_never_worse(420785018, 2, 2.7716441056628818, 3.3918301581847183, 5)


@pytest.mark.parametrize(
    ("bounds", "step"),
    [((0.0, 2.0), 0.5), ((0.2, 1.1), 0.25), ((0.3, 3.0), 5.0), ((0.0, 0.7), 0.1), ((1.0, 1.5), 0.03)],
)
def test_never_worse_than_any_grid_and_its_bounds(bounds, step):
    """Also where the largest weight is no point of the grid, and where the grid is a single point."""
    data = logits(batch=50, vocab=5, moved=3.0, scale=5.0)
    found = fusion_weights(*data, bounds=bounds, step=step)
    reached = exact_objective(*data, found.alpha)
    assert ((found.alpha >= bounds[0]) & (found.alpha <= bounds[1])).all()
    for alpha in [*np.arange(bounds[0], bounds[1], step), bounds[1]]:
        assert (reached <= exact_objective(*data, torch.full((1, 50), alpha, dtype=torch.float64)) * (1 + 1e-9)).all()


def test_fewer_than_six_passes_on_average():
    counts = [fusion_weights(*logits(seed=seed, vocab=2000, dtype=torch.float32)).num_evals for seed in range(20)]
    assert sum(counts) / len(counts) < 6


def test_joint_reaches_both_targets_where_one_expert_cannot():
    """Two experts leave a line of weights; on it both residuals vanish up to the experts' own spread."""
    large, base, experts = logits(experts=2, seed=5)
    single, joint = fusion_weights(large, base, experts), fusion_weights(large, base, experts, mode="joint")
    assert (joint.objective <= single.objective).all()
    forward, reverse = expert_divergences(base, experts)
    spread = sum((x - x.mean(0)).square().sum(0) for x in (forward, reverse))
    reached = (joint.objective - spread) < 1e-3 * (forward.mean(0) ** 2 + reverse.mean(0) ** 2)
    assert reached.float().mean() >= 0.5


# --- invariants ---


@pytest.mark.parametrize(("moved", "scale"), [(1.0, 2.0), (4.0, 6.0)])
@pytest.mark.parametrize("mode", ["single", "joint"])
def test_sequences_do_not_see_each_other(moved, scale, mode):
    """Peaked ones take between two and a dozen passes, and those that are done drop out of the batch."""
    data = logits(batch=20, experts=2, moved=moved, scale=scale)
    whole = fusion_weights(*data, mode=mode)
    counts = []
    for b in range(20):
        alone = fusion_weights(data[0][b : b + 1], data[1][b : b + 1], data[2][:, b : b + 1], mode=mode)
        counts.append(alone.num_evals)
        torch.testing.assert_close(alone.alpha[:, 0], whole.alpha[:, b], atol=2e-4, rtol=0)
        torch.testing.assert_close(alone.objective[0], whole.objective[b])
    assert mode == "joint" or whole.num_evals == max(counts)


def test_constants_in_the_logits_change_nothing():
    large, base, experts = logits(dtype=torch.float32)
    moved = fusion_weights(large + 7, base - 30, experts + 50)
    torch.testing.assert_close(moved.alpha, fusion_weights(large, base, experts).alpha, atol=1e-3, rtol=0)


@pytest.mark.parametrize("solver", ["tilting", "grid"])
@pytest.mark.parametrize("mode", ["single", "joint"])
def test_masked_tokens_equal_a_smaller_vocabulary(solver, mode):
    large, base, experts = logits(experts=2)
    keep = [v for v in range(60) if v not in (3, 5, 8)]
    cut = fusion_weights(large[:, keep], base[:, keep], experts[..., keep], solver=solver, mode=mode)
    large[:, 3], base[:, 5], experts[1, :, 8] = (-math.inf,) * 3
    masked = fusion_weights(large, base, experts, solver=solver, mode=mode)
    for a, b in zip(masked[:4], cut[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bounds", [(0.0, 0.3), (1.8, 2.0), (0.5, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("mode", ["single", "joint"])
def test_bounds_are_kept_and_reached(bounds, mode):
    data = logits(experts=1, moved=1.0)
    found = fusion_weights(*data, bounds=bounds, mode=mode)
    free = fusion_weights(*data, bounds=(0.0, 5.0)).alpha
    torch.testing.assert_close(found.alpha, free.clamp(*bounds), atol=1e-3, rtol=0)


def test_peaked_and_tiny_distributions_are_finite():
    large = torch.tensor([[1e4, 0.0, -1e4]])
    base = torch.tensor([[0.0, 1e4, 0.0]])
    expert = torch.tensor([[[0.0, -1e4, 1e4]]])
    for solver in ("tilting", "grid"):
        for mode in ("single", "joint"):
            found = fusion_weights(large, base, expert, solver=solver, mode=mode)
            assert all(torch.isfinite(x).all() for x in found[:4])


@pytest.mark.parametrize("solver", ["tilting", "grid"])
@pytest.mark.parametrize("mode", ["single", "joint"])
def test_autocast_takes_no_digits(solver, mode):
    """Under it `vecdot` gives half precision, which moved joint weights by a quarter."""
    data = logits(vocab=500, experts=2, dtype=torch.float32)
    plain = fusion_weights(*data, solver=solver, mode=mode)
    with torch.autocast("cpu", torch.bfloat16):
        cast = fusion_weights(*data, solver=solver, mode=mode)
        assert torch.equal(fuse_logits(*data, plain.alpha), fuse_logits(*data, cast.alpha))
        for a, b in zip(
            expert_divergences(*data[1:]), expert_divergences(*(x.double() for x in data[1:])), strict=True
        ):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
    for a, b in zip(plain[:4], cast[:4], strict=True):
        assert torch.equal(a, b)


def test_dtypes_may_differ():
    large, base, experts = logits(dtype=torch.float32, experts=2)
    mixed = fusion_weights(large.double(), base, experts)
    assert mixed.alpha.dtype == torch.float64
    torch.testing.assert_close(mixed.alpha.float(), fusion_weights(large, base, experts).alpha, atol=1e-3, rtol=0)
    assert fuse_logits(large.double(), base, experts, mixed.alpha).dtype == torch.float64


# --- bad input ---


def test_bad_input_is_named():
    large, base, experts = logits()
    with pytest.raises(ValueError, match=r"\(S, B, V\) with S at least 1, but got \(4, 60\), \(4, 60\) and \(4, 60\)"):
        fusion_weights(large, base, experts[0])
    with pytest.raises(ValueError, match=r"0 ≤ smallest ≤ largest < ∞, but got \(1.0, 0.5\)"):
        fusion_weights(large, base, experts, bounds=(1.0, 0.5))
    with pytest.raises(ValueError, match=r"0 ≤ smallest ≤ largest < ∞, but got \(0.0, inf\)"):
        fusion_weights(large, base, experts, bounds=(0.0, math.inf))
    with pytest.raises(ValueError, match="`step` to be positive, but got 0"):
        fusion_weights(large, base, experts, solver="grid", step=0)
    with pytest.raises(ValueError, match="'tilting' or 'grid', but got 'newton'"):
        fusion_weights(large, base, experts, solver="newton")
    with pytest.raises(ValueError, match="'single' or 'joint', but got 'all'"):
        fusion_weights(large, base, experts, mode="all")
    with pytest.raises(ValueError, match=r"at most 10,000 points.*194,481. Use solver='tilting'"):
        fusion_weights(large, base, experts.expand(4, -1, -1), solver="grid", mode="joint")
    with pytest.raises(ValueError, match=r"`alpha` of shape \(1, 4\), but got \(4,\)"):
        fuse_logits(large, base, experts, torch.ones(4))
    broken = experts.clone()
    broken[0, 2, 7] = math.nan
    with pytest.raises(ValueError, match="`expert_logits` to be finite or −inf, but got NaN"):
        fusion_weights(large, base, broken)
    large[1, :30], base[1, 30:] = -math.inf, -math.inf
    with pytest.raises(ValueError, match="that all models can emit, but sequence 1 of the batch has none"):
        fusion_weights(large, base, experts)
