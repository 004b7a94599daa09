"""Saved compressed models: what transformers loads, generates and tunes, and when a callback or a recipe saves.

Letters: T sequence, V vocabulary.
"""

import copy
import inspect
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from compressed_models import compress, started_model, trained_folder  # noqa: F401  # fixtures by name
from lightning.pytorch import Callback
from tiny_vq_models import T, V, loader, make_trainer, pretrained, rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_logits import VQLogitsLM
from lit_logits.callbacks import SavePretrained
from lit_logits.cli import main
from lit_logits.modules import DenseLogitsHead, ResidualVQLogitsHead, VQLogitsForCausalLM

# --- export ---


@pytest.mark.parametrize("head", ["compact", "dense"])
def test_a_saved_model_gives_the_logits_of_training(started, tmp_path, head):
    started.save_pretrained(tmp_path / "saved", head=head)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.randint(V, (3, T))
    torch.testing.assert_close(loaded(ids).logits, started(ids), rtol=1e-5, atol=1e-5)
    assert type(loaded) is (VQLogitsForCausalLM if head == "compact" else LlamaForCausalLM)
    assert loaded(ids, logits_to_keep=1).logits.shape == (3, 1, V)
    loss = loaded(ids, labels=ids).loss
    expected = torch.nn.functional.cross_entropy(started(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_the_papers_head_is_saved_too(folder, tmp_path):
    model = compress(folder, num_groups=1, num_stages=1, codebook_size=20, bias=True)
    model.initialize_head(loader())
    model.eval().save_pretrained(tmp_path / "saved")
    ids = torch.randint(V, (3, T))
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, model(ids))
    with pytest.raises(ValueError, match="Expected a head without a token bias"):
        model.save_pretrained(tmp_path / "dense", head="dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("head", ["compact", "dense"])
@pytest.mark.parametrize("sampled", [False, True])
def test_generation_left_padded_and_batched_equals_one_by_one(started, head, sampled):
    model = started.to_pretrained(head)
    long, short = torch.randint(1, V - 1, (1, 9)), torch.randint(1, V - 1, (1, 4))
    batch = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    options = {"max_new_tokens": 6, "do_sample": sampled, **({"top_k": 1} if sampled else {})}
    together = model.generate(batch, attention_mask=mask, **options)[:, 9:]
    alone = [
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :] for ids in (long, short)
    ]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours[: len(theirs)].tolist() == theirs.tolist()
    uncached = model.generate(long, attention_mask=torch.ones_like(long), use_cache=False, **options)[0, 9:]
    assert uncached.tolist() == alone[0].tolist()
    if not sampled:
        assert together[0].tolist() == started.generate(long, max_new_tokens=6)[0, 9:].tolist()[: len(together[0])]


def test_a_compact_folder_loads_and_generates(started, tmp_path):
    started.save_pretrained(tmp_path / "saved", tokenizer=tokenizer())
    prompt = AutoTokenizer.from_pretrained(tmp_path / "saved")("w3 w6 w9", return_tensors="pt").input_ids
    assert prompt.tolist() == [[3, 6, 9]]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    expected = started.to_pretrained().generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(prompt, max_new_tokens=4, do_sample=False), expected)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{V - 1}", pad_token="w0")


def test_a_saved_model_can_be_saved_again_and_in_half_precision(started, tmp_path):
    started.save_pretrained(tmp_path / "first", dtype=torch.bfloat16)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert first.dtype == torch.bfloat16
    assert started.head.codebook.dtype == torch.float32
    first.save_pretrained(tmp_path / "second")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    ids = torch.randint(V, (2, T))
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert (first(ids).logits - started(ids)).abs().max() < 0.2


