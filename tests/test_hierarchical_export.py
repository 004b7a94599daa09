"""A head of two levels as a model of transformers: what is written, what is read back, and what is refused.

Letters: B batch, T sequence, V vocabulary.
"""

import json
import logging
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_logits import VQLogitsLM
from lit_logits.callbacks import SavePretrained
from lit_logits.functional import pack_codes, packed_size, unpack_codes
from lit_logits.modules import (
    HierarchicalVQLogitsHead,
    PackedHierarchicalVQLogitsHead,
    ResidualVQLogitsHead,
    VQLogitsForCausalLM,
    VQLogitsHead,
    describe_head,
    describe_model,
)

V, SIZES = 40, (7, 5, 3)
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", **SHAPE, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
HEAD = partial(HierarchicalVQLogitsHead, codebook_sizes=SIZES)


def make(head=HEAD, backbone=LLAMA, seed=0):
    """A model that is sure of some tokens, two of whose seven clusters are empty."""
    torch.manual_seed(seed)
    model = VQLogitsLM(backbone, V, head=head)
    if isinstance(model.head, HierarchicalVQLogitsHead):
        for parameter in model.head.parameters():
            torch.nn.init.normal_(parameter)
        sizes = (model.head.codebook_sizes[0] - 2, *model.head.codebook_sizes[1:])
        clusters, *codes = (torch.randint(size, (V,)) for size in sizes)
        model.head.set_codes(clusters, torch.stack(codes, 1))
    return model.eval()


@pytest.fixture
def model():
    return make()


def ids(count=2, length=6, seed=1):
    return torch.randint(1, V, (count, length), generator=torch.Generator().manual_seed(seed))


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


