"""LoRA adapters: trained alone, and merged into a model that plain transformers reads back."""

import builtins
import copy
import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lit_logits.callbacks import SavePretrained
from lit_logits.causal_lm import CausalLM
from lit_logits.modules.language_models.lora import add_lora, has_lora, merged_state_dict, save_merged

pytest.importorskip("peft")

V = 12
IDS = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 8, 1, 0]])
QV = ["q_proj", "v_proj"]


def tiny(**kwargs):
    size = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**size, **heads, "bos_token_id": 1, "eos_token_id": 2, **kwargs}))


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=8, n_layer=2, n_head=2, n_positions=16))


def stirred(model):
    """Adapters as after some training: B is no longer zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.5)
    return model


@torch.no_grad()
def logits(model):
    was_training = model.training
    result = model.eval()(input_ids=IDS).logits
    model.train(was_training)
    return result


# ---------------------------------------------------------------------- adding


def test_a_new_adapter_changes_nothing():
    plain, model = tiny(), tiny()
    before = {"base": model.base_model, "head": model.get_output_embeddings(), "table": model.get_input_embeddings()}
    assert add_lora(model, {"r": 2, "target_modules": QV}) is model
    assert type(model) is LlamaForCausalLM
    assert model.base_model is before["base"]
    assert model.get_output_embeddings() is before["head"]
    assert model.get_input_embeddings() is before["table"]
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.eval().generate(IDS, **options), plain.eval().generate(IDS, **options))
    merged, expected = merged_state_dict(model), plain.state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    assert has_lora(model)
    assert not has_lora(plain)


def test_only_adapters_get_gradients():
    model = stirred(add_lora(tiny(tie_word_embeddings=True), {"r": 2, "target_modules": QV}))
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {f"layers.{at}.self_attn.{kind}.lora_{side}" for at in (0, 1) for kind in QV for side in "AB"}
    assert {name.removeprefix("model.").removesuffix(".default.weight") for name in trained} == expected
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in trained)


# ---------------------------------------------------------------------- merging


CASES = {
    "two of a layer": (tiny, {"r": 2, "lora_alpha": 5, "target_modules": QV}),
    "all linear, dropout": (tiny, {"r": 3, "target_modules": "all-linear", "lora_dropout": 0.5}),
    "peft's choice": (tiny, {"r": 2}),
    "one layer, ranks of their own": (
        tiny,
        {"r": 4, "target_modules": QV, "layers_to_transform": [1], "rank_pattern": {"v_proj": 1}, "use_rslora": True},
    ),
    "tied": (lambda: tiny(tie_word_embeddings=True), {"r": 2, "target_modules": "all-linear"}),
    "embedding and output layer": (tiny, {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}),
    "GPT-2, whose weights are transposed": (tiny_gpt2, {"r": 2, "target_modules": ["c_attn"]}),
    "biases": (lambda: tiny(attention_bias=True), {"r": 2, "target_modules": QV}),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("case", CASES)
def test_merged_equals_adapted(case, tmp_path):
    make, settings = CASES[case]
    plain, model = make(), stirred(add_lora(make(), settings))
    adapted, before = logits(model), copy.deepcopy(model.state_dict())
    assert not torch.allclose(adapted, logits(plain), atol=1e-3)

    save_merged(model.train(), tmp_path)

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(loaded), adapted, rtol=0, atol=1e-5)
    assert not has_lora(loaded)
    assert type(loaded) is type(plain)
    (tmp_path / "plain").mkdir()
    plain.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "config.json").read_text() == (tmp_path / "plain/config.json").read_text()
    assert sorted(p.name for p in tmp_path.glob("*.*")) == sorted(p.name for p in (tmp_path / "plain").glob("*.*"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_merged_is_the_formula():
    model = stirred(add_lora(tiny(), {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj"]}))
    layer = model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight + 5 / math.sqrt(2) * torch.einsum("or,ri->oi", b, a)
    torch.testing.assert_close(merged_state_dict(model)["model.layers.0.self_attn.q_proj.weight"], expected)


def test_half_precision_is_summed_in_float32():
    """W + s·B·A in bfloat16 would round the product before it is added."""
    model = stirred(add_lora(tiny(), {"r": 8, "target_modules": ["down_proj"]})).to(torch.bfloat16)
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = layer.base_layer.weight.double() + b @ a
    merged = merged_state_dict(model)[f"{name}.weight"]
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.to(torch.bfloat16))


def test_weights_that_a_strategy_gathered():
    """By names without the wrappers that FSDP and activation checkpointing put around layers."""

    class Wrapper(torch.nn.Module):
        def __init__(self, name, module):
            super().__init__()
            self.add_module(name, module)

    model = stirred(add_lora(tiny(), {"r": 2, "target_modules": QV}))
    gathered = {name: value + 1 for name, value in model.state_dict().items()}
    expected = merged_state_dict(model, gathered)
    own = merged_state_dict(model)
    layers = model.model.layers
    for at in range(len(layers)):
        layers[at] = Wrapper("_fsdp_wrapped_module", Wrapper("_checkpoint_wrapped_module", layers[at]))
    found = merged_state_dict(model, gathered)
    assert found.keys() == expected.keys() == own.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not any(torch.equal(found[name], value) for name, value in own.items())


# ---------------------------------------------------------------------- training


def test_trained_adapters_are_saved_as_a_plain_model(tmp_path):
    model = add_lora(tiny(), {"r": 2, "target_modules": QV, "lora_dropout": 0.1})
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    module = CausalLM(model, optimizer=lambda params: torch.optim.SGD(params, lr=5.0))
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    callback = SavePretrained(str(tmp_path / "model"), monitor=None)
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=2, callbacks=[callback], enable_model_summary=False, **options)
    trainer.fit(module, DataLoader(rows, batch_size=1))
    assert sum(p.numel() for group in trainer.optimizers[0].param_groups for p in group["params"]) == sum(
        p.numel() for name, p in model.named_parameters() if "lora_" in name
    )

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)

    assert not any(info.values()), info
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(tiny()), atol=1e-4)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    assert has_lora(model)


def test_adapters_that_transformers_added_are_merged_too(tmp_path):
    from peft import LoraConfig

    model = tiny()
    try:
        model.add_adapter(LoraConfig(r=2, target_modules=QV))
    except ValueError as error:  # transformers 5.24 wants a newer peft than there was on its day
        if "The version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(str(error))
    save_merged(stirred(model), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert model._hf_peft_config_loaded


def test_a_plain_model_is_saved_as_it_is(tmp_path):
    save_merged(tiny(), tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(tiny()), rtol=0, atol=0)


# ---------------------------------------------------------------------- errors


def test_a_misspelt_setting_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"settings \['r', .*\], but got 'lora_aplha'. Did you mean 'lora_alpha'\?"):
        add_lora(tiny(), {"lora_aplha": 2})


@pytest.mark.parametrize("name", ["use_dora", "modules_to_save", "target_parameters", "bias"])
def test_settings_that_could_not_be_merged_are_refused(name):
    with pytest.raises(ValueError, match=f"but got '{name}'"):
        add_lora(tiny(), {name: True})


def test_adapters_of_another_kind_are_refused():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import ModulesToSaveWrapper

    for settings in ({"use_dora": True}, {"lora_bias": True}, {}):
        model = tiny(attention_bias=True)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=QV, **settings), model)
        if not settings:
            model.lm_head = ModulesToSaveWrapper(model.lm_head, "default")
        with pytest.raises(ValueError, match=r"Expected LoRA on linear layers and embeddings, W \+ s·B·A, but"):
            merged_state_dict(model)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_weights_are_refused(target):
    """The folder could not be of the same config: what is added to one of the two is not in the other."""
    with pytest.raises(ValueError, match=f"leave out weights that two layers share, but got '(model.)?{target}'"):
        add_lora(tiny(tie_word_embeddings=True), {"r": 2, "target_modules": [target]})


@pytest.mark.parametrize("targets", [["q_pro"], ["v_proj", "q_pro"], "q_pro", r".*q_pro"])
def test_a_target_that_is_no_layer_is_named_with_those_that_are(targets):
    """peft itself is silent as long as another target is found."""
    with pytest.raises(
        ValueError, match=r"of the layers \[.*'q_proj'.*'lm_head'\] of LlamaForCausalLM, or 'all-linear'"
    ):
        add_lora(tiny(), {"target_modules": targets})


def test_patterns_and_whole_names_are_targets():
    for targets in (r".*\.[qv]_proj", ["layers.0.self_attn.q_proj"], "all-linear"):
        assert has_lora(add_lora(tiny(), {"target_modules": targets}))


def test_without_a_target_that_is_left_the_layers_are_named():
    with pytest.raises(ValueError, match=r"Expected `lora` to name layers of LlamaForCausalLM, which has \[.*'q_proj'"):
        add_lora(tiny(), {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]})


def test_a_second_adapter_is_refused():
    model = add_lora(tiny(), {"target_modules": QV})
    with pytest.raises(ValueError, match="Expected a model without adapters, but LlamaForCausalLM has some"):
        add_lora(model, {"target_modules": QV})


def test_without_peft(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert not has_lora(tiny())
    with pytest.raises(ValueError, match=r'pip install -e "\.\[peft\]"'):
        add_lora(tiny(), {"r": 2})
