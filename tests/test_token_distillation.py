"""Losses that teach what, not only how sure: top-k KL with a tail, matched tokens, chunks; loops from the formulas."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_logits.functional import (
    align_positions,
    chunk_likelihood_loss,
    match_top_k,
    match_vocabularies,
    matched_kl,
    sum_chunks,
    top_k_kl,
)

KINDS = ["forward", "reverse", "jsd"]
seeds = st.integers(0, 2**31)


def draw(seed, *shape, dtype=torch.double):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kept(logits, k, temperature=1.0):
    top = (logits / temperature).log_softmax(-1).topk(k)
    return top.indices, top.values


# ---------------------------------------------------------------------- top-k KL


def divergence_by_loops(p, q, kind, beta):
    """Of two lists of probabilities."""
    if kind == "reverse":
        p, q = q, p
    if kind != "jsd":
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    mean = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * divergence_by_loops(p, mean, "forward", 0) + (1 - beta) * divergence_by_loops(q, mean, "forward", 0)


@pytest.mark.parametrize("kind", KINDS)
@given(seeds, st.integers(1, 6), st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=25, deadline=None)
def test_top_k_kl_by_loops(kind, seed, k, temperature):
    student, teacher = 2 * draw(seed, 3, 7), 2 * draw(seed + 1, 3, 7)
    ids, log_probs = kept(teacher, k, temperature)
    options = {"kind": kind, "beta": 0.3, "temperature": temperature}
    found = top_k_kl(student, ids, log_probs, reduction="none", **options)
    for row in range(3):
        p, q = ((z[row] / temperature).softmax(-1).tolist() for z in (teacher, student))
        buckets = [[d[i] for i in ids[row]] for d in (p, q)]
        buckets = [[*bucket, sum(d) - sum(bucket)] for bucket, d in zip(buckets, (p, q), strict=True)]
        expected = temperature**2 * divergence_by_loops(*buckets, kind, 0.3)
        assert float(found[row]) == pytest.approx(expected, rel=1e-8, abs=1e-10)
        whole = temperature**2 * divergence_by_loops(p, q, kind, 0.3)
        assert float(found[row]) <= whole + 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_whole_vocabulary_it_is_torchs(kind):
    student, teacher = draw(0, 4, 9), draw(1, 4, 9)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    log_m = (0.5 * log_q.exp() + 0.5 * log_p.exp()).log()

    def kl(a, b):
        return F.kl_div(b, a, log_target=True, reduction="batchmean")

    expected = {"forward": kl(log_p, log_q), "reverse": kl(log_q, log_p)}
    expected["jsd"] = 0.5 * kl(log_p, log_m) + 0.5 * kl(log_q, log_m)
    torch.testing.assert_close(top_k_kl(student, *kept(teacher, 9), kind=kind), expected[kind])


def test_the_limits_of_jsd_are_forward_and_reverse():
    student, (ids, log_probs) = draw(2, 5, 9), kept(draw(3, 5, 9), 4)
    forward, reverse = (top_k_kl(student, ids, log_probs, kind=kind) for kind in KINDS[:2])
    near_0, near_1 = (top_k_kl(student, ids, log_probs, kind="jsd", beta=beta) for beta in (1e-6, 1 - 1e-6))
    torch.testing.assert_close(near_0 / 1e-6, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(near_1 / 1e-6, reverse, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_kl_gradient(kind):
    student, teacher = draw(4, 3, 8).requires_grad_(), draw(5, 3, 8).requires_grad_()
    ids, log_probs = kept(teacher, 3)
    ids = ids.clone()
    ids[1, 2], ids[2] = -1, -1  # an entry, and all of a position, that are not there
    top_k_kl(student, ids, log_probs, kind=kind).backward()
    assert teacher.grad is None
    assert (student.grad[2] == 0).all()
    assert student.grad[:2].abs().sum() > 0
    mask = torch.tensor([True, True, False])
    options = {"kind": kind, "temperature": 2.0}
    assert torch.autograd.gradcheck(lambda z: top_k_kl(z, ids, log_probs.detach(), mask, **options), (student,))


@pytest.mark.parametrize("kind", KINDS)
def test_agreement_is_zero_and_has_no_gradient(kind):
    student = draw(6, 4, 30, dtype=torch.float32).requires_grad_()
    loss = top_k_kl(student, *kept(student.detach(), 5), kind=kind)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_that_are_not_there_belong_to_the_tail(kind):
    student, (ids, log_probs) = draw(7, 4, 9), kept(draw(8, 4, 9), 4)
    fewer = top_k_kl(student, ids[:, :2], log_probs[:, :2], kind=kind)
    torch.testing.assert_close(top_k_kl(student, ids.masked_fill(torch.arange(4) > 1, -1), log_probs, kind=kind), fewer)
    moved = ids[:, [2, 0, 3, 1]].masked_fill(torch.tensor([True, False, True, False]), -1)
    torch.testing.assert_close(top_k_kl(student, moved, log_probs[:, [2, 0, 3, 1]], kind=kind), fewer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ruled_out", [-torch.inf, torch.finfo(torch.float32).min, -1e30])
def test_tokens_that_are_ruled_out(kind, ruled_out):
    """Gradients stay finite, and those of the other tokens are what they would be without it."""
    student, (ids, log_probs) = draw(9, 4, 9, dtype=torch.float32), kept(draw(10, 4, 9, dtype=torch.float32), 3)
    padded = torch.cat([student, torch.full((4, 1), ruled_out)], -1)
    losses, grads = [], []
    for logits in (student.requires_grad_(), padded.requires_grad_()):
        losses.append(top_k_kl(logits, ids, log_probs, kind=kind))
        grads.append(torch.autograd.grad(losses[-1], logits)[0])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(grads[1][:, :9], grads[0])
    assert (grads[1][:, 9] == 0).all()
    wanted = torch.full_like(ids[:, :1], 9)  # now the teacher wants the very token
    loss = top_k_kl(padded, wanted, torch.full((4, 1), -0.5), kind=kind)
    assert torch.autograd.grad(loss, padded)[0].isfinite().all()
    assert loss.isfinite()
    assert float(loss) > 0.1


def test_a_small_tail_keeps_its_digits():
    """Against float64: 1 − Σ q_i in float32 would be 0 here, and its logarithm −inf."""
    logits = torch.tensor([[20.0, 0.0, -1.0, 1.0]])
    ids, log_probs, tail = torch.tensor([[0]]), torch.tensor([[0.5]]).log(), torch.tensor([0.5])
    exact = top_k_kl(logits.double(), ids, log_probs.double(), tail=tail.double())
    torch.testing.assert_close(top_k_kl(logits, ids, log_probs, tail=tail).double(), exact, rtol=1e-6, atol=0)


def test_top_k_kl_mask_half_precision_and_errors():
    student, (ids, log_probs) = draw(11, 2, 3, 9), kept(draw(12, 2, 3, 9), 2)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    each = top_k_kl(student, ids, log_probs, reduction="none")
    torch.testing.assert_close(top_k_kl(student, ids, log_probs, mask), each[mask].mean())
    half = top_k_kl(student.bfloat16(), ids, log_probs.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), each.mean(), rtol=0.05, atol=0.01)
    for kwargs, match in (
        ({"kind": "backward"}, r"`kind` to be one of \['forward', 'reverse', 'jsd'\], but got 'backward'"),
        ({"kind": "jsd", "beta": 1.0}, r"`beta` to be in \(0, 1\), but got 1.0"),
        ({"temperature": 0.0}, "`temperature` to be positive"),
    ):
        with pytest.raises(ValueError, match=match):
            top_k_kl(student, ids, log_probs, **kwargs)


# ---------------------------------------------------------------------- matched tokens

PIVOT = [None, b"a", b"b", b" the", b"he", b"a", b"\n"]
SOURCE = [b" the", b"zz", None, b"b", b"b", b"a", b"q"]


def test_vocabularies_are_matched_by_text():
    """Of several pivot tokens with one text the first counts, and what stands for no text finds none."""
    assert match_vocabularies(PIVOT, SOURCE).tolist() == [3, -1, -1, 2, 2, 1, -1]
    assert match_vocabularies(SOURCE, PIVOT).tolist() == [-1, 5, 3, 0, -1, 5, -1]
    assert match_vocabularies([], [b"a"]).tolist() == [-1]


# "zebra" is cut ze|b|ra, "abxa" a|b and then no token fits, "aaaaa" after its first four pieces; "xa" begins with none.
PIECES = [None, b"a", b"b", b"ze", b"z", b"ra", b"r"]
LONG = [b"zebra", b"abxa", b"xa", b"a", None, b"aaaaa", b""]


def test_tokens_without_a_partner_are_cut_into_pieces():
    assert match_vocabularies(PIECES, LONG).tolist() == [-1, -1, -1, 1, -1, -1, -1]
    assert match_vocabularies(PIECES, LONG, unmatched="first").tolist() == [3, 1, -1, 1, -1, 1, -1]
    pieces = [[3, 2, 5, -1], [1, 2, -1, -1], [-1] * 4, [1, -1, -1, -1], [-1] * 4, [1] * 4, [-1] * 4]
    assert match_vocabularies(PIECES, LONG, unmatched="pieces").tolist() == pieces
    with pytest.raises(ValueError, match=r"`unmatched` to be one of .*, but got 'last'"):
        match_vocabularies(PIECES, LONG, unmatched="last")


@given(seeds, st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_pieces_share_a_probability_by_loops(seed, k):
    """1, 0.1, 0.01 of it, divided by their sum: no probability is lost, and none comes of nothing."""
    table = match_vocabularies(PIECES, LONG, unmatched="pieces")
    ids, log_probs = kept(2 * draw(seed, 3, 7), k)
    found = match_top_k(ids, log_probs, table)
    for row in range(3):
        expected, left = {}, 1.0
        for token, log_prob in zip(ids[row].tolist(), log_probs[row].tolist(), strict=True):
            pieces = [piece for piece in table[token].tolist() if piece >= 0]
            for place, piece in enumerate(pieces):
                share = math.exp(log_prob) * 0.1**place / sum(0.1**other for other in range(len(pieces)))
                expected[piece] = expected.get(piece, 0.0) + share
                left -= share
        pairs = zip(found.token_ids[row].tolist(), found.log_probs[row].exp().tolist(), strict=True)
        got = [(token, prob) for token, prob in pairs if token >= 0]
        assert dict(got) == pytest.approx(expected)
        assert len(got) == len(expected)
        assert float(found.tail[row]) == pytest.approx(left, abs=1e-12)
    student = draw(seed, 3, 7).requires_grad_()
    loss = matched_kl(student, ids, log_probs, table)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@given(seeds, st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_probabilities_are_carried_over_by_loops(seed, k):
    table = match_vocabularies(PIVOT, SOURCE)
    ids, log_probs = kept(2 * draw(seed, 3, 7), k)
    found = match_top_k(ids, log_probs, table)
    assert found.token_ids.shape == found.log_probs.shape == (3, k)
    for row in range(3):
        expected, left = {}, 1.0
        for token, log_prob in zip(ids[row].tolist(), log_probs[row].tolist(), strict=True):
            if SOURCE[token] in PIVOT and SOURCE[token] is not None:
                text = PIVOT.index(SOURCE[token])
                expected[text] = expected.get(text, 0.0) + math.exp(log_prob)
                left -= math.exp(log_prob)
        pairs = zip(found.token_ids[row].tolist(), found.log_probs[row].exp().tolist(), strict=True)
        got = [(token, prob) for token, prob in pairs if token >= 0]
        assert dict(got) == pytest.approx(expected)
        assert len(got) == len(expected)
        assert float(found.tail[row]) == pytest.approx(left)


@pytest.mark.parametrize("kind", KINDS)
def test_one_vocabulary_in_another_order_is_top_k_kl(kind):
    student, (ids, log_probs) = draw(13, 4, 9).requires_grad_(), kept(draw(14, 4, 9), 5)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    texts = [bytes([i]) for i in range(9)]
    table = match_vocabularies([texts[i] for i in order], texts)
    tail = 1 - log_probs.exp().sum(-1)
    expected = top_k_kl(student, ids, log_probs, kind=kind)
    found = matched_kl(student[:, order], ids, log_probs, table, tail=tail, kind=kind)
    torch.testing.assert_close(found, expected)
    one, other = (torch.autograd.grad(loss, student)[0] for loss in (expected, found))
    torch.testing.assert_close(one, other)


def test_without_a_match_there_is_nothing_to_learn():
    student, (ids, log_probs) = draw(15, 4, 9).requires_grad_(), kept(draw(16, 4, 7), 3)
    loss = matched_kl(student, ids, log_probs, torch.full((7,), -1))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


# ---------------------------------------------------------------------- chunks


def coin(p, q):
    return sum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0)


@given(seeds, st.sampled_from([0.5, 1.0, 7.0, 100.0]))
@settings(max_examples=50, deadline=None)
def test_chunk_loss_by_hand(seed, temperature):
    pivot, source = (-10 * draw(seed + i, 6).abs() - 1e-3 for i in range(2))
    found = chunk_likelihood_loss(pivot, source, temperature=temperature, reduction="none")
    for value, ell_p, ell_s in zip(found.tolist(), pivot.tolist(), source.tolist(), strict=True):
        p, q = (math.exp(ell / temperature) for ell in (ell_s, ell_p))
        assert value == pytest.approx(coin(p, q), rel=1e-6, abs=1e-12)
    assert (found >= -1e-15).all()
    mask = torch.tensor([True, False, True, True, False, True])
    torch.testing.assert_close(chunk_likelihood_loss(pivot, source, mask, temperature=temperature), found[mask].mean())


def test_chunk_loss_gradient():
    pivot = (-3 * draw(20, 8).abs() - 0.1).requires_grad_()
    source = (-draw(21, 8).abs()).requires_grad_()
    chunk_likelihood_loss(pivot, source, temperature=2.0).backward()
    assert source.grad is None
    assert torch.autograd.gradcheck(lambda ell: chunk_likelihood_loss(ell, source, temperature=2.0), (pivot,))
    same = pivot.detach().clone().requires_grad_()
    loss = chunk_likelihood_loss(same, same.detach(), temperature=100.0)
    loss.backward()
    assert loss.item() == 0
    torch.testing.assert_close(same.grad, torch.zeros_like(same), atol=1e-12, rtol=0)


def test_chunks_that_are_certain_or_impossible():
    """0 and −inf: losses and gradients stay finite, whichever of the two models says so."""
    edges = torch.tensor([0.0, -1e-30, -1e-8, -2.0, -1e5, -torch.inf])
    pivot, source = (grid.flatten() for grid in torch.meshgrid(edges, edges, indexing="ij"))
    for temperature in (1.0, 100.0):
        ell = pivot.clone().requires_grad_()
        loss = chunk_likelihood_loss(ell, source, temperature=temperature, reduction="none")
        loss.sum().backward()
        assert loss.isfinite().all()
        assert ell.grad.isfinite().all()
        torch.testing.assert_close(loss[pivot == source], torch.zeros(6))
        assert (loss[(pivot == -2) & (source == -1e5)] > 0).all()


def chunks_by_loops(log_probs, ends1, ends2):
    """Sums between places that both have, of the first tokenization: a dictionary from the place of the beginning."""
    shared = sorted(set(ends1) & set(ends2) - {-1})
    sums = {}
    for begin, end in pairwise(shared):
        first, last = (len(ends1) - 1 - ends1[::-1].index(place) for place in (begin, end))
        sums[begin] = sum(log_probs[first:last])
    return sums


def test_sums_of_chunks_between_shared_places():
    """Two tokenizations of nine bytes; shared are 0, 4 and 9."""
    ends1, ends2 = [-1, 0, 0, 2, 4, 5, 9], [0, 3, 4, 7, 8, 9, -1]
    log_probs1, log_probs2 = -draw(30, 1, 7).abs(), -draw(31, 1, 7).abs()
    partner = align_positions(torch.tensor([ends1]), torch.tensor([ends2]))
    is_cut1 = partner >= 0
    is_cut2 = torch.zeros_like(is_cut1).scatter(1, partner[is_cut1].unsqueeze(0), True)
    for log_probs, is_cut, ends, others in (
        (log_probs1, is_cut1, ends1, ends2),
        (log_probs2, is_cut2, ends2, ends1),
    ):
        expected = chunks_by_loops(log_probs[0].tolist(), ends, others)
        sums = sum_chunks(log_probs, is_cut)[0]
        found = {end: float(sums[t]) for t, end in enumerate(ends) if bool(is_cut[0, t]) and end < 9}
        assert found == pytest.approx(expected)
        assert set(found) == {0, 4}
        assert (sums[~is_cut[0]] == 0).all()


def test_chunks_of_one_token_each_and_of_none():
    log_probs = -draw(32, 2, 5).abs()
    assert torch.equal(sum_chunks(log_probs, torch.ones(2, 5, dtype=torch.bool)), log_probs)
    assert torch.equal(sum_chunks(log_probs, torch.zeros(2, 5, dtype=torch.bool)), torch.zeros_like(log_probs))


def test_chunk_errors():
    with pytest.raises(ValueError, match="`temperature` to be positive, but got 0"):
        chunk_likelihood_loss(torch.zeros(2), torch.zeros(2), temperature=0)
    with pytest.raises(ValueError, match=r"of the same chunks, but got shapes \(2,\) and \(3,\)"):
        chunk_likelihood_loss(torch.zeros(2), torch.zeros(3), temperature=1)
