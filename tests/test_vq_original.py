"""The original model that a compressed one imitates: what is frozen, what both share, and what a checkpoint holds.

Letters: T sequence, V vocabulary.
"""

import copy
from functools import partial

import pytest
import torch
from compressed_models import compress, trained_folder  # noqa: F401  # fixtures by name
from tiny_vq_models import T, V, loader, make_trainer, pretrained
from transformers import AutoModelForCausalLM

from lit_logits import VQLogitsLM
from lit_logits.modules import OriginalOutput


def test_the_original_stays_as_it_was_and_out_of_the_checkpoint(folder, tmp_path):
    model = compress(folder)
    (held,) = model.original._held
    weights, table = copy.deepcopy(held.state_dict()), model.original._rows.weight.clone()
    before = model.backbone.get_input_embeddings().weight.detach().clone()
    trainer = make_trainer(tmp_path)
    trainer.fit(model, loader())
    assert not torch.equal(model.backbone.get_input_embeddings().weight, before)
    assert torch.equal(model.original._rows.weight, table)
    for name, tensor in held.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert not held.training
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if name.startswith("original")]
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size == sum(p.numel() for p in model.backbone.parameters()) + 2 * 8 * 16


def test_a_frozen_backbone_serves_as_the_original(folder, tmp_path):
    model = compress(folder, num_trainable_layers=0, optimizer=partial(torch.optim.Adam, lr=0.01))
    before = copy.deepcopy(model.backbone.state_dict())
    codes = None
    trainer = make_trainer(tmp_path, max_epochs=3)
    model.initialize_head(loader(64))
    codes = model.head.codebook.detach().clone()
    start = trainer.validate(model, loader(), verbose=False)[0]["val/kl"]
    trainer.fit(model, loader(64))
    assert trainer.validate(model, loader(), verbose=False)[0]["val/kl"] < start
    assert not torch.equal(model.head.codebook, codes)
    assert not model.original._held
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_last_layers_are_trained_and_the_others_shared_with_the_original(folder, tmp_path):
    model = compress(folder, num_trainable_layers=1)
    trained = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"layers", "norm"}
    assert {name.split(".")[1] for name in trained if name.startswith("layers")} == {"1"}
    (held,) = model.original._held
    before = copy.deepcopy(model.backbone.state_dict())
    make_trainer(tmp_path).fit(model, loader())
    theirs = dict(held.named_parameters())
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
        assert (theirs[name] is parameter) == (name not in trained)
        assert torch.equal(theirs[name], before[name])


def test_what_is_shared_with_the_original_runs_once(folder):
    model = compress(folder, num_trainable_layers=1)
    model.initialize_head(loader())
    (held,) = model.original._held
    with torch.no_grad():  # the last layers differ, as after some training
        for parameter in model.backbone.layers[1].parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    runs = []
    for layers in (model.backbone.layers, held.layers):
        for layer in layers:
            layer.mlp.register_forward_hook(lambda module, *_: runs.append(module))
    batch = next(iter(loader()))
    once, _ = model._losses(batch, model.original)
    layers = [*model.backbone.layers, *held.layers]
    assert [layers.index(next(layer for layer in layers if layer.mlp is run)) for run in runs] == [0, 1, 3]
    model.original.num_shared_layers = 0
    twice, _ = model._losses(batch, model.original)
    assert len(runs) == 3 + 4
    for one, other in zip(once, twice, strict=True):
        assert torch.equal(one, other)
    assert once.divergence.max() > 1e-3


def test_the_layers_of_the_original_run_where_the_models_run_failed(folder):
    model = compress(folder, num_trainable_layers=1)
    with pytest.raises(IndexError), model.original.sharing_layers(model.backbone):
        model.hidden_states(torch.tensor([[V + 1]]))
    ids = torch.randint(V, (2, T))
    with model.original.sharing_layers(model.backbone):  # nothing has run, so nothing is gone on from
        hidden = model.original.target(torch.zeros(0), input_ids=ids).hidden
    torch.testing.assert_close(hidden, model.hidden_states(ids).detach())
    with model.original.sharing_layers(model.backbone):
        model.hidden_states(ids)
    other = torch.randint(V, (2, T))  # what has run before is forgotten
    hidden = model.original.target(torch.zeros(0), input_ids=other).hidden
    torch.testing.assert_close(hidden, model.hidden_states(other).detach())


def test_layers_that_read_more_than_the_one_before_are_not_shared(folder, monkeypatch):
    """As those of models that share keys and values among layers."""
    layer_class = type(AutoModelForCausalLM.from_pretrained(folder).model.layers[0])
    forward, kept = layer_class.forward, []

    def remembers(layer, hidden, **kwargs):
        if layer.self_attn.layer_idx == 0:
            kept.append(hidden)
            return forward(layer, hidden, **kwargs)
        return forward(layer, hidden + kept.pop(), **kwargs)

    assert compress(folder, num_trainable_layers=1).original.num_shared_layers == 1
    monkeypatch.setattr(layer_class, "forward", remembers)
    assert compress(folder, num_trainable_layers=1).original.num_shared_layers == 0


def test_what_is_frozen_drops_nothing(tmp_path):
    pretrained("gpt2", tmp_path / "dropout")
    model = compress(str(tmp_path / "dropout"), num_trainable_layers=1).train()
    assert model.backbone.drop.p > 0
    assert not model.backbone.drop.training
    *first, last = model.backbone.h
    assert last.mlp.dropout.training
    assert not any(layer.mlp.dropout.training for layer in first)
    assert model.original.num_shared_layers == len(first) > 0
    by_hand = AutoModelForCausalLM.from_pretrained(tmp_path / "dropout").requires_grad_(False)
    assert not compress(by_hand).train().backbone.drop.training


@pytest.mark.parametrize("layers", [0, 1])
def test_the_original_is_the_original_after_a_checkpoint_of_other_trained_layers(folder, tmp_path, layers):
    """What is frozen now was trained then; it was shared with the original, which the checkpoint overwrote."""
    trained = compress(folder, optimizer=partial(torch.optim.Adam, lr=0.05))
    trainer = make_trainer(tmp_path)
    trainer.fit(trained, loader())
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    model = VQLogitsLM.load_from_checkpoint(tmp_path / "all.ckpt", num_trainable_layers=layers)
    ids = torch.randint(V, (2, T))
    with model.original.sharing_layers(model.backbone):
        target = model.original.target(model.hidden_states(ids), input_ids=ids)
    logits = target.hidden @ target.weight.T
    torch.testing.assert_close(logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits.detach())
    assert not torch.allclose(model.hidden_states(ids), target.hidden)


def test_the_original_moves_with_the_module():
    original = OriginalOutput(torch.zeros(5, 3), torch.zeros(5), torch.nn.Linear(2, 2)).to(torch.float64)
    assert original._rows.weight.dtype == original._rows.bias.dtype == original._held[0].weight.dtype == torch.float64
