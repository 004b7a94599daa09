"""Criteria in use by fused models, and whose forwards are fused; loops over the definition as oracles."""

import threading
from functools import partial

import pytest
import tiny_llamas
import torch
from tiny_llamas import moved
from transformers import LogitsProcessor, LogitsProcessorList

from lit_logits import DynamicFusionDecoder
from lit_logits.functional import fuse_logits, fusion_weights, prompt_fusion_weights

VOCAB, PAD = 48, 0
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": PAD}


llama = partial(tiny_llamas.llama, vocab_size=VOCAB, num_hidden_layers=2, pad_token_id=PAD)


@pytest.fixture(scope="module")
def parts():
    base = llama(1)
    return llama(0, hidden=32), base, [moved(base, 2), moved(base, 3)]


@pytest.fixture(scope="module")
def texts():
    """Ids with padding on the left, their mask, and labels from the sixth token on."""
    ids = torch.randint(3, VOCAB, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = PAD, 0
    return ids, mask, ids.masked_fill(torch.arange(10) < 5, -100)


def logits_of(parts, ids, mask):
    large, base, experts = parts
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = [model(ids, attention_mask=mask, position_ids=positions).logits for model in (large, base, *experts)]
    return found[0], found[1], torch.stack(found[2:])


def prompt_weights(parts, ids, mask, length):
    """The weights of each text on its own, from its first `length` tokens."""
    found = []
    for row in range(len(ids)):
        large, base, experts = logits_of(parts, ids[row : row + 1], mask[row : row + 1])
        start = int((mask[row] == 0).sum())
        at = slice(start, length - 1)
        labels = ids[row, start + 1 : length]
        found.append(prompt_fusion_weights(large[0, at], base[0, at], experts[:, 0, at], labels)[:, 0])
    return torch.stack(found, 1)


def test_one_weight_a_text_from_its_prompt(parts, texts):
    ids, mask, labels = texts
    decoder = DynamicFusionDecoder(*parts, criterion="prompt")
    alpha = prompt_weights(parts, ids, mask, 5)
    assert len(alpha.unique()) > 2
    scores = decoder.score(ids, labels, mask)
    own = scores.trace.alpha[..., 4:]
    torch.testing.assert_close(own, alpha.unsqueeze(-1).expand_as(own), rtol=0, atol=1e-3)
    large, base, experts = logits_of(parts, ids, mask)
    for position in range(4, 9):
        fused = fuse_logits(large[:, position], base[:, position], experts[:, :, position], alpha).log_softmax(-1)
        expected = fused.gather(1, ids[:, position + 1 :][:, :1]).squeeze(1)
        torch.testing.assert_close(scores.log_probs[:, position], expected, rtol=1e-3, atol=1e-3)


def test_generate_takes_the_weight_of_its_prompt(parts, texts):
    ids, mask, _ = texts
    decoder = DynamicFusionDecoder(*parts, criterion="prompt")
    alpha = prompt_weights(parts, ids[:, :5], mask[:, :5], 5)
    trace = decoder.generate(ids[:, :5], mask[:, :5], **GREEDY, return_dict_in_generate=True).trace
    torch.testing.assert_close(trace.alpha, alpha.unsqueeze(-1).expand_as(trace.alpha), rtol=0, atol=1e-3)
    torch.manual_seed(0)
    samples = {**GREEDY, "do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True}
    trace = decoder.generate(ids[:, :5], mask[:, :5], **samples).trace
    torch.testing.assert_close(trace.alpha[..., 0], alpha.repeat_interleave(2, 1), rtol=0, atol=1e-3)


def test_a_prompt_of_one_token_moves_the_large_model_as_far_as_the_experts_moved(parts, texts):
    ids, mask, labels = texts
    decoder = DynamicFusionDecoder(*parts, criterion="prompt")
    only = labels.clone()
    only[2] = ids[2]  # a text without prompt
    scored = decoder.score(ids, only, mask).trace
    generated = decoder.generate(ids[:, :1], **GREEDY, return_dict_in_generate=True).trace
    for found in (scored.alpha[:, 2], *generated.alpha.unbind(1)):
        assert found[0].unique().tolist() == [1.0]
        assert found[1].unique().tolist() == [0.0]  # one expert acts
    jointly = DynamicFusionDecoder(*parts, criterion="prompt", mode="joint")
    assert jointly.score(ids, only, mask).trace.alpha[:, 2].unique().tolist() == [1.0]


def test_forward_takes_the_whole_text_for_the_prompt(parts, texts):
    ids, mask, _ = texts
    decoder = DynamicFusionDecoder(*parts, criterion="prompt")
    large, base, experts = logits_of(parts, ids, mask)
    alpha = prompt_weights(parts, ids, mask, 10)
    fused = decoder(ids, mask)
    for position in range(4, 10):
        expected = fuse_logits(large[:, position], base[:, position], experts[:, :, position], alpha)
        torch.testing.assert_close(fused[:, position], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("search", [{"criterion": "equal"}, {"criterion": "uncertain"}, {"scale": 0.5}])
def test_arguments_reach_the_search(search, parts, texts):
    ids, mask, labels = texts
    decoder = DynamicFusionDecoder(*parts, **search)
    large, base, experts = (value[..., 6, :] for value in logits_of(parts, ids, mask))
    expected = fusion_weights(large, base, experts, **search).alpha
    torch.testing.assert_close(decoder.score(ids, labels, mask).trace.alpha[..., 6], expected, rtol=1e-3, atol=1e-3)
    for name, value in search.items():
        assert decoder.prediction_settings[name] == value


def test_what_does_not_go_together_is_refused(parts):
    with pytest.raises(ValueError, match="Expected no `min_entropy` with criterion='prompt'"):
        DynamicFusionDecoder(*parts, criterion="prompt", min_entropy=0.5)
    with pytest.raises(ValueError, match="Expected `criterion` to be one of"):
        DynamicFusionDecoder(*parts, criterion="best")
    with pytest.raises(ValueError, match="Expected `scale`"):
        DynamicFusionDecoder(*parts, scale=-1.0)


# ---------------------------------------------------------------------- whose forwards are fused


@pytest.mark.parametrize("use_cache", [True, False])
def test_other_threads_have_the_large_model_for_themselves(parts, texts, use_cache):
    """A plain `generate` beside the decoder's got fused logits, and the decoder died of a KeyError."""
    ids = texts[0][:, 5:]
    decoder = DynamicFusionDecoder(*parts, static_alpha=[2.0, 2.0])
    settings = {**GREEDY, "max_new_tokens": 20, "min_new_tokens": 20, "use_cache": use_cache}
    plain, fused = parts[0].generate(ids, **settings), decoder.generate(ids, **settings)
    assert not torch.equal(plain, fused)
    found = {}

    def run(number):
        model = decoder if number % 2 else parts[0]
        found[number] = model.generate(ids, **settings)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(6):
        assert torch.equal(found[number], fused if number % 2 else plain), number


class Reads(LogitsProcessor):
    """Asks the large model about the same text, as classifier-free guidance does."""

    def __init__(self, model, *, use_cache):
        self.model, self.use_cache, self.seen = model, use_cache, []

    def __call__(self, input_ids, scores):
        self.seen.append(self.model(input_ids, use_cache=self.use_cache).logits[:, -1])
        return scores


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_processor_that_calls_the_large_model_sees_it_as_it_is(parts, texts, use_cache):
    ids = texts[0][:1, 5:]
    decoder = DynamicFusionDecoder(*parts, static_alpha=[2.0, 2.0])
    reads = Reads(parts[0], use_cache=use_cache)
    output = decoder.generate(ids, **GREEDY, logits_processor=LogitsProcessorList([reads]))
    assert torch.equal(output, decoder.generate(ids, **GREEDY))
    assert len(reads.seen) == 6
    for number, seen in enumerate(reads.seen):
        with torch.no_grad():
            torch.testing.assert_close(seen, parts[0](output[:, : 5 + number]).logits[:, -1], rtol=1e-4, atol=1e-4)
