"""Cases of the Triton kernel in Triton's interpreter, against the dense layer that the codes stand for.

Not collected by itself: `test_vq_triton.py` runs it in a process of its own, where the interpreter is on before Triton
is imported.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_logits.functional.lookup import device
from lit_logits.functional.residual_vq import residual_vq_greedy, residual_vq_logits
from lit_logits.modules import ResidualVQLogitsHead

# Relative. The interpreter rounds to bfloat16 towards zero, to 2^-7; a GPU rounds to the nearest.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr(device, "_TAKES_CPU", True)


def make_head(vocab, codes, groups, stages, *, width=2, bias=False, cap=None, seed=0):
    torch.manual_seed(seed)
    if stages == "tiers":
        stages = torch.randint(1, 4, (vocab,)) * torch.randint(0, 2, (vocab,))
        stages = stages.clamp(min=1)
    elif stages == "tier of few":
        stages = torch.ones(vocab, dtype=torch.int64)
        stages[vocab // 2 : vocab // 2 + 2] = 2
    head = ResidualVQLogitsHead(groups * width, vocab, codes, num_groups=groups, token_stages=stages, bias=bias)
    torch.nn.init.normal_(head.codebook, std=0.5)
    if bias:
        torch.nn.init.normal_(head.token_bias)
    head.logit_cap = cap
    return head.requires_grad_(False).eval()


def dense_rows(head):
    """The (V, d) layer from the definition, token by token, in float64."""
    rows = torch.zeros(head.vocab_size, head.hidden_size, dtype=torch.float64)
    for stage, (members, codes) in enumerate(head.stages()):
        tokens = range(head.vocab_size) if members is None else members.tolist()
        for token, token_codes in zip(tokens, codes.tolist(), strict=True):
            rows[token] += torch.cat([head.codebook[stage, g, code] for g, code in enumerate(token_codes)]).double()
    return rows


def dense_logits(hidden, head):
    logits = hidden.double() @ dense_rows(head).T
    logits = logits if head.logit_cap is None else head.logit_cap * (logits / head.logit_cap).tanh()
    return logits if head.token_bias is None else logits + head.token_bias.double()


def check(head, hidden):
    """Compare logits and greedy tokens with the dense layer, and the latter with float32 logits to the last bit."""
    expected = dense_logits(hidden, head)
    assert head._takes_kernel(hidden)
    logits, limit = head(hidden), LIMITS[hidden.dtype]
    assert logits.dtype == hidden.dtype
    torch.testing.assert_close(logits.double(), expected, rtol=limit, atol=limit)
    tokens = head.greedy(hidden)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, head(hidden.float()).argmax(-1))
    best = expected.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(best, expected.amax(-1), rtol=1e-5, atol=1e-5)


HEADS: dict[str, dict[str, Any]] = {
    "paper": {"codes": 256, "groups": 1, "stages": 1},
    "one token a code": {"codes": 37, "groups": 1, "stages": 1},
    "two stages, 17 groups": {"codes": 256, "groups": 17, "stages": 2, "bias": True},
    "33 groups": {"codes": 16, "groups": 33, "stages": 1},
    "tiers": {"codes": 64, "groups": 3, "stages": "tiers", "bias": True},
    "tier of few": {"codes": 5, "groups": 4, "stages": "tier of few"},
    "cap": {"codes": 9, "groups": 4, "stages": 2, "cap": 1.5},
    "cap, bias, tiers": {"codes": 9, "groups": 4, "stages": "tiers", "bias": True, "cap": 1.5},
    "one code": {"codes": 1, "groups": 2, "stages": 2, "bias": True},
    "two codes": {"codes": 2, "groups": 3, "stages": 1},
    "300 codes": {"codes": 300, "groups": 2, "stages": 2, "vocab": 301},
    "4,096 codes": {"codes": 4096, "groups": 1, "stages": 1, "vocab": 4100},
    "width 1": {"codes": 7, "groups": 5, "stages": 1, "width": 1},
}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_heads(name, dtype):
    head = make_head(**{"vocab": 259, **HEADS[name]})
    check(head, torch.randn(3, head.hidden_size).to(dtype))


@pytest.mark.parametrize("leading", [(), (1,), (2, 1), (5,), (16,), (17,), (64,), (0,), (2, 0)], ids=str)
def test_batches(leading):
    head = make_head(131, 12, 3, "tiers", bias=True)
    hidden = torch.randn(*leading, head.hidden_size)
    if hidden.numel():
        check(head, hidden)
    assert head(hidden).shape == (*leading, 131)
    assert head.greedy(hidden).shape == leading


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_head(data):
    vocab = data.draw(st.integers(1, 300), "vocab")
    head = make_head(
        vocab,
        data.draw(st.integers(1, min(vocab, 280)), "codes"),
        data.draw(st.integers(1, 35), "groups"),
        data.draw(st.sampled_from([1, 2, "tiers"]), "stages"),
        width=data.draw(st.integers(1, 3), "width"),
        bias=data.draw(st.booleans(), "bias"),
        cap=data.draw(st.sampled_from([None, 3.0]), "cap"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    device._TAKES_CPU = True  # hypothesis and function-scoped fixtures do not go together
    check(head, torch.randn(data.draw(st.integers(1, 20), "rows"), head.hidden_size))


def test_equal_logits_go_to_the_lowest_token():
    head = make_head(1000, 4, 2, 1)
    assert head.greedy(torch.zeros(2, 4)).tolist() == [0, 0]
    codes = torch.zeros(1000, 2, dtype=torch.int64)
    codes[[300, 301, 999]] = 1
    head.set_codes(
        torch.tensor([0.0, 1.0, 0.0, 0.0]).view(1, 1, 4, 1).expand(1, 2, 4, 2), codes.flatten(), torch.ones(1000).long()
    )
    assert head.greedy(torch.ones(3, 4)).tolist() == [300, 300, 300]


def test_a_token_that_the_bias_forbids_does_not_win():
    head = make_head(300, 4, 2, 1, bias=True)
    head.token_bias.fill_(-torch.inf)
    assert head.greedy(torch.randn(1, 4)).tolist() == [0]
    head.token_bias[277] = -1e30
    assert head.greedy(torch.randn(2, 4)).tolist() == [277, 277]


def test_not_a_number_is_a_token_as_in_torch():
    head = make_head(300, 4, 2, 1)
    hidden = torch.randn(2, 4)
    hidden[0, 1] = torch.nan
    assert head.greedy(hidden).tolist() == head(hidden).argmax(-1).tolist()


def test_layout_follows_what_is_written():
    head, hidden = make_head(200, 8, 2, 2, bias=True), torch.randn(2, 4)
    check(head, hidden)
    head.token_bias.add_(torch.randn(200))
    check(head, hidden)
    head.codebook.mul_(-2)
    check(head, hidden)
    head.set_codes(head.codebook.clone(), torch.randint(8, (600,)), torch.tensor([1, 2]).repeat(100))
    check(head, hidden)


def test_codebooks_of_another_dtype():
    head, hidden = make_head(200, 8, 2, 2), torch.randn(2, 4)
    check(head.bfloat16(), hidden)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(hidden), make_head(200, 8, 2, 2).bfloat16()(hidden))


def test_gradients_are_those_of_decoded_rows():
    head, hidden = make_head(200, 8, 2, 2, bias=True).requires_grad_(), torch.randn(2, 4)
    gradients = []
    for run in (head, lambda x: residual_vq_logits(x, head.codebook, head.stages(), 200, head.token_bias)):
        leaf = hidden.clone().requires_grad_()
        logits = run(leaf)
        gradients.append(torch.autograd.grad(logits.square().sum(), [leaf, head.codebook, head.token_bias]))
    torch.testing.assert_close(*gradients)


def test_reference_of_gpus_agrees():
    """What a GPU runs without Triton."""
    head, hidden = make_head(200, 8, 2, "tiers", bias=True, cap=2.0), torch.randn(3, 4)
    inputs = hidden, head.codebook, head.stages(), 200, head.token_bias
    torch.testing.assert_close(head(hidden), residual_vq_logits(*inputs, cap=2.0))
    assert torch.equal(head.greedy(hidden), residual_vq_greedy(*inputs, cap=2.0))


def test_another_width_is_refused():
    head = make_head(50, 8, 2, 1)
    for run in (head, head.greedy):
        with pytest.raises(ValueError, match=r"\(\.\.\., 4\), but got \(3, 8\)"):
            run(torch.randn(3, 8))


def test_what_the_kernel_does_not_take():
    head = make_head(50, 8, 2, 1)
    assert head._takes_kernel(torch.randn(64, 4))
    assert not head._takes_kernel(torch.randn(65, 4))
    assert not head._takes_kernel(torch.randn(1, 4).double())
    assert not head.requires_grad_().train()._takes_kernel(torch.randn(1, 4))
    assert torch.compile(head.eval()._takes_kernel, backend="eager", fullgraph=True)(torch.randn(1, 4)) is False
