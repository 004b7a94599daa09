"""Losses on the probabilities of classes against loops written from the formulas, in float64, and torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F

from lit_logits.functional import (
    batch_level_loss,
    binary_kl,
    binary_kl_norm,
    class_level_loss,
    dkd_loss,
    kd_kl_divergence,
    label_loss,
    logit_loss,
    mlkd_loss,
    standardize_logits,
)


def logits(rows=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, classes, generator=generator, dtype=torch.float64) * 3


def softmax(row, tau):
    powers = [math.exp((x - max(row)) / tau) for x in row]
    return [power / sum(powers) for power in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def dkd(student, teacher, label, alpha, beta, tau):
    p, q = softmax(teacher, tau), softmax(student, tau)
    tckd = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
    rest_p, rest_q = ([x / (1 - r[label]) for i, x in enumerate(r) if i != label] for r in (p, q))
    return tau**2 * (alpha * tckd + beta * kl(rest_p, rest_q))


def gram_distance(left, right, over):
    """‖left leftᵀ − right rightᵀ‖² / over, entry by entry, of lists of rows."""
    total = 0.0
    for i in range(len(left)):
        for j in range(len(left)):
            ours = sum(a * b for a, b in zip(left[i], left[j], strict=True))
            theirs = sum(a * b for a, b in zip(right[i], right[j], strict=True))
            total += (ours - theirs) ** 2
    return total / over


# --- standardised logits ---


def test_z_scores_are_the_formula():
    (row, _) = logits(1)[:, 0].tolist()
    mean = sum(row) / len(row)
    std = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))
    expected = [(x - mean) / std for x in row]
    assert standardize_logits(torch.tensor([row]).double())[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_z_scores_are_blind_to_shift_and_size():
    """What makes a small student free: it need not reach the size of the teacher's logits."""
    student, teacher = logits()
    loss = logit_loss(student, teacher, kind="kl", temperature=2.0, standardize=True)
    moved = logit_loss(7 * student - 3, 0.5 * teacher + 2, kind="kl", temperature=2.0, standardize=True)
    torch.testing.assert_close(moved, loss, rtol=1e-6, atol=0)
    assert not torch.isclose(loss, kd_kl_divergence(student, teacher, temperature=2.0))


def test_equal_logits_have_no_z_scores_but_a_finite_gradient():
    row = torch.zeros(1, 4, requires_grad=True)
    scores = standardize_logits(row)
    scores.sum().backward()
    assert scores.tolist() == [[0.0] * 4]
    assert row.grad.isfinite().all()


# --- decoupled distillation ---


@pytest.mark.parametrize(("alpha", "beta", "tau"), [(1.0, 8.0, 4.0), (1.0, 0.0, 1.0), (0.0, 1.0, 2.0)])
def test_decoupled_distillation_is_the_formula(alpha, beta, tau):
    student, teacher = logits()
    labels = torch.tensor([3, 0, 1, 2, 0])
    rows = [
        dkd(s, t, y, alpha, beta, tau)
        for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True)
    ]
    arguments = {"alpha": alpha, "beta": beta, "temperature": tau}
    assert dkd_loss(student, teacher, labels, **arguments).item() == pytest.approx(sum(rows) / 5, rel=1e-12)
    assert dkd_loss(student, teacher, labels, **arguments, reduction="none").tolist() == pytest.approx(rows, rel=1e-12)


def test_decoupled_terms_make_the_whole_divergence():
    """KL = TCKD + (1 − p_y of the teacher) NCKD, the paper's first result."""
    student, teacher = logits()
    labels = torch.tensor([3, 0, 1, 2, 0])
    tckd = dkd_loss(student, teacher, labels, alpha=1.0, beta=0.0, temperature=1.0, reduction="none")
    nckd = dkd_loss(student, teacher, labels, alpha=0.0, beta=1.0, temperature=1.0, reduction="none")
    p = teacher.softmax(-1).gather(1, labels[:, None]).squeeze(1)
    whole = kd_kl_divergence(student, teacher, temperature=1.0, reduction="none")
    torch.testing.assert_close(tckd + (1 - p) * nckd, whole)


def test_decoupled_gradients_are_those_of_differences():
    student, teacher = logits()
    labels = torch.tensor([3, 0, -100, 2, 0])
    torch.autograd.gradcheck(lambda s: dkd_loss(s, teacher, labels, temperature=3.0), student.requires_grad_())


