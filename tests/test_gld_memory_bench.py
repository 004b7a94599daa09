"""The memory plan of an FSDP recipe against a real model that takes a real step."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.gld_memory import main, make_model, plan, tied_weights, units_of
from lit_logits.modules import new_causal_lm
from lit_logits.modules.language_models.lora import add_lora

CONFIG = Path(__file__).parents[1] / "configs/gld_fusion_14b_fsdp.yaml"
SMALL = {"model_type": "phi3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 100}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
LAYER = "transformers.models.phi3.modeling_phi3.Phi3DecoderLayer"


def recipe(tmp_path, precision="32-true", policy=LAYER, **init):
    strategy = {"auto_wrap_policy": [policy], "activation_checkpointing_policy": [LAYER]}
    trainer = {"precision": precision, "devices": 1, "strategy": {"class_path": "FSDPStrategy", "init_args": strategy}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}
    config = {
        "trainer": trainer,
        "model": {"init_args": {"pivot": SMALL, "sources": {}, "optimizer": optimizer, **init}},
        "data": {"init_args": {"max_length": 16, "batch_size": 2}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, config


def real_bytes(dtype, lora=None):
    """Parameters, gradients and AdamW's moments of a model that took a step."""
    model = new_causal_lm(SMALL)
    model = (add_lora(model, lora) if lora else model).to(dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(8).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [sum(t.numel() * t.element_size() for t in part) for part in (model.parameters(), gradients, moments)]


def planned(config, gpus, lora=None):
    model, _ = make_model(SMALL)
    if lora:
        with torch.device("meta"):
            add_lora(model, lora)
    layers = (type(model.model.layers[0]),)
    return [row.bytes for row in plan(model, units_of(model, layers), config, gpus)], model


@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_bytes_are_those_of_a_real_step(tmp_path, precision, dtype, gpus):
    _, config = recipe(tmp_path, precision)
    rows, model = planned(config, gpus)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert rows[:3] == [size / gpus for size in real_bytes(dtype)]


def test_of_lora_only_the_gradients_are_of_whole_units(tmp_path):
    """FSDP gives the frozen weights of a flat unit a place in its gradient; the optimizer has the adapters alone."""
    lora = {"r": 2, "target_modules": ["qkv_proj"]}
    _, config = recipe(tmp_path)
    rows, model = planned(config, 1, lora)
    parameters, gradients, moments = real_bytes(torch.float32, lora)
    assert (rows[0], rows[2]) == (parameters, moments)
    assert rows[1] == sum(p.numel() * 4 for p in model.model.layers.parameters()) > gradients


def test_units_are_the_layers_and_the_rest():
    model = new_causal_lm(SMALL)
    units = units_of(model, (type(model.model.layers[0]),))
    assert [unit.name for unit in units] == ["", "model.layers.0", "model.layers.1", "model.layers.2"]
    assert units[1].parameters == sum(p.numel() for p in model.model.layers[0].parameters())
    assert units[0].parameters == 2 * 100 * 32 + 32  # table, output layer, last norm
    assert sum(unit.parameters for unit in units) == sum(p.numel() for p in model.parameters())


def test_tied_weights_count_once_and_may_not_be_in_two_units():
    model = new_causal_lm({**SMALL, "tie_word_embeddings": True})
    assert tied_weights(model) == ["lm_head.weight"]
    assert units_of(model, (type(model.model.layers[0]),))[0].parameters == 100 * 32 + 32
    with pytest.raises(
        ValueError, match=r"Expected tied weights to be in one unit of FSDP, but 'lm_head.weight' is in"
    ):
        units_of(model, (torch.nn.Embedding,))


def test_activations_and_chunks_are_the_formulas(tmp_path):
    _, config = recipe(tmp_path, "bf16-mixed")
    rows, _ = planned(config, 1)
    assert rows[5] == 2 * 16 * 32 * 3 * 2  # B·T·d·L in bfloat16
    assert rows[7] == 2 * 16 * 100 * (2 + 12)  # a batch that is smaller than a chunk


def test_a_policy_that_names_no_layer_of_the_pivot(tmp_path):
    path, _ = recipe(tmp_path, policy="transformers.models.llama.modeling_llama.LlamaDecoderLayer")
    with pytest.raises(ValueError, match=r"`auto_wrap_policy` to name layers of Phi3ForCausalLM, .* Its layers are"):
        main(["--config", str(path)])
    llama = json.dumps({**SMALL, "model_type": "llama"})
    with pytest.raises(
        ValueError, match=r"`auto_wrap_policy` to name layers of LlamaForCausalLM, but it has no .*Phi3"
    ):
        main(["--config", str(CONFIG), "--pivot", llama])


def test_sources_online_and_cached(tmp_path, capsys):
    teacher = new_causal_lm(SMALL)
    teacher.save_pretrained(tmp_path / "teacher")
    sources = {"a": str(tmp_path / "teacher"), "b": "caches/Qwen2.5-14B-Instruct", "c": "caches/mine"}
    path, _ = recipe(tmp_path, sources=sources, source_kwargs={"a": {"dtype": "bfloat16"}})
    main(["--config", str(path), "--tokens", "1000000000", "--cache_top_k", "10"])
    printed = capsys.readouterr().out
    assert "| source a, online | 0.0 B in bfloat16 | 0.0 |" in printed
    assert "| cache of b, on disk | 1,000,000,000 tokens · 104 | 104.0 |" in printed
    assert "b: cache caches/Qwen2.5-14B-Instruct; online it would take 29.5 GB in bfloat16" in printed
    assert "c: cache caches/mine." in printed
    assert "Fits: 0.0 of 80 GB" in printed


def test_the_recipe_fits(capsys):
    main(["--config", str(CONFIG)])
    printed = capsys.readouterr().out
    assert "14.66 B parameters" in printed  # "14B", as the hub has it
    assert "40 × Phi3DecoderLayer" in printed
    assert "Fits:" in printed
    main(["--config", str(CONFIG), "--gpus", "2"])
    assert "Does not fit:" in capsys.readouterr().out


def test_other_strategies_and_unknown_models_are_refused(tmp_path):
    path, config = recipe(tmp_path)
    config["trainer"]["strategy"] = "ddp"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"Expected `trainer.strategy` to be an FSDPStrategy with its arguments, but"):
        main(["--config", str(path)])
    with pytest.raises(ValueError, match=r"local cache or one of .*, but got 'no/such-model'"):
        main(["--config", str(path), "--pivot", "no/such-model"])
