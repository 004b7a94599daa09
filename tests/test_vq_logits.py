"""The vector-quantised loss against the dense (N, V) logits: values, gradients, precision and memory.

Letters: N tokens, D hidden size, V vocabulary, K codes.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from vq_problems import EMPTY, SEEDS, D, K, V, dense_loss, gradients, problem

from lit_logits.functional import (
    code_log_mass,
    commitment_loss,
    scatter_code_logits,
    straight_through_vq_cross_entropy,
    vq_cross_entropy,
)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ignore_index", [-100, -1, 5])
def test_loss_equals_dense_in_value_and_gradient(reduction, bias, ignore_index):
    hidden, codebook, mapping, labels, token_bias = problem(bias=bias, ignore_index=ignore_index)
    options = {"reduction": reduction, "ignore_index": ignore_index}
    ours = vq_cross_entropy(hidden, codebook, mapping, labels, token_bias=token_bias, **options)
    dense = dense_loss(hidden, codebook[mapping], labels, token_bias, **options)
    close = {"rtol": 1e-11, "atol": 1e-12} if bias else {"rtol": 1e-6, "atol": 1e-7}  # log n_k is float32
    torch.testing.assert_close(ours, dense, **close)
    leaves = (hidden, codebook, token_bias)
    torch.testing.assert_close(gradients(ours, *leaves), gradients(dense, *leaves), **close)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_straight_through_equals_a_dense_layer_of_quantised_latents(reduction, bias):
    hidden, codebook, mapping, labels, token_bias = problem(1, bias=bias)
    latents = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    ours = straight_through_vq_cross_entropy(
        hidden, codebook, mapping, labels, latents=latents, token_bias=token_bias, reduction=reduction
    )
    quantised = codebook[mapping] + latents - latents.detach()  # materialised
    dense = dense_loss(hidden, quantised, labels, token_bias, reduction=reduction)
    close = {"rtol": 1e-11, "atol": 1e-12} if bias else {"rtol": 1e-6, "atol": 1e-7}  # log n_k is float32
    torch.testing.assert_close(ours, dense, **close)
    leaves = (latents, hidden, codebook, token_bias)
    torch.testing.assert_close(gradients(ours, *leaves), gradients(dense, *leaves), **close)


def test_batched_shapes_and_non_contiguous_labels():
    hidden, codebook, mapping, labels, token_bias = problem(2, n=36)
    latents = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    labels = labels.view(9, 4).T  # a view that cannot be flattened without a copy
    hidden = hidden.view(4, 9, D)
    ours = straight_through_vq_cross_entropy(
        hidden, codebook, mapping, labels, latents=latents, token_bias=token_bias, reduction="none"
    )
    dense = dense_loss(hidden, codebook[mapping] + latents - latents.detach(), labels, token_bias, reduction="none")
    assert ours.shape == (4, 9)
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(gradients(ours, latents), gradients(dense, latents))


@pytest.mark.parametrize("latent", [False, True])
def test_gradcheck(latent):
    hidden, codebook, mapping, labels, token_bias = problem(3, n=7)
    latents = torch.zeros(V, D, dtype=torch.float64, requires_grad=True)

    def loss(hidden, codebook, token_bias):
        extra = {"latents": latents} if latent else {}
        function = straight_through_vq_cross_entropy if latent else vq_cross_entropy
        return function(hidden, codebook, mapping, labels, token_bias=token_bias, **extra)

    assert torch.autograd.gradcheck(loss, (hidden, codebook, token_bias))


def test_gradcheck_of_commitment_loss_in_float64():
    _, codebook, mapping, _, _ = problem(4)
    latents = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    loop = sum(((latents[v] - codebook[mapping[v]]) ** 2).sum() for v in range(V)) / V
    torch.testing.assert_close(commitment_loss(latents, codebook, mapping), loop.detach(), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda a: commitment_loss(a, codebook, mapping), latents)
    assert torch.autograd.grad(commitment_loss(latents, codebook, mapping), codebook, allow_unused=True) == (None,)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_all_ignored_is_a_zero_with_zero_gradients(latent, bias):
    hidden, codebook, mapping, labels, token_bias = problem(5, bias=bias)
    latents = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    labels = torch.full_like(labels, -100)
    extra = {"latents": latents} if latent else {}
    function = straight_through_vq_cross_entropy if latent else vq_cross_entropy
    loss = function(hidden, codebook, mapping, labels, token_bias=token_bias, **extra)
    assert loss.item() == 0
    leaves = [leaf for leaf in (hidden, codebook, token_bias, latents if latent else None) if leaf is not None]
    for gradient in torch.autograd.grad(loss, leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.filterwarnings("ignore:Anomaly Detection.*", "ignore:Error detected in.*")
def test_empty_codes_make_no_nan_even_inside_the_backward_pass():
    """`detect_anomaly` (an option of the Trainer) stops at any NaN on the way, also one that nobody reads.

    log(0) of an empty code's mass has derivative 0/0; every gradient that came out was right, but a run with
    `Trainer(detect_anomaly=True)` stopped at the first step.
    """
    hidden, codebook, mapping, labels, token_bias = problem(6)
    loss = vq_cross_entropy(hidden, codebook, mapping, labels, token_bias=token_bias)
    for gradient in torch.autograd.grad(loss, (hidden, codebook, token_bias)):
        assert gradient.isfinite().all()
    with torch.autograd.detect_anomaly(check_nan=True):
        vq_cross_entropy(hidden, codebook, mapping, labels, token_bias=token_bias).backward()
    assert torch.equal(codebook.grad[list(EMPTY)], torch.zeros(len(EMPTY), D, dtype=torch.float64))


def test_huge_logits_stay_finite():
    hidden, codebook, mapping, labels, token_bias = problem(7, dtype=torch.float32, scale=1e4)
    latents = torch.zeros(V, D, requires_grad=True)
    loss = straight_through_vq_cross_entropy(hidden, codebook, mapping, labels, latents=latents, token_bias=token_bias)
    dense = dense_loss(hidden.double(), codebook.double()[mapping], labels, token_bias.double())
    torch.testing.assert_close(loss.double(), dense, rtol=1e-5, atol=0)
    for gradient in torch.autograd.grad(loss, (hidden, codebook, token_bias, latents)):
        assert gradient.isfinite().all()


def test_log_mass_survives_extreme_biases():
    bias = torch.tensor([1e4, 1e4, -1e4, 0.0])
    mass = code_log_mass(torch.tensor([0, 0, 1, 1]), 3, bias)
    torch.testing.assert_close(mass, torch.tensor([1e4 + math.log(2), 0.0, -torch.inf]))
    sizes = code_log_mass(torch.tensor([0, 0, 2]), 3)
    torch.testing.assert_close(sizes, torch.tensor([math.log(2), -torch.inf, 0.0]))


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
@pytest.mark.parametrize("seed", range(3))
def test_error_in_bfloat16_is_no_larger_than_the_naive_one(mode, seed):
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    hidden, codebook, mapping, labels, token_bias = problem(seed, dtype=dtype, n=501)
    leaves = (hidden, codebook, token_bias)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = dense_loss(exact_leaves[0], exact_leaves[1][mapping], labels, exact_leaves[2])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        ours = vq_cross_entropy(hidden, codebook, mapping, labels, token_bias=token_bias)
        naive = F.cross_entropy((F.linear(hidden, codebook[mapping]) + token_bias).float(), labels)
    assert ours.dtype == torch.float32
    assert abs(ours - exact) <= abs(naive - exact) + 1e-3
    names = ("hidden", "codebook", "bias")
    truth = torch.autograd.grad(exact, exact_leaves)
    for name, got, rival, true in zip(
        names, torch.autograd.grad(ours, leaves), torch.autograd.grad(naive, leaves), truth, strict=True
    ):
        scale = true.norm()
        error, bound = (got - true).norm() / scale, (rival - true).norm() / scale
        assert error <= bound + 2e-3, name


def test_bias_gradient_in_bfloat16_counts_beyond_256_targets():
    """A bfloat16 sum of equal terms stops at 256 of them: the bias of a frequent token lost most of its gradient."""
    n = 2048
    bias = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    hidden, codebook = torch.zeros(n, 2, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.bfloat16)
    loss = vq_cross_entropy(
        hidden, codebook, torch.tensor([0, 0, 1]), torch.zeros(n, dtype=torch.long), token_bias=bias, reduction="sum"
    )
    gradient = torch.autograd.grad(loss, bias)[0]  # n (p − 1[y]) = n (1/3 − 1, 1/3, 1/3)
    torch.testing.assert_close(gradient.float(), torch.tensor([-n * 2 / 3, n / 3, n / 3]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_straight_through_latents_in_bfloat16(seed):
    hidden, codebook, mapping, labels, token_bias = problem(seed, dtype=torch.float32, n=501)
    latents = torch.zeros(V, D, requires_grad=True)
    exact_latents = torch.zeros(V, D, dtype=torch.float64, requires_grad=True)
    quantised = codebook.double().detach()[mapping] + exact_latents - exact_latents.detach()
    truth = torch.autograd.grad(dense_loss(hidden.double(), quantised, labels, token_bias.double()), exact_latents)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = straight_through_vq_cross_entropy(
            hidden, codebook, mapping, labels, latents=latents, token_bias=token_bias
        )
    gradient = torch.autograd.grad(loss, latents)[0]
    assert gradient.dtype == torch.float32
    assert (gradient - truth).norm() / truth.norm() < 5e-3


@given(seed=SEEDS, bias=st.booleans())
@settings(max_examples=30, deadline=None)
def test_padded_equals_truncated(seed, bias):
    hidden, codebook, mapping, labels, token_bias = problem(seed, bias=bias)
    keep = labels != -100
    padded = vq_cross_entropy(hidden, codebook, mapping, labels, token_bias=token_bias)
    if keep.any():
        truncated = vq_cross_entropy(hidden[keep], codebook, mapping, labels[keep], token_bias=token_bias)
        torch.testing.assert_close(padded, truncated, rtol=1e-12, atol=1e-12)


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_names_of_codes_and_the_level_of_the_bias_do_not_matter(seed):
    hidden, codebook, mapping, labels, token_bias = problem(seed)
    loss = vq_cross_entropy(hidden, codebook, mapping, labels, token_bias=token_bias)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    renamed = vq_cross_entropy(hidden, codebook[order], order.argsort()[mapping], labels, token_bias=token_bias + 3.7)
    torch.testing.assert_close(loss, renamed, rtol=1e-10, atol=1e-10)


def test_a_code_for_each_token_is_the_dense_head():
    hidden, _, _, labels, token_bias = problem(8)
    weight = torch.randn(V, D, dtype=torch.float64)
    ours = vq_cross_entropy(hidden, weight, torch.arange(V), labels, token_bias=token_bias)
    torch.testing.assert_close(ours, dense_loss(hidden, weight, labels, token_bias))


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("latent", [False, True])
def test_no_tensor_of_tokens_by_vocabulary_is_made(latent):
    n, d, v, k = 301, 8, 1009, 11
    hidden, codebook, bias = (torch.randn(*s, requires_grad=True) for s in ((n, d), (k, d), (v,)))
    latents = torch.randn(v, d, requires_grad=True)
    mapping, labels = torch.arange(v) % k, torch.arange(n)
    with LargestTensor() as ours:
        extra = {"latents": latents} if latent else {}
        function = straight_through_vq_cross_entropy if latent else vq_cross_entropy
        function(hidden, codebook, mapping, labels, token_bias=bias, **extra).backward()
    with LargestTensor() as dense:
        F.cross_entropy(scatter_code_logits(hidden @ codebook.T, mapping, bias), labels).backward()
    assert dense.numel == n * v  # the meter works, also in the backward pass
    assert ours.numel <= max(n * k, v * d, n * d)


def test_labels_out_of_range_and_unknown_reductions_raise():
    hidden, codebook, mapping, labels, _ = problem(9)
    for wrong in (V, -1, -99):
        with pytest.raises(ValueError, match=rf"\[0, {V}\) or -100.*got {wrong}\."):
            vq_cross_entropy(hidden, codebook, mapping, labels.index_fill(0, torch.tensor([4]), wrong))
    with pytest.raises(TypeError, match="integer ids"):
        vq_cross_entropy(hidden, codebook, mapping, labels.double())
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none', but got 'avg'"):
        vq_cross_entropy(hidden, codebook, mapping, labels, reduction="avg")


def test_labels_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"shape \(2,\), one for each hidden state, but got \(1,\)"):
        vq_cross_entropy(torch.zeros(2, D), torch.zeros(K, D), torch.zeros(V).long(), torch.zeros(1).long())


def test_float64_without_bias_is_float64_throughout():
    g = torch.Generator().manual_seed(0)
    hidden, codebook = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (6, K))
    mapping, labels = torch.randint(K, (V,), generator=g), torch.randint(V, (6,), generator=g)
    dense = torch.nn.functional.cross_entropy((hidden @ codebook.T)[:, mapping], labels)
    torch.testing.assert_close(vq_cross_entropy(hidden, codebook, mapping, labels), dense, rtol=1e-14, atol=1e-14)
