"""What the losses of all methods rest on: shifted labels, reductions over the tokens that count, checks of tensors.

Letters: N tokens, B samples, T positions.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_logits.functional.checks import check_finite, check_labels, check_not_negative, check_token_to_code
from lit_logits.functional.labels import IGNORE_INDEX, next_token_labels
from lit_logits.functional.reductions import at_least_float32, chunked_sum, reduce_tokens, sample_mean


def problem(seed, rows, width):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=g, dtype=torch.float64), torch.rand(rows, width, generator=g) < 0.6


# ---------------------------------------------------------------------- reductions


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 5), width=st.integers(1, 7))
def test_reductions_are_loops_over_what_counts(seed, rows, width):
    values, mask = problem(seed, rows, width)
    counted = [float(v) for v, m in zip(values.flatten(), mask.flatten(), strict=True) if m]
    assert reduce_tokens(values, mask, "sum").item() == pytest.approx(math.fsum(counted), abs=1e-12)
    assert reduce_tokens(values, mask).item() == pytest.approx(math.fsum(counted) / max(1, len(counted)), abs=1e-12)
    assert torch.equal(reduce_tokens(values, mask, "none"), torch.where(mask, values, torch.zeros(())))
    means = []
    for row, keep in zip(values.tolist(), mask.tolist(), strict=True):
        kept = [v for v, k in zip(row, keep, strict=True) if k]
        means.append(math.fsum(kept) / max(1, len(kept)))
    assert sample_mean(values, mask).item() == pytest.approx(math.fsum(means) / rows, abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), padding=st.integers(0, 4))
def test_padding_changes_nothing_and_parts_add_up(seed, padding):
    values, mask = problem(seed, 4, 5)
    wide = torch.nn.functional.pad(values, (0, padding), value=7.0), torch.nn.functional.pad(mask, (0, padding))
    for reduce in (reduce_tokens, sample_mean):
        torch.testing.assert_close(reduce(*wide), reduce(values, mask))
    parts = [(values[:1], mask[:1]), (values[1:], mask[1:])]
    counts = [part.sum() for _, part in parts]
    weighted = sum(reduce_tokens(*part) * count for part, count in zip(parts, counts, strict=True))
    torch.testing.assert_close(weighted / mask.sum().clamp(min=1), reduce_tokens(values, mask))
    halves = [sample_mean(values[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, sample_mean(values, mask))


@pytest.mark.parametrize("reduce", [reduce_tokens, sample_mean])
def test_of_nothing_it_is_a_zero_with_a_graph(reduce):
    values = torch.randn(2, 3, requires_grad=True)
    result = reduce(values, torch.zeros(2, 3, dtype=torch.bool))
    result.backward()
    assert result.item() == 0
    assert torch.equal(values.grad, torch.zeros(2, 3))


def test_another_reduction_is_named():
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none', but got 'max'"):
        reduce_tokens(torch.ones(1), torch.ones(1, dtype=torch.bool), "max")


def test_precision_only_rises():
    for dtype, expected in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert at_least_float32(torch.zeros(1, dtype=dtype)).dtype == expected
    single = torch.zeros(1)
    assert at_least_float32(single) is single


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_a_chunked_sum_is_the_whole_in_value_and_gradient(chunk_size):
    rows = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(7, dtype=torch.float64)

    def total(rows, scale):
        return (rows.exp().sum(-1) * scale).sum()

    whole = total(rows, scale)
    (expected,) = torch.autograd.grad(whole, rows)
    chunked = chunked_sum(total, rows, scale, chunk_size=chunk_size)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(chunked, rows)[0], expected)
    assert torch.autograd.gradcheck(lambda x: chunked_sum(total, x, scale, chunk_size=chunk_size), (rows,))


def test_a_chunked_sum_never_sees_more_than_a_chunk_and_takes_no_rows_too():
    seen = []

    def total(rows):
        seen.append(len(rows))
        return rows.sum()

    assert chunked_sum(total, torch.ones(7), chunk_size=3).item() == 7
    assert seen == [3, 3, 1]
    assert chunked_sum(total, torch.ones(0, 2), chunk_size=3).item() == 0
    with pytest.raises(ValueError, match="`chunk_size` to be at least 1, but got 0"):
        chunked_sum(total, torch.ones(7), chunk_size=0)


# ---------------------------------------------------------------------- labels


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), samples=st.integers(0, 3), length=st.integers(0, 5), kind=st.integers(0, 2))
def test_next_token_labels_are_a_loop_over_positions(seed, samples, length, kind):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 9, (samples, length), generator=g)
    labels = labels.masked_fill(torch.rand(labels.shape, generator=g) < 0.2, IGNORE_INDEX)
    keep = [None, torch.rand(samples, generator=g) < 0.6, torch.rand(labels.shape, generator=g) < 0.6][kind]
    expected = torch.full(labels.shape, IGNORE_INDEX)
    for b in range(samples):
        for t in range(length - 1):
            if keep is None or (keep[b] if kind == 1 else keep[b, t]):
                expected[b, t] = labels[b, t + 1]
    given_labels = labels.clone()
    shifted, mask = next_token_labels(labels, keep=keep)
    assert torch.equal(shifted, expected)
    assert torch.equal(mask, expected != IGNORE_INDEX)
    assert torch.equal(labels, given_labels)


def test_next_token_labels_select_what_slices_select():
    """The long form that callers wrote: states without the last position, labels without the first."""
    hidden, labels = torch.randn(2, 4, 3), torch.tensor([[-100, 1, -100, 2], [3, 4, 5, -100]])
    mask = labels[:, 1:] != -100
    shifted, kept = next_token_labels(labels)
    assert torch.equal(hidden[kept], hidden[:, :-1][mask])
    assert torch.equal(shifted[kept], labels[:, 1:][mask])


def test_next_token_labels_keep_dtype_and_take_another_ignored_label_and_masks_of_numbers():
    labels = torch.tensor([[0, 0, 3], [1, 2, 3]], dtype=torch.int32)
    shifted, mask = next_token_labels(labels, keep=torch.tensor([[1, 1, 1], [0, 1, 1]]), ignore_index=0)
    assert shifted.dtype == torch.int32
    assert shifted.tolist() == [[0, 3, 0], [0, 3, 0]]
    assert mask.tolist() == [[False, True, False], [False, True, False]]
    with pytest.raises(ValueError, match=r"`keep` of shape \(2,\) or \(2, 3\), as `labels` has, but got \(3,\)"):
        next_token_labels(labels, keep=torch.ones(3))


# ---------------------------------------------------------------------- checks


def test_labels():
    check_labels(torch.tensor([0, 2, -100]), 3)
    check_labels(torch.tensor([], dtype=torch.int64), 3)
    check_labels(torch.tensor([7], device="meta"), 3)  # not looked at where the host would wait
    check_labels(torch.tensor([0, -1]), 3, ignore_index=-1)
    for wrong in (3, -1, -101):
        with pytest.raises(ValueError, match=rf"in \[0, 3\) or -100 \(ignored\), but got {wrong}"):
            check_labels(torch.tensor([0, wrong]), 3)
    for dtype in (torch.float32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="to be integer ids"):
            check_labels(torch.zeros(2, dtype=dtype), 3)


def test_mappings():
    check_token_to_code(torch.tensor([1, 0, 1]), 3, 2)
    for wrong, message in (
        (torch.tensor([0, 2, 0]), "token 1 maps to 2"),
        (torch.tensor([0, 1, -1]), "token 2 maps to -1"),
        (torch.tensor([0, 1]), r"3 integer codes, one a token, but got torch\.int64 of shape \(2,\)"),
        (torch.zeros(3), r"but got torch\.float32"),
        (torch.zeros(3, dtype=torch.bool), r"but got torch\.bool"),
    ):
        with pytest.raises(ValueError, match=message):
            check_token_to_code(wrong, 3, 2)


def test_finite_and_not_negative():
    check_finite(torch.zeros(0), "empty")
    with pytest.raises(ValueError, match="Expected `rows` to be finite, but got 3 NaN or infinite values of 4"):
        check_finite(torch.tensor([1.0, math.nan, math.inf, -math.inf]), "rows")
    check_not_negative(one=0, other=2.5)
    for wrong in (-0.1, math.nan):
        with pytest.raises(ValueError, match=f"Expected `other` to be non-negative, but got {wrong}"):
            check_not_negative(one=1, other=wrong)