# ---------------------------------------------------------------------- codes of several codebooks, packed


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(1, 50), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_codes_come_back_from_as_many_bits_as_they_need(sizes, num_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(size, (num_tokens,), generator=generator) for size in sizes], 1)
    packed = pack_codes(codes, sizes)
    bits = [len(f"{size - 1:b}") if size > 1 else 0 for size in sizes]
    assert packed.numel() == packed_size(num_tokens, sizes) == sum(-(-num_tokens * each // 8) for each in bits)
    assert torch.equal(unpack_codes(packed, sizes, num_tokens), codes)


def test_packed_codes_that_do_not_fit_are_refused():
    packed = pack_codes(torch.tensor([[4, 0], [1, 2]]), (5, 3))
    with pytest.raises(ValueError, match=r"Expected 2 bytes for 2 tokens in .*\[5, 3\], but got 1: .* cut off"):
        unpack_codes(packed[:1], (5, 3), 2)
    with pytest.raises(ValueError, match=r"codes in \[0, 5\), but the largest is 7: the mapping is damaged"):
        unpack_codes(torch.full_like(packed, 255), (5, 3), 2)


# ---------------------------------------------------------------------- what is written and read back


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(7, 5), SIZES])
def test_a_saved_model_is_the_one_in_training(sizes, bias, tmp_path):
    model = make(partial(HierarchicalVQLogitsHead, codebook_sizes=sizes, bias=bias))
    model.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert type(loaded) is VQLogitsForCausalLM
    assert type(loaded.head) is PackedHierarchicalVQLogitsHead
    assert torch.equal(loaded(ids()).logits, model(ids()))
    assert loaded(ids(), logits_to_keep=1).logits.shape == (2, 1, V)
    assert torch.equal(loaded(ids(), logits_to_keep=1).logits[:, 0], model(ids())[:, -1])
    labels = ids().masked_fill(ids() < 9, -100)
    expected = torch.nn.functional.nll_loss(model(ids())[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loaded(ids(), labels=labels).loss, expected)


def test_the_factor_and_the_cap_of_an_architecture_are_kept(tmp_path):
    cohere = {**LLAMA, "model_type": "cohere", "logit_scale": 0.25}
    gemma = {**LLAMA, "model_type": "gemma2", "head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 0.5}
    for name, backbone, expected in (("cohere", cohere, (0.25, None)), ("gemma", gemma, (1.0, 0.5))):
        model = make(backbone=backbone)
        model.save_pretrained(tmp_path / name)
        loaded = load(tmp_path / name)
        assert (loaded.config.hidden_scale, loaded.config.logit_cap) == expected
        assert torch.equal(loaded(ids()).logits, model(ids()))


def test_the_file_holds_packed_codes_and_no_counts(model, tmp_path):
    model.head.train().loss(torch.randn(3, 16), torch.arange(3))  # counts something
    model.save_pretrained(tmp_path)
    tensors = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if n.startswith("head.")}
    names = {"clusters", "codes", "cluster_bias", "token_bias", "packed_codes"}
    assert tensors.keys() == {f"head.{name}" for name in names}
    assert tensors["head.packed_codes"].dtype == torch.uint8
    assert tensors["head.packed_codes"].numel() == (40 * 3 + 40 * 3 + 40 * 2) // 8
    size = model.head.footprint()
    assert size.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert size.parameters == sum(t.numel() for t in tensors.values() if t.is_floating_point())
    assert (size.dense_parameters, size.dense_bytes) == (V * 16, 4 * V * 16)
    half = make().head.bfloat16().footprint()
    assert half.bytes == 2 * size.parameters + 40


def test_training_goes_on_beside_the_export(model):
    """Parameters are shared; the mapping is that of the time of the export."""
    model.train()
    before = model.head.token_to_cluster.clone()
    exported = model.to_pretrained()
    assert all(parameter is model.head.get_parameter(name) for name, parameter in exported.head.named_parameters())
    model.head.set_codes(before.roll(1), model.head.token_codes.clone())
    assert torch.equal(exported.head.layout().token_to_cluster, before)
    assert model.head.training


def test_a_loaded_model_is_tuned_as_the_head_is_trained(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path).train()
    loaded(ids(), labels=ids()).loss.backward()
    model.head.loss(model.hidden_states(ids())[:, :-1], ids()[:, 1:]).backward()
    for name, parameter in loaded.head.named_parameters():
        torch.testing.assert_close(parameter.grad, model.head.get_parameter(name).grad)
        assert parameter.grad.any()


def test_half_precision_gives_normalised_logits_and_is_saved_again(model, tmp_path):
    model.save_pretrained(tmp_path / "first", dtype=torch.bfloat16)
    first = load(tmp_path / "first")
    assert {parameter.dtype for parameter in first.parameters()} == {torch.bfloat16}
    assert model.head.clusters.dtype == torch.float32
    logits = first(ids()).logits
    assert logits.dtype == torch.float32  # in bfloat16 a log-probability of −10 is off by 0.03
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(2, 6), atol=1e-5, rtol=0)
    assert (logits.exp() - model(ids()).exp()).abs().max() < 0.05
    first.save_pretrained(tmp_path / "second")
    assert torch.equal(load(tmp_path / "second")(ids()).logits, logits)


def test_a_folder_from_before_two_levels_is_read(tmp_path):
    model = make(partial(VQLogitsHead, codebook_size=8))
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["codebook_sizes"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = load(tmp_path)
    assert type(loaded.head) is ResidualVQLogitsHead
    torch.testing.assert_close(loaded(ids()).logits, model(ids()))


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_that_of_the_head(seed):
    model = make(seed=seed)
    exported, prompts = model.to_pretrained(), ids(4, seed=seed)
    prompts[1:3, :2] = 0
    mask = (prompts != 0).long()
    expected = model.generate(prompts, mask, max_new_tokens=12)
    assert expected[:, 6:].unique().numel() > 4  # not one word again and again
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(exported.generate(prompts, **options), expected)
    assert torch.equal(exported.generate(prompts, **options, use_cache=False), expected)
    assert torch.equal(exported.generate(prompts, **(options | {"do_sample": True}), top_k=1), expected)


def test_as_many_beams_as_tokens_find_the_best_text(model):
    """Of all V · V texts of two tokens, each scored by the module in training."""
    prompt = ids(1)
    texts = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    with torch.no_grad():
        first = model(prompt)[0, -1]
        second = model(torch.cat([prompt.expand(V, -1), torch.arange(V).unsqueeze(1)], 1))[:, -1]
    best = texts[(first.unsqueeze(1) + second).flatten().argmax()]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 2, "do_sample": False}
    found = model.to_pretrained().generate(prompt, **options, num_beams=V)
    assert torch.equal(found[0, 6:], best)


