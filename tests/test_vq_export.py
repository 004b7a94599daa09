"""Which backbones can be saved with a compressed head: told before training, and true afterwards.

Letters: V vocabulary.
"""

import functools
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.utils.generic import maybe_autocast

from lit_logits import VQLogitsLM
from lit_logits.callbacks import SavePretrained
from lit_logits.modules import DenseLogitsHead, VQLogitsHead
from lit_logits.modules.vq_logits.joining import export_problem

V = 50
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
LLAMA = {"model_type": "llama", **SIZES}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
HEAD = partial(VQLogitsHead, codebook_size=V, bias=False)
IDS = torch.arange(1, 6).unsqueeze(0)


def narrow_opt():
    config = OPTConfig(
        vocab_size=V,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
    )
    return OPTForCausalLM(config)


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def gemma3():
    text = {"vocab_size": V, "num_key_value_heads": 2, "head_dim": 8, **SIZES}
    tokens = {"image_token_index": 49, "boi_token_index": 48, "eoi_token_index": 47}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, **tokens)
    return Gemma3ForConditionalGeneration(config)


def llava():
    text = LlamaConfig(vocab_size=V, **SIZES)
    config = LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION), image_token_index=49)
    return LlavaForConditionalGeneration(config)


def model_of(backbone, head=HEAD):
    torch.manual_seed(0)
    backbone = backbone() if callable(backbone) else backbone
    return VQLogitsLM(backbone, V if isinstance(backbone, dict) else None, head=head).eval()


BOTH, COMPACT, DENSE = {"compact", "dense"}, {"compact"}, {"dense"}

BACKBONES = {
    "llama": (LLAMA, BOTH),
    "gpt2": ({"model_type": "gpt2", **GPT}, BOTH),
    "qwen3_moe": ({"model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1, **SIZES}, BOTH),
    "cohere": ({**LLAMA, "model_type": "cohere", "logit_scale": 0.0625}, BOTH),
    "gemma2": ({**LLAMA, "model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.1}, BOTH),
    "mamba": ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}, DENSE),
    "openai-gpt": ({"model_type": "openai-gpt", **GPT}, DENSE),
    "minimax": (
        {**LLAMA, "model_type": "minimax", "num_local_experts": 2, "head_dim": 8, "num_key_value_heads": 2},
        DENSE,
    ),
    "opt of another embedding width": (narrow_opt, DENSE),
    "gemma3 with images": (gemma3, DENSE),
    "llava": (llava, set()),
}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("form", ["compact", "dense"])
def test_what_is_told_before_training_holds_after_it(form, name, tmp_path):
    """Some saved folders could not be loaded, or not generate, and some models could not be saved after training."""
    backbone, works = BACKBONES[name]
    model = model_of(backbone)
    with torch.no_grad():
        model.head.codebook.mul_(20)
    sizes = {"hidden_size": model.head.hidden_size, "vocab_size": V}
    problem = export_problem(model.backbone, form, **sizes)
    assert (problem is None) == (form in works), problem
    if problem is not None:
        with pytest.raises(ValueError, match=r"^Expected a backbone (that|whose)") as caught:
            model.save_pretrained(tmp_path / "saved", form)
        assert str(caught.value) == problem
        return
    model.save_pretrained(tmp_path / "saved", form)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, model(IDS), atol=1e-4, rtol=1e-4)
        text = IDS
        for _ in range(3):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    loaded.generation_config.eos_token_id = loaded.config.eos_token_id = None
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(loaded.generate(IDS, attention_mask=torch.ones_like(IDS), **options), text)


def make_trainer(folder, **kwargs):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder, **quiet, **kwargs)


def told(recwarn):
    return [str(w.message) for w in recwarn if "cannot be saved" in str(w.message)]


def test_a_backbone_that_cannot_be_saved_is_told_when_the_model_is_made(recwarn):
    model_of(LLAMA)
    model_of(LLAMA, head=DenseLogitsHead)  # its bias is the user's choice
    assert told(recwarn) == []
    model_of(narrow_opt)
    (text,) = told(recwarn)
    assert text.startswith("This model trains, but cannot be saved with head='compact', only with head='dense':")
    assert "its config says (vocabulary, hidden size) (50, 32), and the head has (50, 16)" in text


def _meta_device_runs() -> bool:
    """Whether this transformers runs its models on the meta device, which torch's autocast does not know."""
    try:
        with maybe_autocast("meta", enabled=False):
            return True
    except RuntimeError:
        return False


@pytest.mark.skipif(not _meta_device_runs(), reason="this transformers runs no model on the meta device")
def test_a_prompt_and_then_a_token_are_tried(monkeypatch):
    """The head cannot look at its codes on the meta device, and its error ended the trial before the cache was read."""
    read, forward = [], LlamaModel.forward

    @functools.wraps(forward)  # its arguments are looked at
    def watched(self, *args, input_ids=None, **kwargs):
        read.append(input_ids.shape[1])
        return forward(self, *args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    model = LlamaModel(LlamaConfig(vocab_size=V, **SIZES))
    assert export_problem(model, "compact", hidden_size=32, vocab_size=V) is None
    assert read == [3, 1]


def test_changed_weights_of_a_backbone_are_told(recwarn):
    """Loading makes a backbone of its config, which does not tell of them."""
    changed = LlamaForCausalLM(LlamaConfig(vocab_size=V, **SIZES))
    changed.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48, bias=True)
    model_of(lambda: changed)
    (text,) = told(recwarn)
    assert "its config makes layers.0.mlp.up_proj.bias of shape None, not (48,)" in text


@pytest.mark.parametrize("form", ["compact", "dense"])
def test_the_callback_refuses_before_training(form, tmp_path):
    data = DataLoader([{"input_ids": IDS[0], "labels": IDS[0]}] * 4, batch_size=2)
    steps = []

    class Watched(VQLogitsLM):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    model = Watched(llava(), head=HEAD)
    trainer = make_trainer(tmp_path, callbacks=[SavePretrained(str(tmp_path / "saved"), head=form)])
    with pytest.raises(ValueError, match=f"for (the rows of )?head='{form}', but LlavaModel does not"):
        trainer.fit(model, data)
    assert steps == []
    make_trainer(tmp_path).fit(model, data)  # training alone is fine
    assert len(steps) == 2
