"""What stands in saved folders beside the weights: the card, code for `trust_remote_code`, ids, dtypes, no paths."""

import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_save_pretrained import IDS, LM, Data, V, fit, tiny, tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lit_logits import CausalLM, DualHeadKD, GLDFusionModule, VQLogitsLM
from lit_logits.callbacks import SavePretrained
from lit_logits.modules import ResidualVQLogitsHead, VQLogitsForCausalLM, VQLogitsHead, new_causal_lm
from lit_logits.modules.language_models.card import Origin, find_origin
from lit_logits.modules.language_models.version_4 import rotary_settings

LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "max_position_embeddings": 16}


@pytest.fixture
def original(tmp_path):
    """A pretrained model with a card, whose generation config samples without saying so, as Vicuna's does."""
    folder = tmp_path / "somewhere" / "small-llama"
    tiny().save_pretrained(folder)
    config = folder / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "temperature": 0.9, "top_p": 0.6}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: some/llama\n---\nA model.\n")
    return folder


def compressed(original):
    torch.manual_seed(0)
    model = VQLogitsLM(str(original), head=partial(ResidualVQLogitsHead, codebook_size=4, num_groups=2))
    model.initialize_head([{"input_ids": IDS, "labels": IDS}])
    return model.eval()


def run(program, tmp_path, **environment):
    variables = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=variables, cwd=tmp_path)


# ---------------------------------------------------------------------- trust_remote_code


LOAD = """
import sys
{first}
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder = {folder!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
print(type(model).__module__, type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__module__)
print(type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__)
print(model(torch.tensor([[1, 5, 2]])).logits.double().sum().item())
model.save_pretrained(folder + "-again")
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "import lit_logits"])
def test_a_folder_loads_where_lit_logits_was_not_imported(original, tmp_path, first):
    model = compressed(original)
    model.save_pretrained(tmp_path / "compact", tokenizer=tokenizer())
    done = run(LOAD.format(first=first, folder=str(tmp_path / "compact")), tmp_path)
    assert done.returncode == 0, done.stderr
    places, base, total = done.stdout.splitlines()
    assert places == "lit_logits.modules.vq_logits.export lit_logits.modules.vq_logits.config"
    assert base == "VQLogitsModel"
    with torch.no_grad():
        assert float(total) == pytest.approx(float(model(torch.tensor([[1, 5, 2]])).double().sum()), abs=1e-4)
    # Saved again, it has the same code: transformers would have copied a file of the library in its place.
    names = {path.name for path in (tmp_path / "compact").iterdir()}
    again = {path.name for path in (tmp_path / "compact-again").iterdir()}
    assert names - again == {"tokenizer.json", "tokenizer_config.json"}
    assert not again - names
    config = json.loads((tmp_path / "compact-again" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_vq_logits.VQLogitsForCausalLM"


@pytest.mark.slow
def test_without_lit_logits_the_error_names_it(original, tmp_path):
    compressed(original).save_pretrained(tmp_path / "compact", tokenizer=tokenizer())
    first = "sys.modules['lit_logits'] = None  # as if it were not installed"
    done = run(LOAD.format(first=first, folder=str(tmp_path / "compact")), tmp_path)
    assert done.returncode == 1
    assert "ImportError: This model needs the package lit_logits (lit-logits): install it" in done.stderr


def test_the_bare_model_is_the_backbone(original, tmp_path, caplog):
    model = compressed(original)
    model.save_pretrained(tmp_path / "compact", tokenizer=tokenizer())
    bare, info = AutoModel.from_pretrained(tmp_path / "compact", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        expected = model.backbone(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(bare(input_ids=IDS).last_hidden_state, expected)


# ---------------------------------------------------------------------- configs


@pytest.mark.parametrize("form", ["compact", "dense"])
def test_no_file_tells_where_the_original_lay(original, tmp_path, form):
    compressed(original).save_pretrained(tmp_path / "saved", form, tokenizer=tokenizer())
    for path in (tmp_path / "saved").iterdir():
        assert b"somewhere" not in path.read_bytes(), path.name


def saved_by_the_module(original, folder, **kwargs):
    compressed(original).save_pretrained(folder, tokenizer=tokenizer(), **kwargs)


def saved_by_the_callback(original, folder, **kwargs):
    fit(folder, [1.0], AutoModelForCausalLM.from_pretrained(original), Data(tokenizer=tokenizer()), **kwargs)


def saved_by_another_module(original, folder, **kwargs):
    CausalLM(str(original)).save_pretrained(folder, tokenizer=tokenizer(), **kwargs)


@pytest.mark.parametrize("save", [saved_by_the_module, saved_by_the_callback, saved_by_another_module])
def test_the_tokenizers_ids_and_the_originals_sampling_are_saved(original, tmp_path, save):
    """Samples ended at a quotation mark, the architecture's end token; and a run ended at its first save."""
    save(original, tmp_path / "saved")
    for name in ("config", "generation_config"):
        config = json.loads((tmp_path / "saved" / f"{name}.json").read_text())
        assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (1, 2, 1)
    assert (config["temperature"], config["top_p"]) == (0.9, 0.6)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.generation_config.eos_token_id == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "<end>"


