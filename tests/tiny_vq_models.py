"""`VQLogitsLM` on Llamas of one narrow layer, sequences that it can learn, and the Trainer that tests run it under.

Letters: T sequence, V vocabulary.
"""

import inspect
from functools import partial

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lit_logits.modules import VQLogitsHead
from lit_logits.vq_logits import VQLogitsLM

__all__ = [
    "ADAM",
    "CONFIG",
    "HEAD_ARGUMENTS",
    "Losses",
    "T",
    "V",
    "assert_same_state",
    "loader",
    "make_model",
    "make_trainer",
    "pretrained",
    "rows",
]

V, T = 61, 12
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
ADAM = partial(torch.optim.Adam, lr=0.01)


def rows(count=16, seed=0, ragged=False):
    """Sequences of a noisy cycle, so that there is something to learn; ragged: padding and ignored labels."""
    g = torch.Generator().manual_seed(seed)
    starts = torch.randint(V, (count, 1), generator=g)
    ids = (starts + 3 * torch.arange(T)) % V
    noise = torch.rand(ids.shape, generator=g) < 0.1
    ids = torch.where(noise, torch.randint(V, ids.shape, generator=g), ids)
    data = []
    for row in ids:
        item = {"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)}
        if ragged:
            length = int(torch.randint(3, T + 1, (), generator=g))
            item["attention_mask"][length:] = 0
            item["labels"][length:] = -100
            item["labels"][torch.rand(T, generator=g) < 0.2] = -100
        data.append(item)
    return data


def loader(count=16, batch_size=4, **kwargs):
    return DataLoader(rows(count, **kwargs), batch_size=batch_size)


HEAD_ARGUMENTS = inspect.signature(VQLogitsHead).parameters.keys()


def make_model(backbone=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    settings = {"optimizer": ADAM, "calibration_batches": 3, **kwargs}
    if "head" not in settings:
        own = {name: settings.pop(name) for name in HEAD_ARGUMENTS & settings.keys()}
        settings["head"] = partial(VQLogitsHead, **{"codebook_size": 8, "reassign_every_n_steps": 2, **own})
    plain = backbone is None
    return VQLogitsLM(CONFIG if plain else backbone, V if plain else None, **settings)


def make_trainer(tmp_path, **kwargs):
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**settings, **kwargs})


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.values.append(outputs["loss"].item())


def pretrained(kind, path):
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=64, **ids))
    else:
        config = {name: value for name, value in CONFIG.items() if name != "model_type"}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=V, tie_word_embeddings=kind == "tied", **config, **ids))
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    model.save_pretrained(path)
    return model
