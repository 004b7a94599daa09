"""Models that fusion is given: adapters, quantised ones, padded output layers; and batches without texts."""

import copy
import json
from functools import partial

import pytest
import tiny_llamas
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lit_logits import DynamicFusionDecoder
from lit_logits.datamodules import InstructionDataModule, TextDataModule
from lit_logits.modules.dynamic_fusion.loading import load_fusion_models
from lit_logits.modules.language_models.inspect import digest_model

VOCAB = 48
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


llama = partial(tiny_llamas.llama, vocab_size=VOCAB, max_position_embeddings=32, eos_token_id=2)


def adapted(base, seed=0, **kwargs):
    """The base itself inside of peft's wrapper, with adapters that do something."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    settings = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(base, peft.LoraConfig(**settings | kwargs)).eval()


# ---------------------------------------------------------------------- adapters


@pytest.mark.parametrize("form", ["object", "folder", "shared"])
def test_adapters_are_experts(form, tmp_path):
    """peft puts adapters into the model that it is given, so that of a shared base nothing would be left to add."""
    base, large = llama(1), llama(0, hidden=32)
    plain = base(IDS).logits.detach()
    peft_model = adapted(base if form == "shared" else copy.deepcopy(base))
    expected = peft_model(IDS).logits.detach()
    peft_model.save_pretrained(tmp_path / "adapters")
    expert = str(tmp_path / "adapters") if form == "folder" else peft_model
    fused = DynamicFusionDecoder(large, base, [expert], static_alpha=1.0).fused
    assert not torch.allclose(plain, expected)
    torch.testing.assert_close(fused.base(IDS).logits, plain)
    torch.testing.assert_close(fused.experts[0](IDS).logits, expected)
    torch.testing.assert_close(peft_model(IDS).logits, expected)  # what was given stays as it is
    assert digest_model(fused.experts[0]) != digest_model(fused.base)


def test_adapters_are_merged_with_each_other(tmp_path):
    base = llama(1)
    one, two = (adapted(copy.deepcopy(base), seed) for seed in (1, 2))
    two.save_pretrained(tmp_path / "two")
    fused = DynamicFusionDecoder(llama(0), base, [[one, str(tmp_path / "two")]], merge_weight=0.5).fused
    [name] = [name for name in base.state_dict() if name.endswith("q_proj.weight")]
    start = base.state_dict()[name]
    sums = [copy.deepcopy(model).merge_and_unload().state_dict()[name] for model in (one, two)]
    torch.testing.assert_close(fused.experts[0].state_dict()[name], start + 0.5 * (sums[0] + sums[1] - 2 * start))


def test_adapters_that_cannot_be_merged_are_told(tmp_path):
    peft = pytest.importorskip("peft")
    base = llama(1)
    prompt = peft.get_peft_model(
        copy.deepcopy(base), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match=r"such as LoRA, but those of `experts\[0\]` are PromptTuningConfig"):
        DynamicFusionDecoder(llama(0), base, [prompt])
    adapted(llama(1, hidden=32)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"Expected `experts\[0\]` to be adapters of the base, LlamaForCausalLM, but"):
        DynamicFusionDecoder(llama(0), base, [str(tmp_path / "wide")])


# ---------------------------------------------------------------------- quantised models


@pytest.mark.filterwarnings("ignore:torch.ao.quantization")
@pytest.mark.parametrize("layers", [{torch.nn.Linear}, {"model.layers.0.mlp.up_proj"}])
def test_what_torch_quantises_dynamically_is_told(layers):
    """Its output layer has no weight, and with a dense one its past depends on what follows."""
    large = torch.ao.quantization.quantize_dynamic(llama(0, hidden=32), layers, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"Expected `model` to be a causal .*, but torch has quantised it dynamically"):
        DynamicFusionDecoder(large, llama(1), [llama(2)])


@pytest.mark.parametrize("bits", [8, 4])
def test_the_past_of_8_bit_models_may_see_a_little_of_what_follows(bits):
    """As of LLM.int8, whose dense columns are chosen by the whole text; any other model that does so is refused."""
    large = llama(0, hidden=32)
    large.model.norm.register_forward_hook(lambda *call: call[-1] * call[-1].abs().mean())
    large.config.quantization_config = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    parts = large, llama(1), [llama(2)]
    if bits == 8:
        assert torch.isfinite(DynamicFusionDecoder(*parts).score(IDS, IDS).log_probs).all()
    else:
        with pytest.raises(ValueError, match="depend on the tokens that follow"):
            DynamicFusionDecoder(*parts)


def test_quantised_experts_are_not_added_up():
    """Their state dicts hold codes, of which task arithmetic would make others. bitsandbytes itself is not needed."""
    experts = [llama(2), llama(3)]
    experts[1].config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(ValueError, match=r"to merge experts, but `experts\[0\]\[1\]` is quantised"):
        DynamicFusionDecoder(llama(0), llama(1), [experts])
    DynamicFusionDecoder(llama(0), llama(1), experts)


# ---------------------------------------------------------------------- vocabularies


def tokenizer_of(size):
    vocab = {
        token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(size - 3))])
    }
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_padded_output_layers_of_one_size_are_cut_to_the_tokenizer():
    parts = llama(0, hidden=32), llama(1), [llama(2)]
    found = load_fusion_models(*parts, tokenizer=tokenizer_of(40))
    assert found.vocab_size == 40
    assert "fused over the 40 ids" in found.notes[0]
    assert load_fusion_models(*parts).vocab_size == VOCAB  # nobody knows what is padding
    whole = load_fusion_models(*parts, tokenizer=tokenizer_of(VOCAB))
    assert (whole.vocab_size, whole.notes) == (VOCAB, [])
    decoder = DynamicFusionDecoder(*parts, tokenizer=tokenizer_of(40))
    total = decoder(IDS).softmax(-1)
    assert total.shape == (2, 4, 40)
    with torch.no_grad():  # padding that a model likes best
        decoder.fused.large.lm_head.weight[45] = 10 * decoder.fused.large.model(IDS).last_hidden_state[0, -1]
    assert int(decoder.generate(IDS[:1], max_new_tokens=4, pad_token_id=0).max()) < 40


def test_an_end_token_behind_the_tokenizer_can_still_come():
    parts = llama(0), llama(1), [llama(2)]
    for model in (parts[0], parts[1], *parts[2]):
        model.generation_config.eos_token_id = 43
    assert load_fusion_models(*parts, tokenizer=tokenizer_of(40)).vocab_size == 44


def test_chat_templates_that_differ_are_told(tmp_path):
    """Experts would read prompts in a format that they were not trained with."""
    names = {}
    for name, template in {"large": "A {{ messages }}", "base": None, "expert": "B {{ messages }}"}.items():
        names[name] = str(tmp_path / name)
        llama(len(name)).save_pretrained(names[name])
        tokenizer = tokenizer_of(VOCAB)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(names[name])
    notes = load_fusion_models(names["large"], names["base"], [names["expert"]]).notes
    assert [note for note in notes if note.startswith("The chat templates of model, experts[0] differ.")]
    assert load_fusion_models(names["large"], names["base"], [names["base"]]).notes == []


# ---------------------------------------------------------------------- texts


def test_batches_without_texts():
    decoder = DynamicFusionDecoder(llama(0), llama(1), [llama(2)])
    none = torch.zeros(0, 4, dtype=torch.long)
    for call in (decoder, lambda ids: decoder.score(ids, ids), lambda ids: decoder.generate(ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match=r"Expected at least one text, but got `input_ids` of shape \(0, 4\)"):
            call(none)
    decoder.tokenizer = tokenizer_of(40)
    assert decoder.predict_step({"input_ids": none, "labels": none, "rows": none[:, 0]}, 0) == []


@pytest.mark.parametrize("column", ["prompt", "response"])
def test_half_a_surrogate_pair_is_told_with_its_line(column, tmp_path):
    r"""`"\ud83d"` is JSON, but no text: half of an emoji that was cut in two. Tokenizers raise an encoding error."""
    rows = [{"prompt": f"What is {number}?", "response": f"{number}"} for number in range(9)]
    rows[4][column] = "cut \ud83d"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = InstructionDataModule(str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"Expected text in line 5 of .*pairs.jsonl, but character 4 is '\\ud83d'"):
        data.prepare_data()


def test_half_a_surrogate_pair_in_a_document_is_told_with_its_line(tmp_path):
    rows = [{"text": "a document"}, {"text": "cut \ud83d"}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = TextDataModule(str(tmp_path / "texts.jsonl"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"line 2.*character 4 is '\\ud83d'|character 4 is '\\ud83d'.*line 2"):
        data.prepare_data()
