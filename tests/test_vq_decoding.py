"""Decoding from vector-quantised logits, and what a codebook is worth: greedy tokens, samples, floor and footprint.

Letters: V vocabulary, K codes.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from vq_problems import SEEDS, D, K, V, dense_loss, problem

from lit_logits.functional import (
    code_log_mass,
    code_perplexity,
    code_usage,
    greedy_tables,
    ppl_floor,
    sampling_tables,
    scatter_code_logits,
    unigram_bias,
    vq_cross_entropy,
    vq_footprint,
    vq_greedy,
    vq_sample,
)
from lit_logits.modules import VQLogitsHead

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
