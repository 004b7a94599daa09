"""The forms in which fused models take prompts, too long ones, and samples that a resumed run repeats."""

import copy
from functools import partial

import pytest
import tiny_llamas
import torch
from tiny_llamas import moved
from transformers import BatchEncoding, GenerationConfig

from lit_logits import DynamicFusionDecoder
from lit_logits.functional import fusion_weights

VOCAB, PAD = 48, 0


llama = partial(tiny_llamas.llama, vocab_size=VOCAB, pad_token_id=PAD, max_position_embeddings=32)


def decoder(large=None, **kwargs):
    base = llama(1)
    return DynamicFusionDecoder(large or llama(0, hidden=32), base, [moved(base, 2)], **kwargs)


IDS = torch.tensor([[3, 4, 5, 6], [0, 7, 8, 9]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])


def test_prompts_come_in_the_forms_of_transformers():
    model = decoder()
    expected = model.generate(IDS, MASK, max_new_tokens=4)
    encoded = BatchEncoding({"input_ids": IDS, "attention_mask": MASK})
    assert torch.equal(model.generate(encoded, max_new_tokens=4), expected)
    assert torch.equal(model.generate(**encoded, max_new_tokens=4), expected)
    assert torch.equal(model.generate(inputs=IDS, attention_mask=MASK, max_new_tokens=4), expected)
    config = GenerationConfig(max_new_tokens=4, pad_token_id=PAD)
    assert torch.equal(model.generate(encoded, generation_config=config), expected)
    assert torch.equal(model.generate(IDS[:1], config), model.generate(IDS[:1], max_new_tokens=4))
    for none in ({}, {"input_ids": IDS, "inputs": IDS}):
        with pytest.raises(ValueError, match="Expected prompts as `input_ids` or as `inputs`, but got"):
            model.generate(**none, max_new_tokens=4)


def test_right_padded_prompts_are_refused():
    with pytest.raises(ValueError, match="padded on the left, as new tokens follow the last one, but 1 of 2 end"):
        decoder().generate(IDS.flip(1), MASK.flip(1), max_new_tokens=2)


def test_a_text_that_is_too_long_is_named():
    model = decoder()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :20] = 0
    ids = torch.full((2, 40), 3)
    with pytest.raises(
        ValueError, match=r"at most 32 tokens, the context of the large model, but text 1 of the batch has 40\."
    ):
        model.score(ids, ids, mask)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_stretched_positions_reach_further(kind):
    scaled = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    large = llama(0, hidden=32, rope_parameters=scaled)
    base = llama(1, max_position_embeddings=64)
    ids = torch.full((1, 40), 3)
    model = DynamicFusionDecoder(large, base, [copy.deepcopy(base)])
    assert model.score(ids, ids).log_probs.shape == (1, 39)
    with pytest.raises(ValueError, match="at most 64 tokens"):
        model.score(torch.full((1, 70), 3), torch.full((1, 70), 3))


@pytest.mark.parametrize("own", [{"num_beams": 4}, {"cache_implementation": "static"}])
def test_what_a_config_says_of_decoding_is_no_matter_to_scores(own):
    large = llama(0, hidden=32)
    expected = decoder(copy.deepcopy(large)).score(IDS, IDS, MASK).log_probs
    large.generation_config.update(**own)
    model = decoder(large)
    torch.testing.assert_close(model.score(IDS, IDS, MASK).log_probs, expected)
    with pytest.raises(ValueError, match="Expected"):
        model.generate(IDS, MASK, max_new_tokens=2)
    with pytest.raises(ValueError, match="Expected"):
        decoder(generation=own)


def test_samples_of_a_batch_do_not_depend_on_those_before_it():
    model = decoder(generation={"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": True})
    model.tokenizer = Words()
    batches = [{"input_ids": IDS, "attention_mask": MASK, "rows": torch.tensor([n, n + 1])} for n in (0, 2, 4)]
    torch.manual_seed(0)
    whole = [model.predict_step(batch, 0) for batch in batches]
    torch.manual_seed(0)
    assert model.predict_step(batches[2], 0) == whole[2]
    assert [record["text"] for record in whole[0]] != [record["text"] for record in whole[1]]
    torch.manual_seed(1)
    assert model.predict_step(batches[2], 0) != whole[2]


class Words:
    pad_token_id = PAD

    def decode(self, ids, **_):
        return " ".join(map(str, torch.as_tensor(ids).tolist()))

    def convert_ids_to_tokens(self, ids):
        return [str(number) for number in ids]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shifts", [(0, 1e4, -1e4), (0, 1e4, 0), (1e4, 0, 1e4)])
def test_a_constant_on_all_logits_of_a_model_is_no_matter(shifts, seed):
    """Of the difference of two numbers near 1e4 float32 keeps three digits, which cost up to 0.004 of α."""
    g = torch.Generator().manual_seed(seed)
    large, base = 2 * torch.randn(2, 4, 600, generator=g)
    expert = base + torch.randn(1, 4, 600, generator=g)
    given = [logits + shift for logits, shift in zip((large, base, expert), shifts, strict=True)]
    exact = fusion_weights(*(logits.double() for logits in given)).alpha
    torch.testing.assert_close(fusion_weights(*given).alpha, exact.float(), rtol=0, atol=2e-4)
