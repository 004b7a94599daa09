"""Look-up of residual product codes against the dense layer that the codes stand for.

Letters: N positions, d hidden size, V vocabulary, K codes, G groups, S stages.
"""

import ctypes
import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_logits.functional import (
    lookup_greedy,
    lookup_layout,
    lookup_logits,
    packed_lookup_logits,
)
from lit_logits.functional.lookup import kernel as vq_lookup_kernel
from lit_logits.functional.lookup import lookup as vq_lookup

V, G, WIDTH = 1003, 5, 3


@pytest.fixture(scope="module", autouse=True)
def _kernel():
    """Compiled before anything is timed; where there is no compiler, what is tested is the way without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vq_lookup_kernel.lookup_kernel()


def head(codebook_size=7, tiers=(1.0,), *, bias=True, seed=0, vocab=V, groups=G, width=WIDTH, dtype=torch.uint8):
    """Codebooks, codes, members and bias; each stage is owned by a random share of the tokens that own the former."""
    g = torch.Generator().manual_seed(seed)
    codebooks = torch.randn(len(tiers), groups, codebook_size, width, generator=g)
    members, owners = [], torch.arange(vocab)
    for share in tiers:
        owners = owners[torch.randperm(len(owners), generator=g)[: int(share * vocab)].sort().values]
        members.append(None if share == 1 else owners)
    sizes = [vocab if owners is None else len(owners) for owners in members]
    dtype = dtype if codebook_size <= 256 else torch.int16
    codes = [torch.randint(codebook_size, (size, groups), generator=g).to(dtype) for size in sizes]
    return codebooks, codes, members, torch.randn(vocab, generator=g) if bias else None


def dense_rows(codebooks, codes, members):
    """The (V, d) layer, row by row from the definition, in float64."""
    groups, width = codebooks.shape[1], codebooks.shape[3]
    rows = torch.zeros(codes[0].shape[0], groups * width, dtype=torch.float64)
    for stage, owners in enumerate(members):
        tokens = range(len(rows)) if owners is None else owners.tolist()
        for token, token_codes in zip(tokens, codes[stage].tolist(), strict=True):
            parts = [codebooks[stage, group, code] for group, code in enumerate(token_codes)]
            rows[token] += torch.cat(parts).double()
    return rows


def dense_logits(hidden, codebooks, codes, members, bias):
    logits = hidden.double() @ dense_rows(codebooks, codes, members).T
    return logits if bias is None else logits + bias


def states(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HEADS = {
    "paper": {},
    "two stages": {"tiers": (1.0, 1.0)},
    "tiers, no bias": {"tiers": (1.0, 0.6, 0.1), "bias": False},
    "300 codes": {"codebook_size": 300, "tiers": (1.0, 0.5)},
    "256 codes": {"codebook_size": 256, "tiers": (1.0, 0.7), "groups": 16},
    "129 codes, int64": {"codebook_size": 129, "dtype": torch.int64, "groups": 8, "bias": False},
    "blocks": {"vocab": 4097, "tiers": (1.0, 0.4, 0.001), "codebook_size": 11, "width": 1},
    "one group": {"groups": 1, "codebook_size": 41, "width": 4},
    "a stage of nobody": {"tiers": (1.0, 0.0)},
}


@functools.cache
def dense_head(name):
    """A head of `HEADS`, and its dense layer."""
    parts = head(**HEADS[name])
    return parts, dense_rows(*parts[:3])


def problem(name, leading):
    """A head, hidden states, and their logits."""
    parts, rows = dense_head(name)
    hidden = states(*leading, rows.shape[1])
    logits = hidden.double() @ rows.T
    return parts, hidden, logits if parts[3] is None else logits + parts[3]


LEADING = pytest.mark.parametrize("leading", [(), (1,), (3,), (8,), (17,), (2, 3)], ids=str)


@LEADING
@pytest.mark.parametrize("name", HEADS)
def test_logits_are_those_of_the_dense_layer(name, leading):
    parts, hidden, expected = problem(name, leading)
    for logits in (lookup_logits(hidden, *parts), packed_lookup_logits(hidden, lookup_layout(*parts))):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


@LEADING
@pytest.mark.parametrize("name", HEADS)
def test_greedy_is_the_argmax(name, leading):
    parts, hidden, logits = problem(name, leading)
    assert torch.equal(lookup_greedy(hidden, lookup_layout(*parts)), logits.argmax(dim=-1))


@given(seed=st.integers(0, 2**31 - 1), outlier=st.sampled_from([1.0, 30.0, 1e4]), spread=st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_greedy_is_the_argmax_of_the_float32_logits_to_the_last_bit(seed, outlier, spread):
    """Near-ties, and a few groups that range far wider than the others, as hidden states of language models do."""
    codebooks, codes, members, bias = head(32, (1.0, 0.5), seed=seed, groups=8)
    layout = lookup_layout(codebooks, codes, members, spread * bias)
    hidden = states(4, 8 * WIDTH, seed=seed)
    hidden[:, :2] *= outlier
    codebooks[:, 3] *= outlier
    one_by_one = torch.stack([packed_lookup_logits(row, layout).argmax() for row in hidden])
    assert torch.equal(lookup_greedy(hidden, layout), one_by_one)


def test_greedy_is_exact_where_sums_round_by_more_than_a_step():
    """Codes that hardly differ, far from zero: bounds of real numbers would not hold for sums of floats."""
    for seed in range(20):
        codebooks, codes, members, _ = head(32, (1.0, 0.5), seed=seed, groups=8)
        layout = lookup_layout(1000 + 1e-3 * codebooks, codes, members)
        hidden = states(4, 8 * WIDTH, seed=seed)
        one_by_one = torch.stack([packed_lookup_logits(row, layout).argmax() for row in hidden])
        assert torch.equal(lookup_greedy(hidden, layout), one_by_one)


def test_ties_go_to_the_lowest_id():
    """Numbers that float32 sums exactly: many tokens share the best logit, some of them by other codes."""
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        codebooks = torch.randint(-1, 2, (2, 3, 5, 2), generator=g).float()
        codes = [torch.randint(5, (5000, 3), generator=g), torch.randint(5, (2500, 3), generator=g)]
        members = [None, torch.randperm(5000, generator=g)[:2500].sort().values]
        hidden = torch.randint(-2, 3, (6, 6), generator=g).float()
        logits = dense_logits(hidden, codebooks, codes, members, None)
        first = [int((row == row.max()).nonzero()[0]) for row in logits]
        assert (logits == logits.amax(dim=-1, keepdim=True)).sum() > 2 * len(first)  # there are ties
        assert lookup_greedy(hidden, lookup_layout(codebooks, codes, members)).tolist() == first


def test_equal_logits_of_all_tokens():
    parts = head(256, (1.0, 0.5), bias=False)
    assert lookup_greedy(torch.zeros(3, G * WIDTH), lookup_layout(*parts)).tolist() == [0, 0, 0]


def test_one_last_bit_decides():
    """Two tokens of equal codes; the bias of the later one is a last bit higher."""
    codebooks, codes, members, _ = head(64, bias=False)
    hidden = states(1, G * WIDTH)
    best = int(dense_logits(hidden, codebooks, codes, members, None).argmax())
    later = V - 1 if best != V - 1 else 0
    codes[0][later] = codes[0][best]
    bias = torch.ones(V)
    assert lookup_greedy(hidden, lookup_layout(codebooks, codes, members, bias)).item() == min(best, later)
    for winner in (best, later):
        bias = torch.ones(V)
        bias[winner] = 1 + 2**-18  # a last bit of sums below 32
        assert lookup_greedy(hidden, lookup_layout(codebooks, codes, members, bias)).item() == winner


def test_excluded_tokens_are_never_chosen():
    codebooks, codes, members, bias = head(32, (1.0, 0.3))
    bias[torch.arange(V) != 77] = -torch.inf
    layout = lookup_layout(codebooks, codes, members, bias)
    assert lookup_greedy(states(3, G * WIDTH), layout).tolist() == [77, 77, 77]
    assert (packed_lookup_logits(states(G * WIDTH), layout).isfinite().nonzero() == 77).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_states_that_are_not_finite_do_no_harm(bad):
    parts = head(32, (1.0, 0.3))
    hidden = states(3, G * WIDTH)
    hidden[1] = bad
    layout = lookup_layout(*parts)
    tokens = lookup_greedy(hidden, layout)
    assert torch.equal(tokens, packed_lookup_logits(hidden, layout).argmax(dim=-1))
    assert torch.equal(tokens[[0, 2]], dense_logits(hidden, *parts)[[0, 2]].argmax(dim=-1))


def test_no_states():
    layout = lookup_layout(*head())
    assert lookup_greedy(torch.zeros(0, G * WIDTH), layout).shape == (0,)
    assert packed_lookup_logits(torch.zeros(2, 0, G * WIDTH), layout).shape == (2, 0, V)


def test_half_precision_is_summed_in_float32():
    codebooks, codes, members, bias = head(32)
    hidden = states(3, G * WIDTH).bfloat16()
    expected = dense_logits(hidden, codebooks.bfloat16(), codes, members, bias).float()
    for logits in (
        lookup_logits(hidden, codebooks.bfloat16(), codes, members, bias),
        packed_lookup_logits(hidden, lookup_layout(codebooks.bfloat16(), codes, members, bias)),
    ):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_float64_stays_float64():
    codebooks, codes, members, bias = head(32)
    hidden = states(3, G * WIDTH).double()
    for layout in (lookup_layout(codebooks, codes, members, bias), lookup_layout(codebooks.double(), codes, members)):
        logits = packed_lookup_logits(hidden, layout)
        torch.testing.assert_close(logits, dense_logits(hidden, *layout[:4]), rtol=1e-12, atol=1e-12)
        assert torch.equal(lookup_greedy(hidden, layout), logits.argmax(dim=-1))


def test_gradients_are_those_of_the_dense_layer():
    """Packed or not: where a gradient is wanted, the reference gives it."""
    codebooks, codes, members, bias = (part.double() if torch.is_tensor(part) else part for part in head(7, (1.0, 0.3)))
    inputs = [states(2, G * WIDTH).double(), codebooks, bias]
    weight = states(2, V).double()

    def gradients(function):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        return torch.autograd.grad((weight * function(*leaves)).sum(), leaves)

    def dense(hidden, codebooks, bias):
        rows = torch.zeros(V, G * WIDTH).double()
        for stage, owners in enumerate(members):
            parts = [codebooks[stage, g][codes[stage][:, g].long()] for g in range(G)]
            part = torch.cat(parts, dim=1)
            rows = rows + (part if owners is None else torch.zeros(V, G * WIDTH).double().index_add(0, owners, part))
        return hidden @ rows.T + bias

    expected = gradients(dense)
    torch.testing.assert_close(gradients(lambda h, c, b: lookup_logits(h, c, codes, members, b)), expected)
    packed = gradients(lambda h, c, b: packed_lookup_logits(h, lookup_layout(c, codes, members, b)))
    torch.testing.assert_close(packed, expected)
    layout = lookup_layout(codebooks.float().requires_grad_(), codes, members)
    hidden = states(2, G * WIDTH)
    assert packed_lookup_logits(hidden, layout).requires_grad
    with torch.no_grad():
        assert not packed_lookup_logits(hidden, layout).requires_grad


def test_a_view_of_states_is_read_right():
    parts = head(32)
    hidden = states(G * WIDTH, 6).T[::2]
    assert not hidden.is_contiguous()
    expected = dense_logits(hidden, *parts)
    logits = packed_lookup_logits(hidden, lookup_layout(*parts))
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_two_threads_give_what_one_gives():
    parts = head(32, (1.0, 0.3), vocab=20_001)
    layout, hidden = lookup_layout(*parts), states(9, G * WIDTH)
    logits, tokens = packed_lookup_logits(hidden, layout), lookup_greedy(hidden, layout)
    torch.set_num_threads(2)
    assert torch.equal(packed_lookup_logits(hidden, layout), logits)
    assert torch.equal(lookup_greedy(hidden, layout), tokens)


def test_greedy_where_the_processor_has_no_look_up_in_registers(monkeypatch):
    kernel = vq_lookup_kernel.lookup_kernel()
    if kernel is None:
        pytest.skip("needs a C++ compiler")
    plain = SimpleNamespace(lookup_logits=kernel.lookup_logits)
    parts = head(32, (1.0, 0.3))
    hidden = states(3, G * WIDTH)
    expected = dense_logits(hidden, *parts).argmax(dim=-1)
    monkeypatch.setattr(vq_lookup, "lookup_kernel", lambda: plain)
    assert torch.equal(lookup_greedy(hidden, lookup_layout(*parts)), expected)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_torch_does_it_and_one_warning_says_so(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    vq_lookup_kernel.lookup_kernel.cache_clear()
    parts = head(32, (1.0, 0.3))
    hidden, layout = states(3, G * WIDTH), lookup_layout(*parts)
    try:
        with pytest.warns(UserWarning, match=r"Install g\+\+ or clang"):
            tokens = lookup_greedy(hidden, layout)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits = packed_lookup_logits(hidden, layout)
    finally:
        vq_lookup_kernel.lookup_kernel.cache_clear()
    assert torch.equal(logits, lookup_logits(hidden, *parts))
    assert torch.equal(tokens, logits.argmax(dim=-1))


def test_the_library_is_built_once(monkeypatch, tmp_path):
    """In a cache of one's own, and with flags that change what the compiler predefines."""
    if vq_lookup_kernel.lookup_kernel() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(vq_lookup_kernel, "_FLAGS", [flag for flag in vq_lookup_kernel._FLAGS if flag != "-O3"])
    library = vq_lookup_kernel._compile()
    made = library.stat().st_mtime_ns
    assert vq_lookup_kernel._compile() == library
    assert library.stat().st_mtime_ns == made
    assert [path.name for path in (tmp_path / "lit_logits").iterdir()] == [library.name]


