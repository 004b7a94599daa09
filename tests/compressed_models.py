"""A small pretrained Llama, and `VQLogitsLM` that compresses it with residual codes."""

import inspect
from functools import partial

import pytest
import torch
from tiny_vq_models import V, loader
from transformers import LlamaConfig, LlamaForCausalLM

from lit_logits import VQLogitsLM
from lit_logits.modules import ResidualVQLogitsHead, VQLogitsHead

__all__ = ["CODES", "HEAD_ARGUMENTS", "compress", "started_model", "trained_folder"]

CODES = {"codebook_size": 8, "num_groups": 4, "num_stages": {20: 2, 61: 1}, "bias": False, "calibration_batches": 3}


@pytest.fixture(name="folder")
def trained_folder(tmp_path):
    """A small pretrained model, trained a little, so that its logits say something."""
    path = tmp_path / "original"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=V - 1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(15):
        for batch in loader(32, 16):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(path)
    return str(path)


HEAD_ARGUMENTS = inspect.signature(ResidualVQLogitsHead).parameters.keys()


def compress(folder, seed=0, **kwargs):
    torch.manual_seed(seed)
    settings = {**CODES, "kd_weight": 1.0, "optimizer": partial(torch.optim.Adam, lr=0.003), **kwargs}
    if "head" not in settings:
        is_single = (settings["num_groups"], settings["num_stages"]) == (1, 1)
        head, kept = (VQLogitsHead, {"codebook_size", "bias"}) if is_single else (ResidualVQLogitsHead, None)
        own = {name: settings.pop(name) for name in HEAD_ARGUMENTS & settings.keys()}
        settings["head"] = partial(head, **{name: value for name, value in own.items() if not kept or name in kept})
    return VQLogitsLM(folder, **{name: value for name, value in settings.items() if name not in HEAD_ARGUMENTS})


@pytest.fixture(name="started")
def started_model(folder):
    """A compressed model as it starts."""
    model = compress(folder)
    model.initialize_head(loader())
    return model.eval()
