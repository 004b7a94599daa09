"""The searches for fusion weights as an accelerator runs them: no value is read, and results are those of the CPU."""

import math

import pytest
import torch
from host_reads import HostReads
from scipy.optimize import minimize_scalar
from test_fusion_search import draw, objective

from lit_logits.functional import checks, fusion_weights, prompt_fusion_weights


def as_on_device(function, *args, **kwargs):
    """Run with CPU tensors what an accelerator would run; the host must read nothing."""
    with pytest.MonkeyPatch.context() as patch, HostReads() as reads:
        patch.setattr(checks, "_READABLE_DEVICES", set())
        found = function(*args, **kwargs)
    assert not reads.found
    return found


def several(seed, experts=2, dtype=torch.float64):
    large, base, expert = draw(seed)
    noise = torch.randn(experts - 1, *large.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return large.to(dtype), base.to(dtype), torch.cat([expert, base + noise]).to(dtype)


def test_a_read_is_found():
    """The mode itself: on the CPU's path there are reads, and each kind of read is told."""
    with HostReads() as reads:
        fusion_weights(*draw(0))
    assert any("aminmax" in line or "bool" in line for line in reads.found)
    assert any(": tolist:" in line for line in reads.found)
    with HostReads() as reads:
        prompt_fusion_weights(*draw(0), torch.arange(4))
    assert any("aten::index" in line for line in reads.found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_line_search_ends_where_that_of_the_cpu_does(dtype):
    for seed in [*range(40), 225, 394, 620, 932, 1952, 2311, 2549, 3622]:
        data = draw(seed)
        given = [logits.to(dtype) for logits in data]
        expected, found = fusion_weights(*given), as_on_device(fusion_weights, *given)
        apart = (found.alpha - expected.alpha).abs()[0].double()
        # Elsewhere the objective ties: f and g round by a few eps of what they are made of.
        values = objective(*data, torch.stack([expected.alpha[0], found.alpha[0]], 1).double())
        eps = torch.finfo(dtype).eps * (1 + expected.kl_forward + expected.kl_reverse).double()
        tied = values[:, 1] <= values[:, 0] + 16 * eps * values[:, 0].sqrt() + (16 * eps) ** 2
        assert bool(((apart <= 1e-4) | tied).all()), seed
        assert dtype == torch.float32 or bool((apart <= 1e-4).all()), seed
        torch.testing.assert_close(found.kl_forward, expected.kl_forward, atol=1e-3, rtol=2e-3)


def test_a_line_search_finds_the_minimum_of_the_definition():
    for seed in range(10):
        data = draw(seed)
        found = as_on_device(fusion_weights, *data).alpha[0].tolist()
        for row, alpha in enumerate(found):
            own = [data[0][row : row + 1], data[1][row : row + 1], data[2][:, row : row + 1]]
            near = max(0.0, alpha - 0.01), min(2.0, alpha + 0.01)

            def value(x, own=own):
                return float(objective(*own, torch.tensor([[x]], dtype=torch.float64)))

            best = minimize_scalar(value, bounds=near, method="bounded", options={"xatol": 1e-7})
            assert alpha == pytest.approx(best.x, abs=1e-4)


@pytest.mark.parametrize(("bounds", "step"), [((0.2, 1.1), 0.25), ((0.3, 3.0), 5.0), ((0.5, 0.5), 0.1), ((0, 0.05), 1)])
def test_any_grid(bounds, step):
    for seed in range(8):
        settings = {"bounds": bounds, "step": step}
        expected = fusion_weights(*draw(seed), **settings)
        found = as_on_device(fusion_weights, *draw(seed), **settings)
        assert bool(((found.alpha - expected.alpha).abs() <= 1e-4).all())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"criterion": "equal"},
        {"criterion": "equal", "mode": "joint"},
        {"criterion": "projection"},
        {"criterion": "projection", "mode": "joint", "scale": 1.3},
        {"criterion": "uncertain"},
        {"criterion": "equal", "min_entropy": 0.1, "scale": 0.7},
        {"solver": "grid", "step": 0.5},
        {"solver": "grid", "step": 0.5, "mode": "joint"},
    ],
    ids=str,
)
def test_every_criterion_of_several_experts(settings):
    for seed in range(6):
        data = several(seed)
        expected, found = fusion_weights(*data, **settings), as_on_device(fusion_weights, *data, **settings)
        torch.testing.assert_close(found.alpha, expected.alpha, atol=1e-4, rtol=0)
        for a, b in zip(found[1:4], expected[1:4], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_the_joint_search_is_not_above_the_joint_grid():
    for seed in (0, 53, 112):
        data = several(seed)
        found = as_on_device(fusion_weights, *data, mode="joint")
        torch.testing.assert_close(found.objective, fusion_weights(*data, mode="joint").objective, atol=2e-6, rtol=1e-5)
        grid = fusion_weights(*data, mode="joint", solver="grid", step=0.25)
        assert bool((found.objective <= grid.objective + 2e-6).all())


@pytest.mark.parametrize("mode", ["single", "joint"])
def test_tokens_that_are_ruled_out(mode):
    large, base, experts = several(3)
    large[0, 1], base[1, 2], experts[0, 2, 3] = (-math.inf,) * 3
    for criterion in ("distance", "projection", "equal"):
        settings = {"mode": mode, "criterion": criterion}
        expected = fusion_weights(large, base, experts, **settings)
        found = as_on_device(fusion_weights, large, base, experts, **settings)
        torch.testing.assert_close(found.objective, expected.objective, atol=2e-6, rtol=1e-3)
        if mode == "single":
            torch.testing.assert_close(found.alpha, expected.alpha, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [{}, *({"criterion": name} for name in ("projection", "equal", "uncertain")), {"mode": "joint"}],
    ids=str,
)
def test_logits_that_are_not_valid_give_nan_for_their_sequence_alone(settings):
    large, base, experts = several(1)
    whole = as_on_device(fusion_weights, large, base, experts, **settings)
    large[0, 3], base[1, 2], experts[1, 2] = math.nan, math.inf, -math.inf
    found = as_on_device(fusion_weights, large, base, experts, **settings)
    for a, b in zip(found[:4], whole[:4], strict=True):
        assert bool(a[..., :3].isnan().all())
        torch.testing.assert_close(a[..., 3], b[..., 3])


# ---------------------------------------------------------------------- prompts


@pytest.mark.parametrize("mode", ["single", "joint"])
def test_the_weight_of_a_prompt(mode):
    g = torch.Generator().manual_seed(0)
    for seed in range(8):
        large, base, experts = several(seed)
        labels = torch.randint(large.shape[1], (4,), generator=g)
        large[3, labels[3]] = -math.inf  # a row that has no weight in the search
        owner = torch.tensor([2, 0, 2, 0])
        settings = {"num_prompts": 3, "mode": mode}
        expected = prompt_fusion_weights(large, base, experts, labels, owner, **settings)
        found = as_on_device(prompt_fusion_weights, large, base, experts, labels, owner, **settings)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        one = as_on_device(prompt_fusion_weights, large, base, experts, labels, mode=mode)
        torch.testing.assert_close(
            one, prompt_fusion_weights(large, base, experts, labels, mode=mode), atol=1e-4, rtol=0
        )


def test_a_prompt_with_logits_that_are_not_valid_gets_nan():
    large, base, experts = several(0)
    large[0] = math.nan
    rows = large, base, experts, torch.arange(4), torch.tensor([0, 1, 1, 1])
    found = as_on_device(prompt_fusion_weights, *rows, num_prompts=2)
    assert found.isnan().tolist() == [[True, False], [True, False]]
