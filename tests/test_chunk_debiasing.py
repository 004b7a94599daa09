"""Chunks compared together with a new word behind them: why, by enumeration; by loops; from models and from caches."""

import math
from functools import cache
from itertools import pairwise, product

import pytest
import torch
from test_gld_fusion_module import OTHER_SIZE, PIVOT_SIZE, fit, make, make_batch, make_model, quiet
from test_gld_fusion_terms import coin, label_positions

from lit_logits import GLDFusionModule
from lit_logits.functional import (
    align_positions,
    boundary_log_probs,
    boundary_tokens,
    chunk_likelihood_loss,
    close_chunks,
    merge_cuts,
    sum_chunks,
)
from lit_logits.functional.top_k_logits import SourceLogits, top_k_logits
from lit_logits.modules.gld_fusion.alignment import align_source
from lit_logits.modules.gld_fusion.token_terms import chunk_terms

END = "<end>"

# ---------------------------------------------------------------------- why: one distribution of texts, two tokenizers


def distribution():
    """A probability for each text of up to four characters, in which `ab` often goes on to `abc`."""
    texts = ["".join(letters) for length in range(5) for letters in product("abc ", repeat=length)]
    weights = 0.1 + torch.rand(len(texts), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights *= torch.tensor([4.0 ** text.count("abc") for text in texts])
    return texts, weights / weights.sum()


def cut(text, vocabulary):
    """The longest token, again and again, and the end."""
    tokens = []
    while text:
        tokens.append(max((token for token in vocabulary if text.startswith(token)), key=len))
        text = text[len(tokens[-1]) :]
    return (*tokens, END)


class Exact:
    """A model that is the distribution itself, in the tokens of a vocabulary."""

    def __init__(self, vocabulary):
        texts, weights = distribution()
        self.rows, self.of_prefix = [cut(text, vocabulary) for text in texts], dict[tuple[str, ...], float]()
        for row, weight in zip(self.rows, weights.tolist(), strict=True):
            for size in range(len(row) + 1):
                self.of_prefix[row[:size]] = self.of_prefix.get(row[:size], 0.0) + weight
        self.tokens = [END, *sorted(vocabulary)]

    def log_probs(self, prefix):
        """Log-probabilities of all tokens after those of a prefix."""
        whole = self.of_prefix[prefix]
        values = [self.of_prefix.get((*prefix, token), 0.0) / whole for token in self.tokens]
        return torch.tensor(values, dtype=torch.float64).log()

    def tensors(self):
        """Ends, log-probabilities of labels, and those of a boundary, at each position of each text."""
        length = max(map(len, self.rows))
        ends = torch.full((len(self.rows), length), -1)
        labels, behind = (torch.zeros(len(self.rows), length, dtype=torch.float64) for _ in range(2))
        ids = boundary_tokens([None if token == END else token.encode() for token in self.tokens])
        log_probs = cache(self.log_probs)
        for row, tokens in enumerate(self.rows):
            for place, token in enumerate(tokens):
                found = log_probs(tokens[:place])
                ends[row, place] = len("".join(tokens[:place]))
                labels[row, place] = found[self.tokens.index(token)]
                behind[row, place] = boundary_log_probs(found.unsqueeze(0), ids)
        return ends, labels, behind


@cache
def exact_models():
    """Without a token `abc`, and with it."""
    short = ["a", "b", "c", " ", "ab"]
    return [Exact(vocabulary).tensors() for vocabulary in (short, [*short, "abc"])]


def likelihoods(threshold):
    """Of each chunk of each text that ends before the text, by either model; None compares them as they are."""
    ends, labels, behind = zip(*exact_models(), strict=True)
    partner = align_positions(*ends)
    is_cut, places = partner >= 0, partner.clamp(min=0)
    other = behind[1].gather(-1, places)
    if threshold is not None:
        is_cut = merge_cuts(is_cut, other, threshold=threshold)
    is_other = torch.zeros_like(ends[1], dtype=torch.bool)
    is_other[is_cut.nonzero()[:, 0], partner[is_cut]] = True
    one, two = sum_chunks(labels[0], is_cut), sum_chunks(labels[1], is_other).gather(-1, places)
    if threshold is not None:
        one, two = close_chunks(one, behind[0], is_cut), close_chunks(two, other, is_cut)
    last = is_cut & (is_cut.flip(-1).cumsum(-1).flip(-1) == 1)
    return one, two, is_cut & ~last, is_cut & (is_cut.cumsum(-1) == 1) & ~last


def test_the_same_model_in_two_tokenizers_agrees_on_chunks_only_once_they_are_debiased():
    """The first chunk of a text, before which nothing was read, exactly; later ones more nearly."""
    texts, weights = distribution()
    far = {}
    for threshold in (None, 0.0, 0.3):
        one, two, counts, first = likelihoods(threshold)
        apart = (one - two).abs()
        assert int(first.sum()) > 300
        if threshold is None:
            of_ab = torch.tensor([text.startswith("ab") and not text.startswith("abc") for text in texts])
            assert float(apart[first & of_ab.unsqueeze(1)].min()) > 0.5
        else:
            torch.testing.assert_close(one[first], two[first], rtol=0, atol=1e-12)
        a_text = (apart * counts).sum(-1) / counts.sum(-1).clamp(min=1)
        far[threshold] = float((a_text * weights).sum())
    assert far[0.0] < far[None] / 2
    assert far[0.3] < 0.6 * far[0.0]  # what is left lies in what was read, of which a likely boundary tells less


# ---------------------------------------------------------------------- functions


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_tokens_of_a_boundary():
    tokens = [b"a", b" a", None, b"\tb", b"\n\n", b"a b", b"", b",", b"\xc2\xa0", b" "]
    assert boundary_tokens(tokens).tolist() == [1, 2, 3, 4, 9]
    assert boundary_tokens(tokens, 3).tolist() == [1, 2]


def test_boundary_probability_is_a_sum_of_the_softmax():
    logits, ids = 3 * draw(1, 4, 7), torch.tensor([0, 2, 5])
    torch.testing.assert_close(boundary_log_probs(logits, ids).exp(), logits.softmax(-1)[:, [0, 2, 5]].sum(-1))
    assert boundary_log_probs(logits.half(), ids).dtype == torch.float32


def test_a_boundary_that_is_ruled_out_leaves_loss_and_gradient_finite():
    logits = draw(2, 3, 5).masked_fill(torch.tensor([True, False, True, False, False]), -torch.inf).requires_grad_()
    values = boundary_log_probs(logits, torch.tensor([0, 2]))
    assert (values < -1e30).all()
    chunk_likelihood_loss(values - 1, torch.full((3,), -2.0, dtype=torch.float64), temperature=100.0).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("seed", range(5))
def test_merged_and_closed_chunks_by_loops(seed):
    """Chunks of a list of places: those that end at an unlikely boundary go on to the next end."""
    is_cut = draw(seed, 3, 12) > 0
    log_probs, labels = -draw(seed + 100, 3, 12).abs(), -draw(seed + 200, 3, 12).abs()
    behind = -draw(seed + 300, 3, 12).abs()
    kept = merge_cuts(is_cut, log_probs, threshold=0.5)
    found = close_chunks(sum_chunks(labels, kept), behind, kept)
    for row in range(3):
        cuts = is_cut[row].nonzero().flatten().tolist()
        expected = [t for i, t in enumerate(cuts) if i == 0 or math.exp(float(log_probs[row, t])) >= 0.5]
        assert kept[row].nonzero().flatten().tolist() == expected
        for begin, end in pairwise(expected):
            value = sum(labels[row, t] for t in range(begin, end)) + behind[row, end]
            torch.testing.assert_close(found[row, begin], value)
        assert float(found[row, expected[-1]]) == pytest.approx(float(labels[row, expected[-1] :].sum()))


def test_gradient_reaches_the_logits_of_the_pivot():
    logits, labels = draw(7, 2, 6, 9).requires_grad_(), torch.randint(9, (2, 6, 1))
    is_cut = torch.tensor([[True, False, True, True, False, True], [False, True, True, False, True, False]])
    counts = torch.tensor([[True, False, True, True, False, False], [False, True, True, False, False, False]])
    theirs = -draw(8, 2, 6).abs()

    def loss(logits):
        behind = boundary_log_probs(logits.flatten(0, 1), torch.tensor([1, 4, 8])).view(2, 6)
        own = sum_chunks(logits.log_softmax(-1).gather(-1, labels).squeeze(-1), is_cut)
        return chunk_likelihood_loss(close_chunks(own, behind, is_cut), theirs, counts, temperature=3.0)

    assert torch.autograd.gradcheck(loss, (logits,))


# ---------------------------------------------------------------------- the term of the module

PIVOT_WORDS = [None if i == 0 else b" x" if i % 3 == 0 else bytes([65 + i]) for i in range(PIVOT_SIZE)]
OTHER_WORDS = [None if i == 0 else b"\ny" if i % 4 == 0 else bytes([65 + i]) for i in range(OTHER_SIZE)]


def make_debiased(threshold=0.29, **kwargs):
    module = make(terms={"chunk": 1.0}, chunk_temperature=5.0, chunk_debias=threshold, **kwargs)
    module.pivot_tokens = PIVOT_WORDS
    module.sources["far"].tokens = OTHER_WORDS
    return module


def chunks_by_definition(module, batch, row, threshold):
    """The term of `far` for one sample, and its chunks before and after they are merged."""
    view = batch["sources"]["far"]
    own = module(batch["input_ids"], batch["attention_mask"])[row].log_softmax(-1)
    model = module.sources["far"].model
    theirs = model(input_ids=view["input_ids"], attention_mask=view["attention_mask"]).logits[row].log_softmax(-1)
    at = {int(view["response_ends"][row, u]): u for u in label_positions(view, row)}
    ends = {t: int(batch["response_ends"][row, t]) for t in label_positions(batch, row)}
    pairs = [(t, at[end]) for t, end in ends.items() if end in at]

    def behind(log_probs, t, words):
        return log_probs[t].exp()[[i for i, text in enumerate(words) if text is None or text[0] in b" \n"]].sum()

    kept = pairs[:1] + [(t, u) for t, u in pairs[1:] if behind(theirs, u, OTHER_WORDS) >= threshold]
    losses = []
    for (begin, source_begin), (end, source_end) in pairwise(kept):
        ell_p = sum(own[t, int(batch["labels"][row, t + 1])] for t in range(begin, end))
        ell_s = sum(theirs[u, int(view["labels"][row, u + 1])] for u in range(source_begin, source_end))
        ell_p = ell_p + behind(own, end, PIVOT_WORDS).log()
        ell_s = ell_s + behind(theirs, source_end, OTHER_WORDS).log()
        losses.append(coin(ell_p, float(ell_s), module.chunk_temperature))
    return sum(losses) / max(1, len(losses)), len(pairs) - 1, len(losses)


@pytest.mark.parametrize("chunk_size", [3, 4096])
@pytest.mark.parametrize("threshold", [0.0, 0.29])
def test_the_term_and_its_gradient_are_the_definition(threshold, chunk_size):
    module, batch = quiet(make_debiased(threshold)), make_batch()
    module.chunk_size = module.sources["far"].chunk_size = chunk_size
    losses = module.losses(batch)
    expected, sizes, kept = zip(*(chunks_by_definition(module, batch, r, threshold) for r in range(4)), strict=True)
    expected = torch.stack([torch.as_tensor(value) for value in expected])  # 0 where no chunk has an end
    torch.testing.assert_close(losses.terms["far"]["chunk"], expected, atol=1e-5, rtol=1e-4)
    assert float(losses.chunks["far"]) == pytest.approx(sum(kept) / sum(sizes))
    assert (sum(kept) < sum(sizes)) == (threshold > 0)
    parameters = list(module.parameters())
    grads = (torch.autograd.grad(values.sum(), parameters) for values in (losses.terms["far"]["chunk"], expected))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


def test_a_source_that_is_the_pivot_teaches_nothing():
    """It is laid out as another tokenizer's, so that its chunks are debiased."""
    batch = make_batch()
    batch["sources"]["far"] = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "response_ends")}
    pivot, twin = (make_model(0, PIVOT_SIZE) for _ in range(2))
    options = {"top_k": 4, "kd_weight": 1.0, "terms": {"chunk": 1.0}, "chunk_debias": 0.1}
    module = quiet(GLDFusionModule(pivot, {"far": twin}, **options))
    module.pivot_tokens = module.sources["far"].tokens = PIVOT_WORDS
    loss = module.training_step(batch, 0)
    assert float(module.losses(batch).chunks["far"]) > 0
    assert loss.item() == pytest.approx(0, abs=1e-6)
    for grad in torch.autograd.grad(loss, list(module.parameters())):
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-5, rtol=0)


