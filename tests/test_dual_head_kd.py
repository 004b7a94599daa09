"""Losses and gradients of dual-head distillation against loops written from the formulas, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_logits.functional.chunks import chunked_sum
from lit_logits.functional.dual_head_kd import (
    binary_kl,
    binary_kl_norm,
    cosine_logit_loss,
    kd_kl_divergence,
    l1_logit_loss,
    logit_loss,
    mse_logit_loss,
)
from lit_logits.functional.gradients import align_gradients, average_over_ranks, project_conflicting_gradient

KINDS = ["kl", "binary_kl", "binary_kl_norm", "mse", "l1", "cosine"]


def logits(rows=5, classes=7, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64) * scale
    return student, teacher


def bernoulli_kl(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softmax(row):
    powers = [math.exp(x - max(row)) for x in row]
    return [power / sum(powers) for power in powers]


def loop(kind, student, teacher, tau):
    """Mean over rows of the definition, in plain Python."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        if kind == "kl":
            total += tau**2 * sum(
                p * math.log(p / q)
                for p, q in zip(softmax([x / tau for x in t]), softmax([x / tau for x in s]), strict=True)
            )
        elif kind == "binary_kl":
            total += tau**2 * sum(bernoulli_kl(sigmoid(b / tau), sigmoid(a / tau)) for a, b in zip(s, t, strict=True))
        elif kind == "binary_kl_norm":
            total += tau**2 * sum(bernoulli_kl(0.5, sigmoid((a - b) / tau)) for a, b in zip(s, t, strict=True))
        elif kind == "mse":
            total += sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
        elif kind == "l1":
            total += sum(abs(a - b) for a, b in zip(s, t, strict=True))
        elif kind == "cosine":
            dot = sum(a * b for a, b in zip(s, t, strict=True))
            total += 1 - dot / math.sqrt(sum(a * a for a in s) * sum(b * b for b in t))
    return total / len(student)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", [0.7, 2.0, 4.0])
def test_values_are_the_formulas(kind, tau):
    student, teacher = logits()
    value = logit_loss(student, teacher, kind=kind, temperature=tau)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(loop(kind, student, teacher, tau), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_formulas(kind):
    """Central differences of the plain Python loop, and gradcheck in both arguments."""
    student, teacher = logits(rows=2, classes=4)
    student.requires_grad_()
    (grad,) = torch.autograd.grad(logit_loss(student, teacher, kind=kind, temperature=2.0), student)
    for i in range(2):
        for k in range(4):
            step = torch.zeros_like(student)
            step[i, k] = 1e-5
            up, down = (loop(kind, (student + sign * step).detach(), teacher, 2.0) for sign in (1, -1))
            assert grad[i, k].item() == pytest.approx((up - down) / 2e-5, abs=1e-8, rel=1e-7)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: logit_loss(s, t, kind=kind, temperature=2.0), (student, teacher))


def test_gradient_of_the_norm_is_the_closed_form_and_bounded():
    student, teacher = logits(scale=30.0)
    student.requires_grad_()
    (grad,) = torch.autograd.grad(binary_kl_norm(student, teacher, temperature=3.0), student)
    expected = 3.0 / 2 * torch.tanh((student - teacher) / 6.0) / 5
    torch.testing.assert_close(grad, expected, rtol=1e-13, atol=0)
    assert grad.abs().max() <= 1.5 / 5


