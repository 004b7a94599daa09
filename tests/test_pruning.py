"""Decoders that keep some of their layers, and learn back what was cut from the model that they came from."""

import copy
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lit_logits import CausalLM
from lit_logits.modules import keep_layers, new_causal_lm, spread_layers

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "vocab_size": 40}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
WINDOWS = {"head_dim": 8, "sliding_window": 3}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 6, "vocab_size": 40},
    "gpt_neo": {
        **{"hidden_size": 16, "num_layers": 6, "num_heads": 2, "vocab_size": 40, "window_size": 2},
        "attention_types": [[["global", "local"], 3]],
    },
    "gemma3_text": {**SIZES, **WINDOWS, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "cohere2": {**SIZES, **WINDOWS, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "smollm3": {**SIZES, "no_rope_layers": [1, 1, 0, 1, 1, 0]},
    "mixtral": {**SIZES, "num_local_experts": 6},  # as many experts as layers, in lists of their own
}


def make(kind="llama", **settings):
    torch.manual_seed(0)
    model = new_causal_lm({"model_type": kind, **SPECIAL, **MODELS[kind], **settings})
    for parameter in model.parameters():  # norms and biases differ from layer to layer, too
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def batch(rows=2, length=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (rows, length), generator=g)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.3, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def layers_of(model):
    inner = model.base_model
    return inner.h if hasattr(inner, "h") else inner.layers


# ---------------------------------------------------------------------- cutting


@pytest.mark.parametrize("layers", [[0, 1, 4, 5], [0, 3, 4]])
@pytest.mark.parametrize("kind", MODELS)
def test_a_cut_model_is_the_whole_one_without_some_layers_and_loads_in_plain_transformers(kind, layers, tmp_path):
    """The oracle takes the other layers out by hooks: each gives back what it was given."""
    whole = make(kind)
    before = copy.deepcopy(whole.state_dict())
    cut = keep_layers(whole, layers)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    with torch.no_grad():
        found = cut(**inputs).logits
        cut.save_pretrained(tmp_path)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(saved(**inputs).logits, found)
        options = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
        assert torch.equal(
            cut.generate(**inputs, **options), cut.generate(**inputs, **options, use_cache=False)
        )  # each layer finds its own place in the cache
        for number, layer in enumerate(layers_of(whole)):
            if number not in layers:
                layer.register_forward_hook(lambda _, args, kwargs, out: _given(args, kwargs, out), with_kwargs=True)
        torch.testing.assert_close(found, whole(**inputs, use_cache=False).logits)
    assert cut.config.num_hidden_layers == saved.config.num_hidden_layers == len(layers)
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
    assert whole.config.num_hidden_layers == 6


def _given(args, kwargs, out):
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def test_lists_of_the_config_follow_and_ties_hold():
    whole = make("gemma3_text", eos_token_id=[1, 2, 3, 4, 5, 6])  # as many as layers
    cut = keep_layers(whole, [0, 2, 5])
    assert cut.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert cut.config.eos_token_id == [1, 2, 3, 4, 5, 6]
    assert cut.lm_head.weight is cut.model.embed_tokens.weight
    assert cut.lm_head.weight is not whole.lm_head.weight
    assert len(whole.config.layer_types) == 6


@pytest.mark.parametrize("layers", [[], [0, 0], [1, 0], [-1, 2], [0, 6]])
def test_numbers_that_are_no_layers_are_refused(layers):
    with pytest.raises(ValueError, match=r"`keep_layers` to be numbers in \[0, 6\) in rising order, but got \["):
        keep_layers(make(), layers)


@given(st.integers(1, 80), st.data())
def test_spread_layers_are_even_and_have_both_ends(num_layers, data):
    kept = spread_layers(data.draw(st.integers(1, num_layers)), num_layers)
    assert kept[0] == 0
    assert len(kept) == 1 or kept[-1] == num_layers - 1
    gaps = {after - before for before, after in pairwise(kept)}
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


def test_what_cannot_be_spread_is_refused():
    for number in (0, 7):
        with pytest.raises(
            ValueError, match=rf"`num_layers` to be in \[1, 6\], the layers there are, but got {number}"
        ):
            CausalLM(make(), num_layers=number)
    with pytest.raises(ValueError, match="`keep_layers` or `num_layers`, but got both"):
        CausalLM(make(), num_layers=2, keep_layers=[0, 1])


@pytest.mark.parametrize(
    ("kind", "settings", "layers", "message"),
    [
        # The config knows a rule and no list: the kept layers would be made anew as others.
        ("qwen2_moe", {"num_experts": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1]}, [0, 3], "layer 3 as"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, [0, 3], "`scaling`"),
        (
            "xlm",
            {"emb_dim": 16, "n_heads": 2, "n_layers": 6, "n_words": 40, "causal": True},
            [0, 3],
            "lists of as many",
        ),
    ],
)
def test_layers_that_would_do_something_else_in_their_new_place_are_refused(kind, settings, layers, message):
    sizes = MODELS.get(kind, SIZES if kind == "qwen2_moe" else {})
    model = new_causal_lm({"model_type": kind, **sizes, **settings})
    with pytest.raises(ValueError, match=message):
        keep_layers(model, layers)


