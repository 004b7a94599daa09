"""Drafted tokens: an assistant is ahead, and the fused distribution has the last word."""

import copy
from functools import partial

import pytest
import tiny_llamas
import torch
import transformers
from packaging.version import Version
from tiny_llamas import llama_settings, moved
from transformers import MistralConfig, MistralForCausalLM

from lit_logits import DynamicFusionDecoder

VOCAB = 40
IDS = torch.tensor([[3, 4, 5, 6, 3, 4, 5]])


ENDLESS = {"num_hidden_layers": 2, "eos_token_id": None, "bos_token_id": None}
llama = partial(tiny_llamas.llama, **ENDLESS)


def windowed(seed):
    """A model that sees the last five tokens only, whose cache forgets the others."""
    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(**llama_settings(**ENDLESS), sliding_window=5)).eval()


def decoder(make=llama, **kwargs):
    base = make(1)
    return DynamicFusionDecoder(moved(base, 5, 0.03), base, [moved(base, 2, 0.05), moved(base, 3, 0.05)], **kwargs)


@pytest.mark.parametrize("draft", ["base", "expert", "stranger", "looked up"])
@pytest.mark.parametrize(
    ("make", "arguments"), [(llama, {}), (llama, {"criterion": "prompt", "mode": "joint"}), (windowed, {})]
)
def test_drafted_texts_are_those_without_drafts(make, arguments, draft):
    """Token for token, with the same weights: caches of base and experts drop what the large model does not keep."""
    if (make is windowed or draft == "looked up") and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("5.3 cannot shorten a cache with a window, and looks tokens up only where there is an end token")
    model = decoder(make, **arguments)
    asked = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    plain = model.generate(IDS, **asked, trace_logits=3)
    helpers = {"base": model.fused.base, "expert": copy.deepcopy(model.fused.experts[0]), "stranger": llama(9)}
    reads = []
    handle = model.fused.experts[0].register_forward_hook(lambda *call: reads.append(call[-1].logits.shape[1]))
    how = {"prompt_lookup_num_tokens": 3} if draft == "looked up" else {"assistant_model": helpers[draft]}
    found = model.generate(IDS, **asked, **how, trace_logits=3)
    handle.remove()
    assert torch.equal(found.sequences, plain.sequences)
    for one, other in zip(found.trace, plain.trace, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.top_tokens.log_probs, plain.top_tokens.log_probs, rtol=0, atol=1e-4)
    assert max(reads) > 1  # several tokens at a time
    if draft in ("base", "expert"):
        assert len(reads) < 20


def test_sampled_drafts_follow_the_fused_distribution():
    """The first token of many texts, beside its exact probabilities; what drafts, the base, has others."""
    base = llama(1, vocab_size=4)
    model = DynamicFusionDecoder(llama(0, vocab_size=4), base, [moved(base, 2, 0.2)])
    ids = torch.tensor([[1, 2]])
    exact, drafted = model(ids)[0, -1].softmax(-1), base(ids).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    base.generation_config.num_assistant_tokens_schedule = "constant"
    draw = {"max_new_tokens": 2, "do_sample": True, "assistant_model": base, "pad_token_id": 0, "top_k": 0}
    first = torch.cat([model.generate(ids, **draw)[:, 2] for _ in range(200)])
    shares = torch.bincount(first, minlength=4) / len(first)
    assert (exact - drafted).abs().sum() / 2 > 0.2
    assert (exact - shares).abs().sum() / 2 < 0.1


def test_drafts_are_for_one_prompt():
    model = decoder()
    for drafts in ({"assistant_model": model.fused.base}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match=r"Expected one prompt at a time and a cache .* but got 2 prompts"):
            model.generate(IDS.repeat(2, 1), max_new_tokens=4, **drafts)
        with pytest.raises(ValueError, match=r"Expected one prompt at a time and a cache .* but got use_cache=False"):
            model.generate(IDS, max_new_tokens=4, use_cache=False, **drafts)


def test_a_negative_number_of_traced_tokens_is_refused():
    with pytest.raises(ValueError, match="Expected `trace_logits` to be at least 0, but got -1"):
        decoder().generate(IDS, max_new_tokens=4, trace_logits=-1)