def test_gradient_of_the_norm_can_be_differentiated_again():
    student, teacher = logits(rows=2, classes=3)
    student.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda s: binary_kl_norm(s, teacher, temperature=2.0), (student,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_low_precision_inputs_give_finite_float32(kind, dtype, size):
    student, teacher = (x.to(dtype).requires_grad_() for x in logits(scale=size))
    value = logit_loss(student, teacher, kind=kind, temperature=2.0)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()
    exact = logit_loss(student.double(), teacher.double(), kind=kind, temperature=2.0)
    assert value.item() == pytest.approx(exact.item(), rel=2e-5, abs=2e-6)


def test_norm_is_finite_for_the_largest_finite_logits():
    """Their difference is no float32 any more: halves are subtracted."""
    largest = torch.finfo(torch.bfloat16).max
    student = torch.tensor([[largest, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    value = binary_kl_norm(student, torch.tensor([[-largest, 0.0]], dtype=torch.bfloat16), temperature=1.0)
    value.backward()
    assert torch.isfinite(value)
    assert student.grad.tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_norm_is_finite_also_where_its_sum_is_no_number(dtype, temperature):
    largest = torch.finfo(dtype).max
    student = torch.full((3, 8), largest, dtype=dtype, requires_grad=True)
    value = binary_kl_norm(student, -student.detach(), temperature=temperature)
    value.backward()
    assert torch.isfinite(value)
    torch.testing.assert_close(student.grad, torch.full_like(student, temperature / 2 / 3))


def test_norm_keeps_its_digits_for_nearly_equal_logits():
    """|x| + softplus(−2|x|) − log 2 alone is noise of 6e-8 here; 100 classes of 1e-4 come to 1.25e-7 in all."""
    student = torch.full((1, 100), 1e-4)
    value = binary_kl_norm(student, torch.zeros(1, 100), temperature=1.0)
    assert value.item() == pytest.approx(100 * 1e-8 / 8, rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=6),
    st.floats(-20, 20),
    st.sampled_from(KINDS),
    st.floats(0.5, 8),
)
def test_invariants(row, shift, kind, tau):
    student = torch.tensor([row], dtype=torch.float64)
    if kind != "cosine" or student.norm() > 1e-3:
        assert logit_loss(student, student, kind=kind, temperature=tau).abs() < 1e-10
    teacher = student.flip(1)
    value = logit_loss(student, teacher, kind=kind, temperature=tau)
    assert value >= -1e-12
    if kind == "kl":  # softmax does not see a constant; the others do
        assert value.item() == pytest.approx(
            logit_loss(student + shift, teacher, kind=kind, temperature=tau).item(), abs=1e-8
        )
    if kind in ("binary_kl_norm", "mse", "l1"):  # a shift of both changes nothing: only the difference counts
        moved = logit_loss(student + shift, teacher + shift, kind=kind, temperature=tau)
        assert value.item() == pytest.approx(moved.item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, t, **kw: kd_kl_divergence(s, t, temperature=2.0, **kw),
        lambda s, t, **kw: binary_kl(s, t, temperature=2.0, **kw),
        lambda s, t, **kw: binary_kl_norm(s, t, temperature=2.0, **kw),
        mse_logit_loss,
        l1_logit_loss,
        cosine_logit_loss,
    ],
)
def test_reductions_agree(function):
    student, teacher = (x.view(2, 3, 6) for x in logits(rows=6, classes=6))
    rows = function(student, teacher, reduction="none")
    assert rows.shape == (2, 3)
    torch.testing.assert_close(function(student, teacher), rows.mean())
    torch.testing.assert_close(function(student, teacher, reduction="sum"), rows.sum())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"one shape, but got \(1, 3\) and \(1, 4\)"):
        binary_kl(torch.zeros(1, 3), torch.zeros(1, 4), temperature=1.0)
    with pytest.raises(ValueError, match=r"`temperature` to be positive, but got 0"):
        binary_kl_norm(torch.zeros(1, 3), torch.zeros(1, 3), temperature=0.0)
    with pytest.raises(ValueError, match=r"'cosine', 'dkd', 'kl', 'l1', 'mlkd', 'mse'\], but got 'kld'"):
        logit_loss(torch.zeros(1, 3), torch.zeros(1, 3), kind="kld", temperature=1.0)


# --- chunks ---


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 100])
def test_chunked_sum_equals_the_whole_in_value_and_gradient(chunk_size):
    student, teacher = logits(rows=11)
    head = nn.Linear(7, 7).double()

    def loss(s, t):
        return binary_kl_norm(head(s), t, temperature=2.0, reduction="sum")

    student.requires_grad_()
    whole, chunked = loss(student, teacher), chunked_sum(loss, student, teacher, chunk_size=chunk_size)
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=0)
    inputs = (student, *head.parameters())
    for a, b in zip(torch.autograd.grad(chunked, inputs), torch.autograd.grad(whole, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_chunked_sum_of_no_rows_is_a_zero_with_a_graph():
    head = nn.Linear(3, 4)
    value = chunked_sum(lambda x: head(x).sum(), torch.zeros(0, 3, requires_grad=True), chunk_size=2)
    value.backward()
    assert value.item() == 0
    assert head.weight.grad.abs().sum() == 0


def test_chunked_sum_keeps_no_more_than_a_chunk():
    """The tensors that autograd saves between forward and backward hold no (N, C) logits."""
    head, x, saved = nn.Linear(4, 100), torch.randn(64, 4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        value = chunked_sum(lambda rows: head(rows).exp().sum(), x, chunk_size=8)
    assert max(saved, default=0) <= 8 * 4
    value.backward()


# --- projection ---


def test_projection_is_the_formula():
    g, r = logits(rows=3, classes=4)
    dot = sum(a * b for a, b in zip(g.flatten().tolist(), r.flatten().tolist(), strict=True))
    if dot > 0:
        g, dot = -g, -dot
    expected = g - dot / sum(b * b for b in r.flatten().tolist()) * r
    torch.testing.assert_close(project_conflicting_gradient(g, r), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(project_conflicting_gradient(-g, r), -g)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_aligned_gradients_never_oppose_and_only_the_direction_counts(seed, scale):
    g, r = logits(rows=2, classes=3, seed=seed)
    aligned = project_conflicting_gradient(g, r)
    assert (aligned * r).sum() >= -1e-12
    torch.testing.assert_close(project_conflicting_gradient(g, scale * r), aligned, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(project_conflicting_gradient(aligned, r), aligned, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_only_the_direction_of_the_reference_counts_at_any_scale(size):
    aligned = project_conflicting_gradient(torch.tensor([-1.0, 1.0]), torch.tensor([size, 0.0]))
    torch.testing.assert_close(aligned, torch.tensor([0.0, 1.0]))
    aligned = project_conflicting_gradient(torch.tensor([-size, size]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(aligned / size, torch.tensor([0.0, 1.0]))


def test_lists_are_one_vector():
    """Two parts that each agree or oppose on their own are judged together."""
    g, r = logits(rows=1, classes=9)
    parts = [2, 4, 3]
    result = align_gradients(g[0].split(parts), r[0].split(parts))
    torch.testing.assert_close(torch.cat(result.grads), project_conflicting_gradient(g[0], r[0]))
    torch.testing.assert_close(result.cosine, torch.cosine_similarity(g, r)[0])
    assert result.conflict == float((g * r).sum() < 0)


def test_zero_gradients_are_no_conflict():
    result = align_gradients([torch.zeros(3)], [torch.zeros(3)])
    assert result.grads[0].tolist() == [0, 0, 0]
    assert result.cosine == result.conflict == 0


def test_an_overflow_stays_visible_to_the_grad_scaler():
    for g, r in ((math.inf, 1.0), (1.0, math.inf), (-1.0, math.nan)):
        gradient, reference = torch.tensor([g, 1.0]), torch.tensor([r, 1.0])
        assert not torch.isfinite(project_conflicting_gradient(gradient, reference) + reference).all()


def test_different_shapes_are_named():
    with pytest.raises(ValueError, match=r"same shapes, but got \[\(2,\)\] and \[\(3,\)\]"):
        align_gradients([torch.zeros(2)], [torch.zeros(3)])


def test_average_in_a_single_process_changes_nothing():
    grads = [torch.ones(2), torch.zeros(3)]
    assert all(a is b for a, b in zip(average_over_ranks(grads), grads, strict=True))