def test_a_cut_off_or_foreign_folder_is_refused(started, tmp_path):
    from safetensors.torch import load_file, save_file

    started.save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="Expected the weights of a compressed model, but reading them failed"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors["head.packed_stages"] = torch.zeros_like(tensors["head.packed_stages"])
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the mapping is cut off or another head's"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tensors = load_file(weights)
    tensors["head.packed_codes"] = tensors["head.packed_codes"][:-3].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="Expected weights of the sizes that the folder's config names"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_folder_without_its_head_is_refused(started, tmp_path):
    from safetensors.torch import load_file, save_file

    started.save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(weights)
    for name in ("head.packed_codes", "head.codebook"):
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        save_file(rest, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"Expected the folder to hold the compressed head, but \['{name}'\]"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_loaded_model_is_tuned_with_accumulation(started, tmp_path):
    """With transformers' Trainer, whose accumulation takes a model with `**kwargs` for one that divides by itself."""
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows(8)]
    started.save_pretrained(tmp_path / "compact")
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "compact"), arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # The one step reads all rows.
    ids, labels = (torch.stack([torch.as_tensor(row[name]) for row in data]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        mean = torch.nn.functional.cross_entropy(started(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    # transformers 5.3 divides the sum by the labels of all positions, of which the first has no prediction.
    shifts = "shift" in inspect.getsource(Trainer._get_num_items_in_batch)
    expected = float(mean) if shifts else float(mean) * labels[:, 1:].numel() / labels.numel()
    assert losses == pytest.approx([expected], rel=1e-3)


def test_a_loaded_model_answers_as_transformers_own(started):
    model = started.to_pretrained()
    ids = torch.randint(V, (2, T))
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)
    assert (model.config.vocab_size, model.config.hidden_size) == (V, 16)
    assert model.resize_token_embeddings() is model.resize_token_embeddings(V) is model.get_input_embeddings()
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    mask = torch.ones_like(ids)
    beams = [started.to_pretrained(h).generate(ids, attention_mask=mask, **options) for h in ("compact", "dense")]
    assert torch.equal(*beams)


def test_exporting_in_the_middle_of_training_leaves_the_modes(started, tmp_path):
    started.train()
    started.save_pretrained(tmp_path / "saved")
    assert all(module.training for module in (started, started.backbone, started.head))


def test_a_compact_head_cannot_be_resized(started):
    model = started.to_pretrained()
    with pytest.raises(ValueError, match="Expected the vocabulary that the output head was compressed for"):
        model.resize_token_embeddings(V + 3)
    assert started.to_pretrained("dense").get_output_embeddings().weight.shape == (V, 16)


def test_nothing_half_written_is_left(started, tmp_path, monkeypatch):
    started.save_pretrained(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    monkeypatch.setattr(VQLogitsForCausalLM, "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        started.save_pretrained(tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if "saved" in path.name] == ["saved"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'thesis\.txt'"):
        started.save_pretrained(tmp_path / "other")


def test_a_model_without_an_output_layer_and_a_dense_head_are_refused(folder):
    from transformers import AutoModel

    with pytest.raises(ValueError, match="output layer"):
        compress(AutoModel.from_pretrained(folder))
    dense = VQLogitsLM(folder, head=partial(DenseLogitsHead, bias=False))
    with pytest.raises(ValueError, match=r"for head='compact', .*but got DenseLogitsHead\. Use head='dense'"):
        dense.to_pretrained()
    ids = torch.randint(V, (2, T))
    torch.testing.assert_close(dense.to_pretrained("dense")(ids).logits, dense.eval()(ids))
    with pytest.raises(ValueError, match="'compact' or 'dense', but got 'gguf'"):
        compress(folder).to_pretrained("gguf")


def test_an_untied_model_with_a_bias_of_its_own_is_compressed(tmp_path):
    """GPT-2 has no bias in its output layer, but its base model is called otherwise."""
    pretrained("gpt2", tmp_path / "original")
    model = compress(str(tmp_path / "original"))
    model.initialize_head(loader())
    ids = torch.randint(V, (2, T))
    for head in ("compact", "dense"):
        model.eval().save_pretrained(tmp_path / head, head=head)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / head)
        torch.testing.assert_close(loaded(ids).logits, model(ids), rtol=1e-5, atol=1e-5)


# --- the callback and the command line ---


class Snapshots(Callback):
    """Moves the codebooks by so much before each validation, and keeps the model as it is then, with its KL."""

    def __init__(self, noise):
        self.noise, self.taken = noise, []

    def on_train_start(self, trainer, pl_module):
        self.start = pl_module.head.codebook.detach().clone()
        self.direction = torch.randn(self.start.shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def on_validation_start(self, trainer, pl_module):
        pl_module.head.codebook.copy_(self.start + self.noise[len(self.taken)] * self.direction)

    def on_validation_end(self, trainer, pl_module):
        kl = float(trainer.callback_metrics["val/kl"])
        self.taken.append((kl, copy.deepcopy(pl_module.to_pretrained("dense"))))


@pytest.mark.parametrize("head", ["compact", "dense"])
def test_the_best_compressed_model_is_saved(folder, tmp_path, head):
    """The best comes in the middle, whatever the processor's arithmetic makes of training: the rate is 0."""
    model, snapshots = compress(folder, optimizer=partial(torch.optim.SGD, lr=0.0)), Snapshots([0.2, 0.0, 0.4, 0.8])
    callback = SavePretrained(str(tmp_path / "best"), monitor="val/kl", head=head)
    trainer = make_trainer(tmp_path, max_epochs=4, num_sanity_val_steps=0, callbacks=[callback, snapshots])
    trainer.fit(model, loader(), loader(8, seed=1))
    losses = [kl for kl, _ in snapshots.taken]
    assert sorted(range(4), key=losses.__getitem__) == [1, 0, 2, 3]
    best = snapshots.taken[1][1]
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "best"), torch.randint(V, (2, T))
    torch.testing.assert_close(loaded(ids).logits, best(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_saved_is_refused_before_any_training(folder, tmp_path):
    model = compress(folder, bias=True)
    trainer = make_trainer(tmp_path, callbacks=[SavePretrained(str(tmp_path / "best"), head="dense")])
    with pytest.raises(ValueError, match="Expected a head without a token bias"):
        trainer.fit(model, loader(), loader())
    assert trainer.global_step == 0
    assert model.backbone.training


@pytest.mark.slow
def test_the_recipe_compresses_a_model_from_the_command_line(tmp_path, monkeypatch):
    """The recipe that ships, with a small model, text and steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from lit_logits.datamodules import TextDataModule

    texts = [
        f"The following holds for {x} and {x + y}: " + f"{x} plus {y} is {x + y}. " * 9
        for x in range(40)
        for y in (2, 5)
    ]
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = TextDataModule("texts.jsonl", bpe_vocab_size=300)
    data.prepare_data()
    data.tokenizer.save_pretrained("model")
    config = LlamaConfig(
        vocab_size=data.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained("model")
    options = {
        "model.init_args.backbone": "model",
        "data.init_args.source": "texts.jsonl",
        "data.init_args.tokenizer": "model",
        "data.init_args.block_size": 32,
        "model.init_args.head.init_args.num_groups": 4,
        "model.init_args.head.init_args.codebook_size": 32,
        "model.init_args.head.init_args.byte_budget": 0.9,
        "model.init_args.calibration_batches": 4,
        "model.init_args.num_trainable_layers": 1,
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 2,
        "trainer.limit_val_batches": 2,
        "trainer.accelerator": "cpu",
    }
    main(["fit", "--config", "vq_compress.yaml", *(f"--{name}={value}" for name, value in options.items())])
    loaded = AutoModelForCausalLM.from_pretrained("models/smollm2_compact")
    assert isinstance(loaded.head, ResidualVQLogitsHead)
    assert loaded.config.num_groups == 4
    ids = data.tokenizer("The following", return_tensors="pt").input_ids
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
    assert yaml.safe_load(next((tmp_path / "runs").rglob("config.yaml")).read_text())
