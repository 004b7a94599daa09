"""Llamas of one narrow layer that tests make in milliseconds: random, but far from uniform."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["llama", "llama_settings", "moved"]


def llama_settings(hidden: int = 16, **settings: Any) -> dict[str, Any]:
    """Settings of a config, 40 tokens and one layer where nothing else is said."""
    defaults: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "max_position_embeddings": 64,
    }
    return {**defaults, **settings}


def llama(seed: int, hidden: int = 16, **settings: Any) -> LlamaForCausalLM:
    """A model of these weights, in evaluation."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**llama_settings(hidden, **settings))).eval()


def moved(model: nn.Module, seed: int, by: float = 0.1) -> Any:
    """A descendant of a model: its weights with noise."""
    torch.manual_seed(seed)
    child = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in child.parameters():
            parameter += by * torch.randn_like(parameter)
    return child