def test_the_callback_casts_and_ties_stay(tmp_path):
    tied = tiny(tie_word_embeddings=True)
    callback = SavePretrained(str(tmp_path / "saved"), dtype="bfloat16")
    module, _, _ = fit(tmp_path / "saved", [1.0], tied, callback=callback)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert module.model.dtype == torch.float32
    for (name, ours), theirs in zip(module.model.named_parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours.to(torch.bfloat16), msg=name)
    size = sum(path.stat().st_size for path in (tmp_path / "saved").glob("*.safetensors"))
    assert size < 2 * sum(p.numel() for p in tied.parameters()) + 4096
    with pytest.raises(
        ValueError, match=r"Expected `dtype` to be one of \['float32', 'bfloat16', 'float16'\], but got 'i"
    ):
        SavePretrained(dtype="int8")


@pytest.mark.parametrize("head", [partial(VQLogitsHead, codebook_size=4), ResidualVQLogitsHead])
def test_a_compact_model_in_half_precision(original, tmp_path, head):
    model = VQLogitsLM(str(original), head=partial(head, codebook_size=4) if isinstance(head, type) else head)
    model.initialize_head([{"input_ids": IDS, "labels": IDS}])
    model.save_pretrained(tmp_path / "saved", tokenizer=tokenizer(), dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_folder_without_a_tokenizer_is_told(original, tmp_path):
    model = compressed(original)
    with pytest.warns(UserWarning, match="The model is saved without a tokenizer"):
        model.save_pretrained(tmp_path / "saved")
    assert "AutoTokenizer" not in (tmp_path / "saved" / "README.md").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "saved", tokenizer=tokenizer())


# ---------------------------------------------------------------------- cards


def front_matter(folder):
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md").data.to_dict()


def test_the_card_says_what_was_made_of_what_and_measured(original, tmp_path):
    model = compressed(original)
    model.save_pretrained(tmp_path / "saved", tokenizer=tokenizer())
    text = (tmp_path / "saved" / "README.md").read_text()
    assert front_matter(tmp_path / "saved") == {
        "library_name": "transformers",
        "tags": ["lit-logits"],
        "base_model": "some/llama",
        "license": "apache-2.0",
    }
    assert "# small-llama, changed with lit-logits" in text
    assert "| base model | small-llama |" in text
    assert "`ResidualVQLogitsHead`" in text
    assert "of dense" in text
    assert "import lit_logits" in text
    model.save_pretrained(tmp_path / "dense", "dense", tokenizer=tokenizer())
    assert "import lit_logits" not in (tmp_path / "dense" / "README.md").read_text()


@pytest.mark.slow
def test_the_lines_of_a_card_load_the_folder(original, tmp_path):
    compressed(original).save_pretrained(tmp_path / "saved", tokenizer=tokenizer())
    text = (tmp_path / "saved" / "README.md").read_text()
    program = text.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", str(tmp_path / "saved"))
    done = run(program.replace('"Once"', '"word1"'), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "word1" in done.stdout


def test_what_was_validated_stands_in_the_card(original, tmp_path):
    fit(tmp_path / "saved", [3.25, 2.5], data=Data(tokenizer=tokenizer()))
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "| `val/loss` | 2.5 |" in text
    assert "| `step` | 4 |" in text
    assert "as part of `LM`" in text
    assert "none: trained from random weights" in text


@pytest.mark.parametrize("form", ["compact", "dense"])
def test_a_model_in_memory_ends_texts_as_the_saved_one_does(form, tmp_path):
    """It ended them with the architecture's token."""
    module = VQLogitsLM({**LLAMA, "vocab_size": V}, head=partial(VQLogitsHead, codebook_size=4, bias=False))
    words = tokenizer()
    assert words.eos_token_id != module.backbone.config.eos_token_id
    model = module.to_pretrained(form, tokenizer=words)
    module.save_pretrained(tmp_path / form, form, tokenizer=words)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / form)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(saved.config, name)
        assert getattr(model.generation_config, name) == getattr(saved.generation_config, name)
    assert model.generation_config.eos_token_id == words.eos_token_id