# ---------------------------------------------------------------------- healing


def losses_by_definition(model, whole, given):
    """Cross-entropy, KL over the vocabulary and squared error of the states, token by token."""
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        target = whole(**inputs, output_hidden_states=True)
    ours = model(**inputs, output_hidden_states=True)
    sums, count = torch.zeros(3), 0
    for row in range(len(given["labels"])):
        for t in range(1, given["labels"].shape[1]):
            if (label := int(given["labels"][row, t])) != -100:
                log_q, log_p = (out.logits[row, t - 1].log_softmax(-1) for out in (ours, target))
                state = (ours.hidden_states[-1] - target.hidden_states[-1])[row, t - 1].square().mean()
                sums = sums + torch.stack([-log_q[label], (log_p.exp() * (log_p - log_q)).sum(), state])
                count += 1
    return sums / count


@pytest.mark.parametrize("chunk_size", [3, 4096])
@pytest.mark.parametrize("layers", [None, [0, 2, 5]])
def test_loss_and_gradient_are_the_definition(layers, chunk_size):
    whole = make()
    weights = {"kd_weight": 0.7, "state_weight": 0.5}
    lm = CausalLM(copy.deepcopy(whole), keep_layers=layers, chunk_size=chunk_size, **weights)
    for parameter in lm.model.parameters():  # where nothing is cut, the original must stay as it was
        parameter.data += 0.05
    other, logged = copy.deepcopy(lm.model), {}
    lm.log = lambda name, value, **_: logged.update({name: value})
    lm.log_dict = lambda values, **_: logged.update(values)
    ce, kd, state = losses_by_definition(other, whole, batch())
    expected = 0.3 * ce + 0.7 * kd + 0.5 * state
    expected.backward()
    loss = lm.training_step(batch(), 0)
    loss.backward()
    found = [logged[f"train/{name}"] for name in ("loss", "loss_ce", "loss_kd", "loss_state")]
    torch.testing.assert_close(torch.stack(found), torch.stack([expected, ce, kd, state]))
    for mine, theirs in zip(lm.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_the_original_is_whole_frozen_and_in_nothing_that_is_saved():
    lm = CausalLM(make(), num_layers=2, kd_weight=0.5, freeze_embeddings=True)
    assert len(layers_of(lm.original.models[0])) == 6
    assert lm.state_dict().keys() == {f"model.{name}" for name in lm.model.state_dict()}
    assert not any(parameter.requires_grad for parameter in lm.original.models[0].parameters())
    frozen = [name for name, parameter in lm.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.model.embed_tokens.weight", "model.lm_head.weight"]
    assert CausalLM(make(), num_layers=2).original is None


def test_healing_comes_nearer_to_the_original_and_validation_says_how_near(tmp_path):
    whole, given = make(), [batch(4, 12, seed) for seed in range(3)]
    lm = CausalLM(
        copy.deepcopy(whole),
        keep_layers=[0, 1, 5],
        kd_weight=1.0,
        freeze_embeddings=True,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    table = lm.model.get_input_embeddings().weight.clone()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "max_epochs": 8}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet)
    loader = DataLoader(given, batch_size=None)
    before = trainer.validate(lm, loader, verbose=False)[0]
    trainer.fit(lm, loader)
    after = trainer.validate(lm, loader, verbose=False)[0]
    assert after["val/loss_kd"] < 0.7 * before["val/loss_kd"]
    sums = [losses_by_definition(lm.model, whole, one) * int((one["labels"][:, 1:] != -100).sum()) for one in given]
    total = sum(int((one["labels"][:, 1:] != -100).sum()) for one in given)
    ce, kd, state = (sum(sums) / total).tolist()
    assert after["val/loss"] == pytest.approx(ce, rel=1e-4)
    assert after["val/loss_kd"] == pytest.approx(kd, rel=1e-3)
    assert after["val/loss_state"] == pytest.approx(state, rel=1e-3)
    assert torch.equal(table, lm.model.get_input_embeddings().weight)


def test_a_healed_model_is_saved_small_and_its_card_says_so(tmp_path):
    make().save_pretrained(tmp_path / "whole")
    lm = CausalLM(str(tmp_path / "whole"), num_layers=3, kd_weight=0.5)
    lm.save_pretrained(tmp_path / "small")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.num_hidden_layers == 3
    assert "3 of the layers of the model that it came from" in (tmp_path / "small" / "README.md").read_text()
    checkpoint = {"state_dict": lm.state_dict(), "hyper_parameters": dict(lm.hparams)}
    torch.save({**checkpoint, "pytorch-lightning_version": L.__version__}, tmp_path / "last.ckpt")
    again = CausalLM.load_from_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(again(batch()["input_ids"]), lm(batch()["input_ids"]))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`kd_weight` to be in \[0, 1\], but got 1.5"):
        CausalLM(make(), kd_weight=1.5)
    with pytest.raises(ValueError, match="`state_weight` to be non-negative, but got -1"):
        CausalLM(make(), state_weight=-1.0)
    with pytest.raises(ValueError, match="pretrained model for `kd_weight` and `state_weight`, which imitate it"):
        CausalLM({"model_type": "llama", **SIZES}, kd_weight=0.5)