def test_rows_without_a_target_are_left_out_of_decoupled_distillation():
    student, teacher = logits()
    labels = torch.tensor([3, -100, 1, -100, 0])
    known = labels >= 0
    expected = dkd_loss(student[known], teacher[known], labels[known])
    torch.testing.assert_close(dkd_loss(student, teacher, labels), expected)
    assert dkd_loss(student, teacher, torch.full((5,), -100)) == 0


def test_decoupled_distillation_is_finite_where_both_are_sure():
    student = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    loss = dkd_loss(student, torch.tensor([[300.0, -100.0, 0.0]]), torch.tensor([0]), temperature=1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_decoupled_distillation_says_what_it_needs():
    student, teacher = logits()
    with pytest.raises(ValueError, match=r"Expected integer `labels` of shape \(5,\)"):
        dkd_loss(student, teacher, torch.zeros(5, 4))
    with pytest.raises(ValueError, match="at least 2 classes"):
        dkd_loss(student[:, :1], teacher[:, :1], torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="Expected `labels` for kind='dkd'"):
        logit_loss(student, teacher, kind="dkd", temperature=1.0)


# --- several levels ---


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_batch_and_class_level_are_the_formulas(tau):
    student, teacher = logits()
    p, q = ([softmax(row, tau) for row in part.tolist()] for part in (student, teacher))
    batch = batch_level_loss(student, teacher, temperature=tau).item()
    classes = class_level_loss(student, teacher, temperature=tau).item()
    assert batch == pytest.approx(gram_distance(p, q, 5), rel=1e-12)
    assert classes == pytest.approx(gram_distance(list(zip(*p, strict=True)), list(zip(*q, strict=True)), 4), rel=1e-12)


def test_several_levels_are_summed_over_temperatures():
    student, teacher = logits()
    expected = sum(
        level(student, teacher, temperature=tau)
        for tau in (2.0, 3.0, 4.0, 5.0, 6.0)
        for level in (kd_kl_divergence, batch_level_loss, class_level_loss)
    )
    torch.testing.assert_close(mlkd_loss(student, teacher), expected)
    torch.testing.assert_close(logit_loss(student, teacher, kind="mlkd", temperature=4.0), expected)
    with pytest.raises(ValueError, match="Expected `reduction` to be 'mean' for kind='mlkd'"):
        logit_loss(student, teacher, kind="mlkd", temperature=4.0, reduction="sum")
    with pytest.raises(ValueError, match="Expected `temperatures` to hold at least one"):
        mlkd_loss(student, teacher, temperatures=())
    with pytest.raises(ValueError, match=r"Expected logits of shape \(B, C\)"):
        mlkd_loss(student[None], teacher[None])


# --- labels ---


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.1, 2.0, 0.5, 1.0]).double()])
def test_loss_of_labels_is_that_of_torch(weights, smoothing):
    z, other = logits()
    hard, soft = torch.tensor([3, -100, 1, 2, 0]), other.softmax(-1)
    for labels in (hard, soft):
        expected = F.cross_entropy(z, labels, weight=weights, label_smoothing=smoothing)
        own = label_loss(z, labels, label_smoothing=smoothing, class_weights=weights)
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("weights", [None, torch.ones(4)])
def test_no_labels_are_a_zero_with_a_graph(weights):
    z = logits()[0].requires_grad_()
    loss = label_loss(z, torch.full((5,), -100), class_weights=weights)
    loss.backward()
    assert loss == 0
    assert z.grad.abs().max() == 0


# --- over classes ---


@pytest.mark.parametrize("function", [binary_kl, binary_kl_norm])
def test_the_mean_over_classes_does_not_grow_with_their_number(function):
    student, teacher = logits()
    mean = function(student, teacher, temperature=2.0, class_reduction="mean")
    torch.testing.assert_close(mean, function(student, teacher, temperature=2.0) / 4)
    twice = function(student.repeat(1, 2), teacher.repeat(1, 2), temperature=2.0, class_reduction="mean")
    torch.testing.assert_close(twice, mean)
    with pytest.raises(ValueError, match="Expected `class_reduction` to be 'sum' or 'mean', but got 'max'"):
        function(student, teacher, temperature=2.0, class_reduction="max")