def test_a_library_that_is_cut_off_is_built_again(monkeypatch, tmp_path):
    """A full disk or a torn copy of the home left one, and loading it ended the process with a bus error."""
    if vq_lookup_kernel.lookup_kernel() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = vq_lookup_kernel._compile()
    whole = library.read_bytes()
    with library.open("r+b") as file:
        file.truncate(5000)
    again = vq_lookup_kernel._compile()
    assert again.stat().st_size == len(whole)
    assert ctypes.CDLL(str(again)).lookup_logits


CODEBOOKS, CODES, MEMBERS, BIAS = head(7, (1.0, 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebooks": CODEBOOKS[0]}, "Expected `codebooks` to be floats of shape"),
        ({"codebooks": CODEBOOKS.long()}, "Expected `codebooks` to be floats of shape"),
        ({"codes": CODES[:1]}, "Expected `codes` and `members` of 2 stages"),
        ({"members": MEMBERS[:1]}, "Expected `codes` and `members` of 2 stages"),
        ({"codes": [CODES[0], CODES[1][:, :4]]}, r"Expected `codes\[1\]` to be integers of shape \(501, 5\)"),
        ({"codes": [CODES[0], CODES[1].float()]}, r"Expected `codes\[1\]` to be integers"),
        ({"members": [None, None]}, r"Expected `codes\[1\]` to be integers of shape \(1003, 5\)"),
        ({"members": [MEMBERS[1], MEMBERS[1]]}, r"Expected `members\[0\]` to be int64 of shape \(1003,\)"),
        ({"members": [None, MEMBERS[1].int()]}, r"Expected `members\[1\]` to be int64"),
        ({"token_bias": BIAS[1:]}, r"Expected `token_bias` to be of shape \(1003,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    parts = {"codebooks": CODEBOOKS, "codes": CODES, "members": MEMBERS, "token_bias": BIAS} | change
    with pytest.raises(ValueError, match=message):
        lookup_layout(**parts)
    with pytest.raises(ValueError, match=message):
        lookup_logits(states(G * WIDTH), **parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": [CODES[0], CODES[1] + 1]}, r"Expected `codes\[1\]` to be in \[0, 7\), but got 1 to 7"),
        ({"codes": [CODES[0].long() - 1, CODES[1]]}, r"Expected `codes\[0\]` to be in \[0, 7\), but got -1 to 5"),
        ({"members": [None, MEMBERS[1].flip(0)]}, r"Expected `members\[1\]` to be rising"),
        ({"members": [None, MEMBERS[1] + V]}, r"Expected `members\[1\]` to be rising token ids in \[0, 1003\)"),
        ({"codebooks": CODEBOOKS / 0}, "Expected `codebooks` to be finite"),
        ({"token_bias": BIAS / 0}, "Expected `token_bias` to be finite or −∞"),
    ],
)
def test_values_that_the_kernel_would_stumble_over_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        lookup_layout(**({"codebooks": CODEBOOKS, "codes": CODES, "members": MEMBERS, "token_bias": BIAS} | change))


@pytest.mark.parametrize("hidden", [torch.zeros(3, 14), torch.tensor(1.0), torch.zeros(3, 15, dtype=torch.int64)])
def test_hidden_states_that_do_not_fit_are_refused(hidden):
    layout = lookup_layout(CODEBOOKS, CODES, MEMBERS, BIAS)
    for call in (
        lambda: lookup_logits(hidden, *layout[:4]),
        lambda: packed_lookup_logits(hidden, layout),
        lambda: lookup_greedy(hidden, layout),
    ):
        with pytest.raises(ValueError, match=r"Expected `hidden` to be floats of shape \(\.\.\., 15\)"):
            call()