def test_padding_and_split_change_nothing():
    module = quiet(make_debiased())

    def losses(*batches):
        return torch.cat([module.losses(batch).terms["far"]["chunk"].detach() for batch in batches])

    whole = losses(make_batch())
    torch.testing.assert_close(losses(make_batch(extra=5)), whole)
    torch.testing.assert_close(losses(*(make_batch([row]) for row in range(4))), whole)


def test_chunks_of_the_same_tokens_are_compared_as_they_are():
    """They say the same to begin with; no tokenizer of the source is asked for."""
    batch = make_batch()
    plain = quiet(make(terms={"chunk": {"near": 1.0}}, chunk_temperature=5.0)).losses(batch)
    debiased = quiet(make(terms={"chunk": {"near": 1.0}}, chunk_temperature=5.0, chunk_debias=0.1)).losses(batch)
    assert torch.equal(plain.terms["near"]["chunk"], debiased.terms["near"]["chunk"])
    assert plain.chunks == debiased.chunks == {}


def test_a_pivot_that_rules_a_boundary_out_still_learns_that_it_comes():
    """The source decides which chunks count: by the pivot's own probabilities those where it is wrong would not."""
    batch = make_batch([0])
    mask = batch["labels"][:, 1:] != -100
    ends = batch["response_ends"][:, :-1].masked_fill(~mask, -1)
    top = top_k_logits(torch.zeros(*mask.shape, 3), 1)
    theirs = torch.full(mask.shape, -0.5).masked_fill(~mask, 0.0)
    source = SourceLogits(top, mask, ends, theirs, theirs)
    behind = torch.full(mask.shape, -40.0).requires_grad_()
    options = {"temperature": 100.0, "same_tokens": False, "boundary_log_probs": behind, "threshold": 0.1}
    found = chunk_terms(theirs, source, align_source(source, mask, ends), **options)
    assert float(found.share) == 1
    found.losses.sum().backward()
    assert (behind.grad < 0).sum() == (ends >= 0).sum() - 1  # at each end of a chunk