def plain_lm():
    return new_causal_lm({**LLAMA, "vocab_size": V})


MODULES = {
    "CausalLM": (lambda: CausalLM(plain_lm()), "Trained by the cross-entropy"),
    "GLDFusionModule": (lambda: GLDFusionModule(plain_lm(), {"big": plain_lm()}, top_k=4), "its sources `big`"),
    "VQLogitsLM": (
        lambda: VQLogitsLM({**LLAMA, "vocab_size": V}, head=partial(VQLogitsHead, codebook_size=4)),
        "dense",
    ),
    "DualHeadKD": (lambda: DualHeadKD(plain_lm(), plain_lm()), "Distilled through two heads"),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_method_writes_a_card_and_says_what_it_did(name, tmp_path):
    make, said = MODULES[name]
    module = make()
    save = module.export if isinstance(module, DualHeadKD) else module.save_pretrained
    save(tmp_path / "saved", tokenizer=tokenizer())
    text = (tmp_path / "saved" / "README.md").read_text()
    assert said in text
    assert said in module.card_text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.eos_token_id == 1


def test_a_card_of_somebody_else_or_changed_is_kept(original, tmp_path):
    model, folder = compressed(original), tmp_path / "saved"
    save = partial(model.save_pretrained, folder, tokenizer=tokenizer())
    save()
    first = (folder / "README.md").read_text()
    save()
    assert (folder / "README.md").read_text() == first
    assert not (folder / "MODEL_CARD.md").exists()
    (folder / "README.md").write_text(first + "\nMy own figures.\n")
    save()
    assert (folder / "README.md").read_text().endswith("My own figures.\n")
    assert (folder / "MODEL_CARD.md").read_text() == first
    (folder / "README.md").write_text("Mine.")
    VQLogitsForCausalLM.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "Mine."


def test_origins(tmp_path, original):
    assert find_origin(str(original)) == Origin("small-llama", "apache-2.0", "some/llama")
    assert find_origin(str(tmp_path / "gone" / "model")) == Origin("model")
    (tmp_path / "a.gguf").write_bytes(b"no such format")
    assert find_origin(str(tmp_path / "a.gguf")) == Origin("a.gguf")
    (original / "README.md").write_text("---\n: [\n---\n")
    assert find_origin(str(original)) == Origin("small-llama")


def test_a_compact_folder_knows_the_original_of_its_original(original, tmp_path):
    compressed(original).save_pretrained(tmp_path / "compact", tokenizer=tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "compact")
    loaded.save_pretrained(tmp_path / "again")
    assert front_matter(tmp_path / "again")["base_model"] == "some/llama"
    assert front_matter(tmp_path / "again")["license"] == "apache-2.0"


def test_a_part_of_another_module_is_saved_with_a_card(tmp_path):
    fit(tmp_path, [1.0], LM([1.0], tiny(LlamaForCausalLM)), data=Data(tokenizer=tokenizer()))
    assert "LlamaForCausalLM" in (tmp_path / "README.md").read_text()


# ---------------------------------------------------------------------- the hub


class FakeHub:
    """Takes what would go to the hub."""

    def __init__(self):
        self.asked, self.files = [], {}

    def __call__(self, token=None):
        self.asked.append(("token", token))
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.asked.append(("create", repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=f"me/{repo_id.rpartition('/')[2]}")

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.asked.append(("upload", repo_id, commit_message))
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr("lit_logits.modules.language_models.saving.HfApi", fake)
    return fake


def test_what_is_pushed_is_the_saved_folder(original, tmp_path, hub):
    model = compressed(original)
    address = model.push_to_hub("mine", "compact", tokenizer=tokenizer(), private=True, token="secret")
    assert address == "https://hub/me/mine"
    assert hub.asked[:2] == [("token", "secret"), ("create", "mine", True, True)]
    assert hub.asked[2][:2] == ("upload", "me/mine")
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS))
    assert {"README.md", "tokenizer.json", "modeling_vq_logits.py"} <= hub.files.keys()


