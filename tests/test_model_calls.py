"""Calling models of transformers: inputs that they know, and the key–value cache under whichever name.

Letters: B batch, T sequence, V vocabulary.
"""

import inspect

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MambaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lit_logits.modules.language_models.calls import (
    CACHE_NAMES,
    OUTPUT_CACHE_NAME,
    accepted_inputs,
    cache_argument,
    read_with_cache,
)

V = 50
LLAMA = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "llama": LLAMA,
    "gemma3_text": {**LLAMA, "sliding_window": 4},
    "gpt2": {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "bloom": {"vocab_size": V, "hidden_size": 16, "n_layer": 2, "n_head": 2},  # no position ids
    "mamba": {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},  # no positions, no length
    "falcon_mamba": {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "opt": {**LLAMA, "ffn_dim": 32, "word_embed_proj_dim": 16},  # position ids from the mask
}


# Before 5.24 the cache of mamba had a name of its own, and decoding with it is refused.
no_cache = not set(CACHE_NAMES) & set(inspect.signature(MambaForCausalLM.forward).parameters)


def make(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind])).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reading_on_with_a_cache_equals_reading_all(kind):
    if "mamba" in kind and no_cache:
        pytest.skip("this version of transformers names mamba's cache in another way")
    model = make(kind)
    ids, mask = torch.randint(3, V, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0  # left-padded
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    whole = model(**accepted_inputs(model, {**inputs, "use_cache": False})).logits[:, -1]
    cache, start = None, 0
    for end in (6, *range(7, 13)) if "mamba" in kind else (6, 7, 10, 12):  # a token and several at a time
        parts = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        output, cache = read_with_cache(model, parts, cache, num_read=end)
        start = end
    torch.testing.assert_close(output.logits[:, -1], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(no_cache, reason="this version of transformers names mamba's cache in another way")
@torch.no_grad()
def test_recurrent_models_read_one_token_at_a_time():
    model, ids = make("mamba"), torch.randint(3, V, (1, 6))
    _, cache = read_with_cache(model, {"input_ids": ids[:, :4]}, None, num_read=4)
    with pytest.raises(ValueError, match="Expected one token at a time for MambaForCausalLM"):
        read_with_cache(model, {"input_ids": ids[:, 4:], "attention_mask": torch.ones(1, 6)}, cache, num_read=6)


class _Remote(nn.Module):
    """A model of others, whose `forward` may have either name for the cache or none, and may forget the cache."""

    device = torch.device("cpu")

    def __init__(self, names=("past_key_values",), forgets=False, gives=True):
        super().__init__()
        self.inner, self.forgets, self.gives = make("llama"), forgets, gives
        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("input_ids", *names)]
        self.forward = self._read
        self._read.__func__.__signature__ = inspect.Signature([inspect.Parameter("self", 0), *parameters])  # type: ignore[attr-defined]

    def _read(self, input_ids=None, **given):
        cache = next((given[name] for name in CACHE_NAMES if name in given), None)
        cache = None if self.forgets else cache
        output = self.inner(input_ids=input_ids, use_cache=True, **cache_argument(self.inner, cache))
        return CausalLMOutputWithPast(
            logits=output.logits, **({OUTPUT_CACHE_NAME: output[OUTPUT_CACHE_NAME]} if self.gives else {})
        )


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_a_cache_goes_in_under_either_name(name):
    model, ids = _Remote([name]), torch.randint(3, V, (1, 5))
    assert cache_argument(model, 7) == {name: 7}
    _, cache = read_with_cache(model, {"input_ids": ids[:, :4]}, None, num_read=4)
    output, _ = read_with_cache(model, {"input_ids": ids[:, 4:]}, cache, num_read=5)
    torch.testing.assert_close(output.logits[:, -1], model.inner(ids).logits[:, -1])


@torch.no_grad()
def test_a_model_without_a_cache_or_that_forgets_it_is_refused():
    ids = torch.randint(3, V, (1, 5))
    with pytest.raises(ValueError, match=r"takes a key–value cache, as `cache` or `past_key_values`, but"):
        read_with_cache(_Remote(names=()), {"input_ids": ids}, None, num_read=5)
    with pytest.raises(ValueError, match="to give a key–value cache"):
        read_with_cache(_Remote(gives=False), {"input_ids": ids}, None, num_read=5)
    model = _Remote(forgets=True)
    _, cache = read_with_cache(model, {"input_ids": ids[:, :4]}, None, num_read=4)
    with pytest.raises(ValueError, match="to hold the 5 tokens that were read, but it holds 1"):
        read_with_cache(model, {"input_ids": ids[:, 4:]}, cache, num_read=5)


@torch.no_grad()
def test_a_cache_of_recurrent_layers_must_stay_the_same_object():
    """It cannot count its tokens, so only that tells that it was read."""

    class Recurrent(_Remote):
        def _read(self, input_ids=None, **given):
            cache = next(given[name] for name in CACHE_NAMES if name in given)
            fresh = cache is None or self.forgets
            return CausalLMOutputWithPast(logits=torch.zeros(1), **{OUTPUT_CACHE_NAME: [] if fresh else cache})

    for forgets in (False, True):
        model = Recurrent(forgets=forgets)
        _, cache = read_with_cache(model, {"input_ids": torch.ones(1, 4)}, None, num_read=4)
        if forgets:
            with pytest.raises(ValueError, match="but it holds those of the last call"):
                read_with_cache(model, {"input_ids": torch.ones(1, 1)}, cache, num_read=5)
        else:
            assert read_with_cache(model, {"input_ids": torch.ones(1, 1)}, cache, num_read=5)[1] is cache


@torch.no_grad()
def test_adapters_of_peft_pass_on_what_their_model_takes():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.randint(3, V, (2, 6))
    kept = accepted_inputs(model, {"input_ids": ids, "position_ids": ids, "logits_to_keep": 1, "unheard_of": 1})
    assert set(kept) == {"input_ids", "position_ids", "logits_to_keep"}
    _, cache = read_with_cache(model, {"input_ids": ids[:, :4]}, None, num_read=4)
    output, _ = read_with_cache(model, {"input_ids": ids[:, 4:]}, cache, num_read=6)
    torch.testing.assert_close(output.logits[:, -1], model(input_ids=ids).logits[:, -1], rtol=1e-4, atol=1e-5)
