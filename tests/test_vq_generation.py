"""`VQLogitsLM.generate` against a loop over full logits: padding, ends, samples, and the mode of the model."""

import pytest
import torch
from tiny_vq_models import make_model, pretrained, rows


@pytest.fixture(params=["llama", "gpt2"])
def generator_model(request, tmp_path):
    """A model whose logits differ clearly, so that greedy decoding has no near ties."""
    backbone = None if request.param == "llama" else str(tmp_path)
    if backbone:
        pretrained("gpt2", tmp_path)
    model = make_model(backbone, codebook_size=20, init="random").eval()
    with torch.no_grad():
        model.head.codebook.normal_()
        model.head.token_bias.normal_()
        for parameter in model.backbone.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def by_hand(model, ids, steps):
    """Full logits of the whole sequence for each new token: no cache, no tables."""
    for _ in range(steps):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def test_generation_with_a_cache_equals_a_loop_over_full_logits(generator_model):
    prompts = torch.stack([row["input_ids"][:5] for row in rows(6)])
    generated = generator_model.generate(prompts, max_new_tokens=9)
    assert torch.equal(generated, by_hand(generator_model, prompts, 9))
    assert generated[:, 5:].unique().numel() > 3  # not a constant
    assert torch.equal(generator_model.generate(prompts, max_new_tokens=0), prompts)


def test_left_padded_prompts_equal_one_by_one(generator_model):
    prompts = [row["input_ids"][:n] for row, n in zip(rows(4), (2, 7, 5, 1), strict=True)]
    ids, mask = torch.zeros(4, 7, dtype=torch.long), torch.zeros(4, 7, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, 7 - len(prompt) :], mask[i, 7 - len(prompt) :] = prompt, 1
    together = generator_model.generate(ids, mask, max_new_tokens=8)
    for i, prompt in enumerate(prompts):
        assert torch.equal(together[i, 7:], by_hand(generator_model, prompt[None], 8)[0, len(prompt) :])


def test_right_padded_prompts_are_refused(generator_model):
    """New tokens followed the padding."""
    ids, mask = torch.zeros(2, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with pytest.raises(ValueError, match="to be padded on the left, as new tokens follow the last one, but 1 of 2"):
        generator_model.generate(ids, mask, max_new_tokens=2)


def test_generation_is_without_dropout_and_restores_the_mode():
    model = make_model(backbone={"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.9})
    ids = torch.arange(6).view(2, 3)
    texts = [model.train().generate(ids, max_new_tokens=8) for _ in range(4)]
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert model.training


def test_generation_stops_when_all_texts_have_ended(generator_model):
    ids = torch.arange(8).view(2, 4)
    free = generator_model.generate(ids, max_new_tokens=12)
    eos = int(free[0, 6])
    ended = generator_model.generate(ids, max_new_tokens=12, eos_token_id=eos)
    lengths = []
    for row, full in zip(ended.tolist(), free.tolist(), strict=True):
        new, wanted = row[4:], full[4:]
        stop = wanted.index(eos) + 1 if eos in wanted else len(wanted)
        lengths.append(stop)
        assert new[: min(stop, len(new))] == wanted[: min(stop, len(new))]
        assert set(new[stop:]) <= {eos}
    assert ended.shape[1] == 4 + max(lengths)


def test_sampled_generation_follows_the_generator(generator_model):
    prompts = torch.stack([row["input_ids"][:5] for row in rows(6)])
    texts = [
        generator_model.generate(
            prompts, max_new_tokens=9, temperature=1.0, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
