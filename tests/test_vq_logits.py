"""Vector-quantised logits against the dense (N, V) logits: loss, gradients, decoding, and the state of the head.

Letters: N tokens, d hidden size, V vocabulary, K codes.
"""

import copy
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode

from lit_logits.functional import (
    code_log_mass,
    code_perplexity,
    code_usage,
    commitment_loss,
    greedy_tables,
    ppl_floor,
    sampling_tables,
    scatter_code_logits,
    straight_through_vq_cross_entropy,
    unigram_bias,
    vq_cross_entropy,
    vq_footprint,
    vq_greedy,
    vq_sample,
)
from lit_logits.modules import DenseLogitsHead, VQLogitsHead

N, D, V, K = 37, 5, 23, 7
EMPTY = (3, 6)  # codes without tokens
SEEDS = st.integers(0, 2**31 - 1)


def problem(seed=0, *, bias=True, dtype=torch.float64, ignore_index=-100, n=N, scale=1.0):
    """Hidden states, codebook, mapping with empty codes, labels of which a fifth is ignored, and a bias."""
    g = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(n, D, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    codebook = torch.randn(K, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    living = torch.tensor([k for k in range(K) if k not in EMPTY])
    mapping = living[torch.randint(len(living), (V,), generator=g)]
    labels = torch.randint(V, (n,), generator=g)
    labels[torch.rand(n, generator=g) < 0.2] = ignore_index
    token_bias = torch.randn(V, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, codebook, mapping, labels, token_bias


def dense_loss(hidden, weight, labels, bias, *, reduction="mean", ignore_index=-100):
    """The oracle: all (N, V) logits of rows `weight` (V, d), and torch's own cross-entropy."""
    logits = hidden @ weight.T
    logits = logits if bias is None else logits + bias
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction, ignore_index=ignore_index)
    return loss.view_as(labels) if reduction == "none" else loss


def gradients(loss, *leaves):
    """Of a loss of any shape, weighted so that each token's gradient counts differently."""
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return torch.autograd.grad((loss * weights).sum(), [leaf for leaf in leaves if leaf is not None])


# ---------------------------------------------------------------------- the loss


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


# ---------------------------------------------------------------------- decoding


@given(seed=SEEDS, bias=st.booleans(), ties=st.booleans())
@settings(max_examples=50, deadline=None)
def test_greedy_is_the_argmax_of_the_token_logits(seed, bias, ties):
    """Equal biases inside a code go to the lowest id, as `argmax` has it."""
    hidden, codebook, mapping, _, token_bias = problem(seed, bias=bias)
    if bias and ties:
        token_bias = token_bias.detach().round()
    logits = scatter_code_logits(hidden @ codebook.T, mapping, token_bias)
    greedy = vq_greedy(hidden, codebook, greedy_tables(mapping, K, token_bias))
    assert torch.equal(greedy, logits.argmax(dim=-1))


def test_greedy_never_picks_an_empty_code():
    codebook = torch.tensor([[1.0], [100.0], [2.0]])
    tables = greedy_tables(torch.tensor([0, 2, 2]), 3)
    assert vq_greedy(torch.tensor([[1.0], [-1.0]]), codebook, tables).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("bias", [True, False])
def test_samples_follow_the_softmax(temperature, bias):
    hidden, codebook, mapping, _, token_bias = problem(10, bias=bias)
    n = 40_000
    logits = scatter_code_logits(hidden[0] @ codebook.T, mapping, token_bias) / temperature
    expected = (logits.softmax(-1).detach() * n).numpy()
    tables = sampling_tables(mapping, K, token_bias, temperature=temperature)
    generator = torch.Generator().manual_seed(0)
    draws = vq_sample(hidden[0].expand(2, n // 2, D), codebook, tables, temperature=temperature, generator=generator)
    assert draws.shape == (2, n // 2)
    observed = draws.flatten().bincount(minlength=V).numpy()
    rare = expected < 5
    if rare.any():
        expected = [*expected[~rare], expected[rare].sum()]
        observed = [*observed[~rare], observed[rare].sum()]
    assert chisquare(observed, expected).pvalue > 1e-3
    again = vq_sample(
        hidden[0].expand(2, n // 2, D),
        codebook,
        tables,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(draws, again)


def test_sampling_many_tokens_of_one_large_code():
    """Cumulative sums over a whole vocabulary: the last tokens are as likely as the first."""
    v, n = 50_000, 200_000
    tables = sampling_tables(torch.arange(v) % 3, 3)
    draws = vq_sample(torch.zeros(n, 1), torch.zeros(3, 1), tables, generator=torch.Generator().manual_seed(0))
    observed = torch.histc(draws.float(), bins=50, min=0, max=v)
    assert chisquare(observed.numpy()).pvalue > 1e-3
    assert chisquare((draws % 3).bincount().numpy(), [n * ((v - k + 2) // 3) / v for k in range(3)]).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="`temperature` to be positive"):
        sampling_tables(torch.zeros(3, dtype=torch.long), 1, temperature=temperature)


# ---------------------------------------------------------------------- what a codebook is worth


@given(seed=SEEDS, bias=st.booleans())
@settings(max_examples=30, deadline=None)
def test_floor_is_a_lower_bound_for_any_hidden_states(seed, bias):
    hidden, codebook, mapping, labels, token_bias = problem(seed, bias=bias, scale=3.0)
    counts = labels[labels >= 0].bincount(minlength=V).double()
    if not counts.any():
        return
    floor = ppl_floor(counts, mapping, K, None if token_bias is None else token_bias.detach())
    perplexity = dense_loss(hidden, codebook[mapping], labels, token_bias).exp()
    assert perplexity >= floor * (1 - 1e-6)
    assert floor >= 1 - 1e-6


def test_floor_is_reached_by_a_backbone_that_knows_the_code():
    _, _, mapping, _, token_bias = problem(11)
    labels = torch.arange(V)
    known = 1e4 * F.one_hot(mapping, K).double()
    loss = vq_cross_entropy(known, torch.eye(K, dtype=torch.float64), mapping, labels, token_bias=token_bias)
    floor = ppl_floor(torch.ones(V, dtype=torch.float64), mapping, K, token_bias)
    torch.testing.assert_close(loss.exp(), floor)
    assert ppl_floor(torch.zeros(V), mapping, K).isnan()


def test_usage_floor_and_perplexity_against_loops():
    _, _, mapping, _, token_bias = problem(12)
    counts = torch.randint(0, 9, (V,)).float()
    codes, total = mapping.tolist(), counts.sum().item()
    usage = [sum(counts[v].item() for v in range(V) if codes[v] == k) / total for k in range(K)]
    torch.testing.assert_close(code_usage(counts, mapping, K), torch.tensor(usage))
    entropy = -sum(u * math.log(u) for u in usage if u > 0)
    torch.testing.assert_close(code_perplexity(torch.tensor(usage)), torch.tensor(math.exp(entropy)))
    b = token_bias.tolist()
    for biases in (b, [0.0] * V):
        mass = {k: math.log(sum(math.exp(biases[v]) for v in range(V) if codes[v] == k)) for k in set(codes)}
        nll = sum(counts[v].item() * (mass[codes[v]] - biases[v]) for v in range(V)) / total
        ours = ppl_floor(counts, mapping, K, token_bias.float() if biases is b else None)
        assert ours.item() == pytest.approx(math.exp(nll), rel=1e-5)
    assert code_usage(torch.zeros(V), mapping, K).tolist() == [0.0] * K


@pytest.mark.parametrize("codebook_size", [1, 2, 3, 16, 17])
@pytest.mark.parametrize("bias", [True, False])
def test_footprint_counts_what_an_export_holds(codebook_size, bias):
    size = vq_footprint(D, V, codebook_size, bias=bias, itemsize=2)
    bits = 0
    while 2**bits < codebook_size:
        bits += 1
    floats = codebook_size * D + V * bias
    assert size == (floats, 2 * floats + math.ceil(V * bits / 8), V * D, 2 * V * D)
    head = VQLogitsHead(D, V, codebook_size, bias=bias)
    assert head.footprint().parameters == sum(p.numel() for p in head.parameters())


def test_unigram_bias_is_the_unigram_model_with_logits_of_zero():
    counts = torch.tensor([5.0, 0.0, 2.0, 9.0])
    torch.testing.assert_close(unigram_bias(counts).exp(), (counts + 0.5) / (counts + 0.5).sum())
    mapping = torch.tensor([0, 0, 2, 0])
    split = unigram_bias(counts, mapping, 3)
    torch.testing.assert_close(code_log_mass(mapping, 3, split), code_log_mass(mapping, 3))
    torch.testing.assert_close((split[3] - split[0]).exp(), torch.tensor(9.5 / 5.5))


# ---------------------------------------------------------------------- the head

COMBINATIONS = list(product(["fixed", "learned", "reassigned"], ["gradient", "ema"]))


def make_head(mapping="fixed", codebook_update="gradient", seed=0, **kwargs):
    torch.manual_seed(seed)
    defaults = {"reassign_every_n_steps": 2, "decay": 0.9, "usage_decay": 0.9}
    head = VQLogitsHead(D, V, K, mapping=mapping, codebook_update=codebook_update, **{**defaults, **kwargs})
    table = torch.nn.Embedding(V + 2, D)
    head.bind_token_table(table)
    return head, table


def train_head(head, steps, optimizer=None, start=0):
    optimizer = optimizer or torch.optim.Adam([p for p in head.parameters() if p.requires_grad], lr=0.05)
    for step in range(start, start + steps):
        hidden, _, _, labels, _ = problem(100 + step, dtype=torch.float32)
        optimizer.zero_grad()
        (head.loss(hidden, labels) + 0.25 * head.commitment_loss()).backward()
        optimizer.step()
        head.after_step()
    return optimizer


@pytest.mark.parametrize(("mapping", "update"), COMBINATIONS)
def test_head_trains_and_agrees_with_its_own_token_logits(mapping, update):
    head, _ = make_head(mapping, update)
    before = copy.deepcopy(head.state_dict())
    train_head(head, 6)
    after = head.state_dict()
    assert not torch.equal(before["codebook"], after["codebook"])
    assert torch.equal(before["token_to_code"], after["token_to_code"]) == (mapping == "fixed")
    hidden, _, _, labels, _ = problem(13, dtype=torch.float32)
    dense = dense_loss(hidden, head.dense_weight(), labels, head.token_bias)
    for mode in (head.train(), head.eval()):
        torch.testing.assert_close(mode.loss(hidden, labels), dense)
    torch.testing.assert_close(head(hidden), F.linear(hidden, head.dense_weight(), head.token_bias))
    assert torch.equal(head.greedy(hidden), head(hidden).argmax(-1))


@pytest.mark.parametrize(("mapping", "update"), COMBINATIONS)
def test_head_resumes_from_its_state(mapping, update):
    whole, _ = make_head(mapping, update)
    optimizer = train_head(whole, 3)
    resumed, _ = make_head(mapping, update)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    other = torch.optim.Adam([p for p in resumed.parameters() if p.requires_grad], lr=0.05)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_head(whole, 3, optimizer, start=3)
    train_head(resumed, 3, other, start=3)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_running_counts_against_a_loop():
    head, _ = make_head()
    expected = [0.0] * V
    for seed in range(3):
        hidden, _, _, labels, _ = problem(seed, dtype=torch.float32, ignore_index=-7)
        head.loss(hidden, labels, ignore_index=-7)
        expected = [0.9 * count + (labels == v).sum().item() for v, count in enumerate(expected)]
    torch.testing.assert_close(head.token_counts, torch.tensor(expected))
    head.eval().loss(hidden, labels, ignore_index=-7)
    torch.testing.assert_close(head.token_counts, torch.tensor(expected))


def test_ema_codebook_against_a_loop():
    head, _ = make_head("fixed", "ema")
    codes = head.token_to_code.tolist()
    mass = [float(codes.count(k)) for k in range(K)]
    sums = [head.codebook[k].detach().clone() * mass[k] for k in range(K)]
    for _ in range(4):
        with torch.no_grad():
            head.latents.add_(torch.randn_like(head.latents))
        head.after_step()
        for k in range(K):
            mine = [head.latents[v].detach() for v in range(V) if codes[v] == k]
            mass[k] = 0.9 * mass[k] + 0.1 * len(mine)
            sums[k] = 0.9 * sums[k] + 0.1 * sum(mine)
            torch.testing.assert_close(head.codebook[k].detach(), sums[k] / mass[k])
    assert not head.codebook.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["cast", "default", "loaded", "assigned"])
def test_running_counts_and_sums_stay_float32(dtype, way):
    """In bfloat16 counts stopped at 256, which gave shares that were off by 38 %, and the EMA codebook failed."""
    whole, _ = make_head("fixed", "ema", decay=0.99, usage_decay=0.999)
    torch.set_default_dtype(dtype if way == "default" else torch.float32)
    try:
        head, _ = make_head("fixed", "ema", decay=0.99, usage_decay=0.999)
    finally:
        torch.set_default_dtype(torch.float32)
    head.load_state_dict(whole.state_dict())
    if way != "default":
        head.to(dtype)
    if way in ("loaded", "assigned"):
        state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in whole.state_dict().items()}
        head.load_state_dict(state, assign=way == "assigned")
    assert {name: b.dtype for name, b in head.named_buffers() if b.is_floating_point()} == dict.fromkeys(
        ("token_counts", "ema_sums", "ema_mass"), torch.float32
    )
    assert head.codebook.dtype == dtype
    for seed in range(30):
        hidden, _, _, labels, _ = problem(seed, dtype=torch.float32)
        for one in (whole, head):
            one.loss(hidden.to(one.codebook.dtype), labels)
            one.after_step()
    torch.testing.assert_close(head.token_counts, whole.token_counts)
    torch.testing.assert_close(head.usage(), whole.usage())
    torch.testing.assert_close(head.codebook.float(), whole.codebook, rtol=0.02, atol=1e-3)


def test_an_ema_codebook_in_float64():
    head, _ = make_head("fixed", "ema")
    head.double().after_step()
    assert head.ema_sums.dtype == head.codebook.dtype == torch.float64


def test_ema_forgets_a_revived_code():
    """Vector, sum and mass go together: an old running mean would pull the revived code back."""
    head, _ = make_head("fixed", "ema")
    head.set_codes(token_to_code=torch.arange(V) % (K - 1))  # the last code owns nothing
    train_head(head, 1)
    head.revive(head.dead_codes(), generator=torch.Generator().manual_seed(0))
    before = head.codebook.detach().clone()
    head.after_step()  # latents have not moved, so codes at the mean of their latents stay
    torch.testing.assert_close(head.codebook[K - 1].detach(), before[K - 1])


def test_learned_mapping_is_the_brute_force_nearest_code():
    head, _ = make_head("learned")
    with torch.no_grad():
        head.latents.normal_()
        head.codebook.normal_()
    head.after_step()
    before = head.token_to_code.clone()
    head.after_step()  # the second of two
    nearest = torch.cdist(head.latents.double(), head.codebook.double()).argmin(dim=1)
    assert torch.equal(head.token_to_code, nearest)
    assert not torch.equal(before, nearest)


def test_reassigned_mapping_is_one_step_of_k_means_on_the_table():
    head, table = make_head("reassigned")
    codes, rows = head.token_to_code.clone(), table.weight.detach()[:V]
    means = torch.stack([rows[codes == k].mean(0) for k in range(K)])
    head.after_step()
    assert torch.equal(head.token_to_code, codes)
    head.after_step()
    assert torch.equal(head.token_to_code, torch.cdist(rows, means).argmin(dim=1))
    assert not any("weight" in name for name in head.state_dict())  # the table stays its owner's
    lonely = VQLogitsHead(D, V, K, mapping="reassigned", reassign_every_n_steps=1)
    with pytest.raises(ValueError, match="bind_token_table"):
        lonely.after_step()


@pytest.mark.parametrize("change", ["step", "load", "set_codes", "mapping", "data", "deepcopy", "inference"])
def test_decoding_tables_are_never_stale(change):
    """A table kept from before an update would decode yesterday's model.

    `data`: some optimizers write through `parameter.data` or a raw pointer, which no version counter sees;
    `after_step` follows every optimizer step and must drop the tables.
    """
    head, _ = make_head("fixed" if change == "data" else "learned", reassign_every_n_steps=1)
    hidden = problem(14, dtype=torch.float32, n=200)[0].detach()
    with torch.inference_mode(change == "inference"):
        first, _ = head.greedy(hidden), head.sample(hidden)
    other, _ = make_head("learned", seed=1)
    train_head(other, 3)
    if change in ("step", "inference"):
        train_head(head, 4)
    elif change == "load":
        head.load_state_dict(other.state_dict())
    elif change == "set_codes":
        head.set_codes(token_bias=torch.randn(V))
    elif change == "mapping":
        with torch.no_grad():
            head.latents.normal_()
        head.after_step()
    elif change == "data":
        head.token_bias.data.normal_()
        head.after_step()
    else:
        head = copy.deepcopy(head)
        with torch.no_grad():
            head.token_bias.normal_()
    logits = head(hidden)
    assert not torch.equal(first, logits.argmax(-1))
    assert torch.equal(head.greedy(hidden), logits.argmax(-1))
    samples = head.sample(hidden[:1].expand(20_000, D), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples.bincount(minlength=V) / 20_000, logits[0].softmax(-1), atol=0.02, rtol=0)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("min_usage", [0.0, 0.3])
def test_revival_keeps_what_living_codes_say(latent, min_usage):
    head, _ = make_head("learned" if latent else "fixed")
    counts = torch.full((V,), 4.0)
    mapping = torch.arange(V) % (K - 1)
    counts[mapping == 2] = 0.01  # rarely used, but not empty
    head.set_codes(torch.randn(K, D), mapping, token_counts=counts)
    dead = head.dead_codes(min_usage)
    assert dead.tolist() == ([K - 1] if min_usage == 0 else [2, K - 1])
    hidden = problem(15, dtype=torch.float32)[0].detach()
    before, stays = head(hidden), ~torch.isin(mapping, dead)
    changed = head.revive(dead, generator=torch.Generator().manual_seed(0))
    assert head.dead_codes().numel() == 0
    assert set(dead.tolist()) <= set(changed.tolist())
    if not latent:  # halved by mass; by vectors a light half may be the one that lowers the distortion most
        assert head.dead_codes(min_usage).numel() == 0
        torch.testing.assert_close(head(hidden)[:, stays], before[:, stays])  # rows of a product may differ in a bit
        assert changed.tolist() == dead.tolist()
    else:  # vectors sit at the mean of their tokens' latents, which is what keeps the tokens
        for code in changed.tolist():
            own = head.latents[head.token_to_code == code].detach()
            torch.testing.assert_close(head.codebook[code].detach(), own.mean(0))


def test_a_checkpoint_of_another_size_is_refused_in_words():
    head, _ = make_head()
    for other, what in ((VQLogitsHead(D, V + 1, K), "vocab_size"), (VQLogitsHead(D, V, K + 1), "codebook_size")):
        model = torch.nn.ModuleDict({"head": head})
        state = {f"head.{name}": tensor for name, tensor in other.state_dict().items()}
        with pytest.raises(ValueError, match=rf"`{what}` {getattr(head, what)}, but this one has"):
            model.load_state_dict(state)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"codebook_size": 0}, "`codebook_size` to be in"),
        ({"codebook_size": V + 1}, "`codebook_size` to be in"),
        ({"mapping": "free"}, "`mapping` to be 'fixed', 'learned' or 'reassigned', but got 'free'"),
        ({"codebook_update": "sgd"}, "`codebook_update` to be"),
        ({"decay": 1.0}, "`decay` to be in"),
        ({"usage_decay": -0.1}, "`usage_decay` to be in"),
        ({"reassign_every_n_steps": 0}, "`reassign_every_n_steps` to be at least 1"),
    ],
)
def test_constructor_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VQLogitsHead(D, V, **{"codebook_size": K, **kwargs})


def test_set_codes_writes_all_or_nothing():
    head, _ = make_head()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    mapping = torch.zeros(V, dtype=torch.long)
    for wrong in ({"token_bias": torch.zeros(3)}, {"codebook": torch.full((K, D), math.nan)}):
        with pytest.raises(ValueError, match=r"Expected `(token_bias|codebook)` to"):
            head.set_codes(**{"codebook": torch.ones(K, D), **wrong}, token_to_code=mapping)
        assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())
    with pytest.raises(ValueError, match="integer codes"):
        head.set_codes(token_to_code=torch.ones(V, dtype=torch.bool))


def test_a_mapping_out_of_range_is_named_everywhere():
    hidden, codebook, labels = torch.zeros(2, D), torch.zeros(K, D), torch.zeros(2, dtype=torch.long)
    mapping = torch.zeros(V, dtype=torch.long)
    mapping[3] = K
    message = rf"codes in \[0, {K}\), but token 3 maps to {K}"
    for function in (
        lambda: vq_cross_entropy(hidden, codebook, mapping, labels),
        lambda: scatter_code_logits(hidden @ codebook.T, mapping),
        lambda: ppl_floor(torch.ones(V), mapping, K),
    ):
        with pytest.raises(ValueError, match=message):
            function()
    head, _ = make_head()
    with pytest.raises(ValueError, match=message):
        head.load_state_dict({**head.state_dict(), "token_to_code": mapping})


def test_labels_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"shape \(2,\), one for each hidden state, but got \(1,\)"):
        vq_cross_entropy(torch.zeros(2, D), torch.zeros(K, D), torch.zeros(V).long(), torch.zeros(1).long())


def test_float64_without_bias_is_float64_throughout():
    g = torch.Generator().manual_seed(0)
    hidden, codebook = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (6, K))
    mapping, labels = torch.randint(K, (V,), generator=g), torch.randint(V, (6,), generator=g)
    dense = torch.nn.functional.cross_entropy((hidden @ codebook.T)[:, mapping], labels)
    torch.testing.assert_close(vq_cross_entropy(hidden, codebook, mapping, labels), dense, rtol=1e-14, atol=1e-14)


def test_set_codes_checks_what_it_gets():
    head, _ = make_head()
    with pytest.raises(ValueError, match="`codebook` to have shape"):
        head.set_codes(torch.zeros(K, D + 1))
    with pytest.raises(ValueError, match="codes in"):
        head.set_codes(token_to_code=torch.full((V,), K))
    with pytest.raises(ValueError, match="at least 23 rows"):
        head.bind_token_table(torch.nn.Embedding(V - 1, D))


def test_head_on_the_meta_device():
    """Large models are built there first; asking for the autocast of `meta` raised."""
    with torch.device("meta"):
        head = VQLogitsHead(D, V, K)
        assert head(torch.zeros(2, D)).shape == (2, V)


# ---------------------------------------------------------------------- the dense baseline


def test_dense_head_has_the_same_methods_with_the_same_meaning():
    torch.manual_seed(0)
    dense, vq = DenseLogitsHead(D, V), VQLogitsHead(D, V, V)
    with torch.no_grad():
        vq.codebook.normal_()
        vq.token_bias.normal_()
        dense.copy_output_layer(vq.dense_weight(), vq.token_bias)
    hidden, _, _, labels, _ = problem(16, dtype=torch.float32, n=36)
    hidden, labels = hidden.view(4, 9, D), labels.view(4, 9)
    for reduction in ("mean", "sum", "none"):
        torch.testing.assert_close(
            dense.loss(hidden, labels, reduction=reduction), vq.loss(hidden, labels, reduction=reduction)
        )
    assert torch.equal(dense.greedy(hidden), vq.greedy(hidden))
    assert dense.sample(hidden).shape == vq.sample(hidden).shape == (4, 9)
    assert dense.loss(hidden, torch.full_like(labels, -100)).item() == 0
    assert dense.footprint() == (V * D + V, 4 * (V * D + V), V * D, 4 * V * D)


@pytest.mark.parametrize("head", [DenseLogitsHead(D, V), VQLogitsHead(D, V, K)], ids=["dense", "vq"])
def test_both_heads_take_one_hidden_state_and_refuse_a_negative_temperature(head):
    assert head.sample(torch.randn(D)).shape == ()
    assert head.loss(torch.randn(D), torch.tensor(3)).isfinite()
    with pytest.raises(ValueError, match="temperature"):
        head.sample(torch.randn(2, D), temperature=-1.0)


def test_a_dense_checkpoint_of_another_vocabulary_is_refused_in_words():
    with pytest.raises(ValueError, match=f"with `vocab_size` {V}, but this one has {V + 1}. Use the tokenizer"):
        DenseLogitsHead(D, V).load_state_dict(DenseLogitsHead(D, V + 1).state_dict())