def test_every_method_pushes_and_nothing_is_uploaded_where_saving_refuses(original, hub):
    fused = GLDFusionModule(str(original), {"big": plain_lm()}, top_k=4)
    for model in (CausalLM(str(original)), fused, DualHeadKD(student=tiny())):
        assert model.push_to_hub("me/mine", tokenizer=tokenizer()) == "https://hub/me/mine"
        assert {"config.json", "README.md", "model.safetensors"} <= hub.files.keys()
    hub.asked.clear()
    with pytest.raises(ValueError, match="Expected a student of transformers for a folder, but got Sequential"):
        DualHeadKD(student=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))).push_to_hub("me/mine")
    with pytest.raises(ValueError, match="Expected `head` to be"):
        compressed(original).push_to_hub("me/mine", head="packed")
    assert hub.asked == []


def test_weights_are_as_readable_as_the_other_files(tmp_path):
    """A server that runs as another user could not read them."""
    CausalLM(tiny()).save_pretrained(tmp_path / "saved", tokenizer=tokenizer())
    assert len({path.stat().st_mode for path in (tmp_path / "saved").iterdir()}) == 1


# ---------------------------------------------------------------------- version 4 of transformers

SCALED = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROTARY: dict[str, Any] = {
    "plain": ({"rope_type": "default", "rope_theta": 500.0}, {"rope_theta": 500.0, "rope_scaling": None}),
    "scaled": (SCALED, {"rope_theta": 500.0, "rope_scaling": {k: v for k, v in SCALED.items() if k != "rope_theta"}}),
    "layers": (
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
        {
            "rope_theta": 500.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_local_base_freq": 300.0,
        },
    ),
}


@pytest.mark.parametrize("case", ROTARY)
def test_version_4_finds_the_rotary_settings(tmp_path, case):
    """It took its default angles, and said nothing: all logits were other ones."""
    parameters, expected = ROTARY[case]
    if case == "layers":
        more = {"head_dim": 4, "num_key_value_heads": 2, "layer_types": ["full_attention"], "sliding_window": 4}
        model = new_causal_lm({**LLAMA, **more, "model_type": "gemma3_text", "rope_parameters": parameters}, V)
    else:
        original = {"original_max_position_embeddings": 8} if case == "scaled" else {}
        parameters = {**parameters, **original}
        expected = {**expected, **({"rope_scaling": {**expected["rope_scaling"], **original}} if original else {})}
        model = new_causal_lm({**LLAMA, "rope_parameters": parameters}, V)
    CausalLM(model).save_pretrained(tmp_path / "saved", tokenizer=tokenizer())
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {name: written[name] for name in expected} == expected
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.rope_parameters == model.config.rope_parameters
    torch.testing.assert_close(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_old_names_that_would_change_the_model_are_left_out():
    """One scaling of all layers would be read in place of one for each kind."""
    parameters, _ = ROTARY["layers"]
    assert rotary_settings(AutoConfig.for_model("modernbert-decoder", rope_parameters=parameters)) == {}
    assert rotary_settings(AutoConfig.for_model("gpt2")) == {}
    config = AutoConfig.for_model("llama")
    config.rope_parameters = {"full_attention": None, "sliding_attention": {"rope_theta": 1.0}}  # as beam has
    assert rotary_settings(config) == {}


def test_version_4_finds_the_tokenizer(tmp_path):
    words = tokenizer()
    words.add_special_tokens({"extra_special_tokens": ["<one>", "<two>"]})
    CausalLM(tiny(vocab_size=len(words))).save_pretrained(tmp_path / "saved", tokenizer=words)
    written = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (written["additional_special_tokens"], "extra_special_tokens" in written) == (["<one>", "<two>"], False)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.extra_special_tokens == ["<one>", "<two>"]
    assert again("word1 <two>").input_ids == words("word1 <two>").input_ids
