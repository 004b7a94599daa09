"""Fused models make logits where they are needed, not at every position of a prompt."""

from functools import partial

import pytest
import tiny_llamas
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lit_logits.modules.dynamic_fusion.reading import logits_at

VOCAB = 40


llama = partial(tiny_llamas.llama, initializer_range=0.4, max_position_embeddings=32)

IDS = torch.randint(1, VOCAB, (3, 9), generator=torch.Generator().manual_seed(4))
MASK = torch.tensor([[1] * 9, [0] * 2 + [1] * 7, [1] * 6 + [0] * 3])
LABELS = IDS.masked_fill((MASK == 0) | (torch.arange(9) < 4), -100)


def gpt2():
    torch.manual_seed(5)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()


@pytest.mark.parametrize("make", [lambda: llama(0), gpt2])
def test_logits_are_made_where_rows_are(make):
    """Prompts are most of many batches, and an output layer is half of a small model."""
    model, keep = make(), LABELS != -100
    whole = model(IDS, attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp(min=0)).logits
    made = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *call: made.append(call[-1].shape))
    [rows] = logits_at([model], IDS, MASK, keep, VOCAB - 3)
    handle.remove()
    torch.testing.assert_close(rows, whole[keep][:, : VOCAB - 3])
    assert made == [(3, 5, VOCAB)]


class LastOnly(LlamaForCausalLM):
    """A forward that takes a number of last positions, no index, as some models have it."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=False, logits_to_keep: int = 0):
        assert isinstance(logits_to_keep, int)
        return super().forward(input_ids, attention_mask, position_ids)


def test_models_that_take_no_positions_make_all_logits():
    model = LastOnly(llama(0).config).eval()
    keep = LABELS != -100
    [rows] = logits_at([model], IDS, MASK, keep, VOCAB)
    whole = model(IDS, attention_mask=MASK, position_ids=(MASK.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(rows, whole[keep])