def test_samples_follow_the_probabilities_at_a_temperature(model):
    torch.manual_seed(0)
    options = {"attention_mask": torch.ones(1, 6), "max_new_tokens": 1, "do_sample": True, "top_k": 0}
    drawn = model.to_pretrained().generate(ids(1), **options, temperature=1.5, num_return_sequences=20_000)
    expected = model(ids(1))[0, -1].exp() ** (1 / 1.5)
    shares = torch.bincount(drawn[:, -1], minlength=V) / 20_000
    torch.testing.assert_close(shares, (expected / expected.sum()).detach(), atol=0.012, rtol=0)


PROCESSORS = [
    {"top_p": 0.7},
    {"typical_p": 0.5},
    {"min_p": 0.1, "repetition_penalty": 1.3},
    {"epsilon_cutoff": 0.01, "no_repeat_ngram_size": 2},
    {"eta_cutoff": 0.01, "renormalize_logits": True},
]


@pytest.mark.parametrize("options", PROCESSORS, ids=lambda options: "+".join(options))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_processors_meet_no_infinity_and_no_nan(options, dtype, tmp_path):
    model = make()
    model.save_pretrained(tmp_path, dtype=dtype)
    assert (torch.bincount(model.head.token_to_cluster, minlength=7) == 0).sum() == 2
    torch.manual_seed(0)
    report = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    found = load(tmp_path).generate(
        ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=6, do_sample=True, **options, **report
    )
    assert all(logits.isfinite().all() for logits in found.logits)
    for scores, token in zip(found.scores, found.sequences[:, 6:].T, strict=True):
        assert not scores.isnan().any()
        assert scores.gather(1, token.unsqueeze(1)).isfinite().all()  # what a processor leaves out is not drawn


# ---------------------------------------------------------------------- refused


def test_a_cut_off_or_foreign_mapping_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # not of the file written below

    def write(**changed):
        save_file({**tensors, **{f"head.{n}": t for n, t in changed.items()}}, weights, metadata={"format": "pt"})

    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="Expected the weights of a compressed model, but reading them failed"):
        load(tmp_path)
    write(packed_codes=tensors["head.packed_codes"][:-3].clone())
    with pytest.raises(ValueError, match="Expected weights of the sizes that the folder's config names"):
        load(tmp_path)
    write(packed_codes=torch.full_like(tensors["head.packed_codes"], 255))
    with pytest.raises(ValueError, match=r"Expected codes in \[0, 7\), but the largest is 7: the mapping is damaged"):
        load(tmp_path)
    write()
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "codebook_sizes": [7, 3, 5]}))  # as many bytes, and as many codes
    with pytest.raises(ValueError, match=r"Expected codes in \[0, 3\), .* damaged or another head's"):
        load(tmp_path)
    config.write_text(json.dumps({**settings, "codebook_sizes": None, "codebook_size": 8, "stage_sizes": [V]}))
    with pytest.raises(ValueError, match=r"config\.json and weights are of different models"):
        load(tmp_path)
    config.write_text(json.dumps(settings))
    del tensors["head.packed_codes"]
    write()
    with pytest.raises(ValueError, match=r"hold the compressed head, but \['head.packed_codes'\] are missing"):
        load(tmp_path)