def test_the_share_of_chunks_is_logged(tmp_path):
    _, trainer = fit(tmp_path, 2, make_debiased())
    assert 0 < float(trainer.logged_metrics["train/chunks/far"]) < 1
    assert "train/chunks/near" not in trainer.logged_metrics


# ---------------------------------------------------------------------- what is missing


@pytest.mark.parametrize("threshold", [-0.1, 1.0, math.nan])
def test_thresholds_out_of_range(threshold):
    with pytest.raises(ValueError, match=r"`chunk_debias` to be None or in \[0, 1\), but got"):
        make(chunk_debias=threshold)


@pytest.mark.parametrize(("whose", "match"), [("pivot", "the pivot"), ("far", "source 'far'")])
def test_tokens_that_are_not_known_or_begin_no_word_are_told(whose, match):
    sentences = {"unknown": f"know the tokenizer of {match}", "no words": f"Expected the tokenizer of {match}"}
    for tokens, sentence in ((None, sentences["unknown"]), ([b"a", b"b"], sentences["no words"])):
        module = make_debiased()
        if whose == "pivot":
            module.pivot_tokens = tokens
        else:
            module.sources["far"].tokens = tokens
        with pytest.raises(ValueError, match=rf"{sentence}.* [Ll]eave `chunk_debias` out"):
            module.losses(make_batch())


def test_a_cache_is_written_with_a_boundary_where_it_is_asked_for():
    """Also to predict, which asks for the tokenizer of every source before it runs one."""
    assert all("boundary" not in settings for settings in make().cache_settings.values())
    module = make_debiased()
    with pytest.raises(ValueError, match="to know the tokenizer of source 'near'"):
        _ = module.cache_settings
    module.sources["near"].tokens = PIVOT_WORDS
    assert all(settings["boundary"] for settings in module.cache_settings.values())
    found = module.predict_step(make_batch(), 0)["sources"]
    assert all(logits.boundary_log_probs is not None for logits in found.values())
    plain = make().predict_step(make_batch(), 0)["sources"]
    assert all(logits.boundary_log_probs is None for logits in plain.values())