def test_the_dense_form_is_refused_with_advice(model):
    with pytest.raises(ValueError, match=r"for head='dense', but got Hier.*two levels.* save it with head='compact'\."):
        model.to_pretrained("dense")


def test_another_vocabulary_is_refused_with_advice(model):
    exported = model.to_pretrained()
    assert exported.resize_token_embeddings(V) is exported.get_input_embeddings()
    with pytest.raises(ValueError, match=r"new tokens have no codes\. Train a model with the new vocabulary\."):
        exported.resize_token_embeddings(V + 1)


def told(recwarn):
    return [str(warning.message) for warning in recwarn if "cannot be saved" in str(warning.message)]


def test_a_backbone_that_cannot_be_saved_is_told_without_a_form_that_there_is_not(recwarn):
    make()
    assert told(recwarn) == []
    mamba = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}
    model = make(backbone=mamba)
    (text,) = told(recwarn)
    assert text.startswith(
        "This model trains, but cannot be saved with head='compact': Expected a backbone whose cache"
    )
    assert text.endswith("two levels has no dense form either; a `VQLogitsHead` has one.")
    with pytest.raises(ValueError, match="no dense form either"):
        model.to_pretrained()
    make(partial(VQLogitsHead, codebook_size=8, bias=False), backbone=mamba)
    assert "only with head='dense'" in told(recwarn)[1]


# ---------------------------------------------------------------------- sizes


def test_sizes_are_told(caplog):
    """Of head and whole model, when it starts; and what breaking a tie costs, when the model is made."""
    tied = LlamaForCausalLM(LlamaConfig(vocab_size=V, **SHAPE, tie_word_embeddings=True))
    with caplog.at_level(logging.INFO):
        model = VQLogitsLM(tied, head=HEAD)
    size = model.head.footprint()
    assert f"the head adds {size.parameters:,}: " in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        model.initialize_head(loader())
    assert f"Output head: {size.parameters:,} parameters ({size.parameters / (V * 16):.2%} of dense)" in caplog.text
    assert f"below perplexity {model.head.ppl_floor():.2f} with this mapping" in caplog.text
    assert describe_head(model.head) in caplog.text
    whole = sum(tensor.numel() for tensor in model.to_pretrained().parameters())
    assert f"{whole:,} parameters" in describe_model(model.backbone, model.head, tied=True)


# ---------------------------------------------------------------------- the callback


def loader():
    return DataLoader([{"input_ids": row, "labels": row} for row in ids(16, 8)], batch_size=4)


class Data(LightningDataModule):
    """Rows, and the tokenizer that they came from."""

    train_dataloader = val_dataloader = staticmethod(loader)

    @property
    def tokenizer(self):
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w9", pad_token="w0")


def make_trainer(folder, *callbacks, **kwargs):
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "logger": False, "default_root_dir": folder}
    return Trainer(**quiet, callbacks=list(callbacks), **kwargs)


def test_the_callback_saves_model_and_tokenizer(tmp_path):
    model = VQLogitsLM(LLAMA, V, head=HEAD, optimizer=partial(torch.optim.Adam, lr=0.01))
    make_trainer(tmp_path, SavePretrained(str(tmp_path / "best"), monitor=None), max_epochs=2).fit(model, Data())
    loaded = load(tmp_path / "best")
    assert torch.equal(loaded(ids()).logits, model.eval()(ids()))
    assert loaded.generation_config.eos_token_id == 9
    prompt = AutoTokenizer.from_pretrained(tmp_path / "best")("w3 w6", return_tensors="pt")
    text = loaded.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(text, model.generate(prompt.input_ids, max_new_tokens=4, eos_token_id=9))


def test_the_callback_refuses_the_dense_form_before_training(model, tmp_path):
    trainer = make_trainer(tmp_path, SavePretrained(str(tmp_path / "best"), head="dense"), max_epochs=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="save it with head='compact'"):
        trainer.fit(model, Data())
    assert trainer.global_step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "best").exists()
