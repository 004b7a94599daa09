"""`DualHeadKD` with transformers' models: tokens of causal language models, images, sequences, and their export."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lit_logits import DualHeadKD
from lit_logits.functional import dkd_loss, logit_loss, standardize_logits
from lit_logits.modules.dual_head_kd.classifiers import find_classifier, is_causal_lm, load_classifier

V, T = 37, 9
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
BERT = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": V}
VIT = {"model_type": "vit", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 8}


def llama(hidden_size=16, seed=0, **kwargs):
    torch.manual_seed(seed)
    settings = {**LLAMA, "hidden_size": hidden_size, "vocab_size": V, **kwargs}
    settings.pop("model_type")
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():  # far from uniform
        model.get_output_embeddings().weight.mul_(30)
    return model


def tokens(count=8, seed=0, ragged=True):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for ids in torch.randint(V, (count, T), generator=generator):
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        if ragged:
            length = int(torch.randint(4, T + 1, (), generator=generator))
            row["attention_mask"][length:] = 0
            row["labels"][length:] = -100
            row["labels"][:2] = -100  # a prompt
        rows.append(row)
    return rows


def batch_of(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def make(method="dual_head", **kwargs):
    student, teacher = llama(seed=1), llama(hidden_size=32, seed=2)
    return DualHeadKD(student, teacher, method=method, **kwargs)


def fit(model, data, steps=2, **kwargs):
    settings = {"max_steps": steps, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(**{**settings, **quiet, **kwargs})
    trainer.fit(model, DataLoader(data, batch_size=4))
    return trainer


# --- tokens ---


@pytest.mark.parametrize("kind", ["kl", "binary_kl_norm"])
@pytest.mark.parametrize("method", ["kd", "single_head", "dual_head"])
@pytest.mark.parametrize("aux_head", ["linear", "nonlinear"])
def test_chunked_token_losses_are_those_of_all_logits_at_once(method, kind, aux_head):
    model = make(method, kd_loss=kind, aux_head=aux_head, chunk_size=5).double().eval()
    batch = batch_of(tokens())
    ce, kd = model.losses(batch)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    counted = batch["labels"][:, 1:] != -100
    logits = model.student(**inputs).logits[:, :-1][counted]
    hidden = model.student.model(**inputs).last_hidden_state[:, :-1][counted]
    student = logits if model.net.aux_head is None else model.net.aux_head(hidden)
    teacher = model.teacher.model(**inputs).logits[:, :-1][counted]
    expected_ce = F.cross_entropy(logits, batch["labels"][:, 1:][counted])
    expected_kd = logit_loss(student, teacher, kind=kind, temperature=model.temperature)
    torch.testing.assert_close(ce, expected_ce)
    torch.testing.assert_close(kd, expected_kd)
    parameters = list(model.net.parameters())
    chunked = torch.autograd.grad(ce + kd, parameters, allow_unused=True)
    whole = torch.autograd.grad(expected_ce + expected_kd, parameters, allow_unused=True)
    for a, b in zip(chunked, whole, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # norms of Llama are float32 in any dtype


def test_what_a_batch_holds_besides_the_tokens_does_not_reach_the_models():
    """As of `InstructionDataModule`, with rows, ids, and the same examples in other tokens."""
    data = tokens(4)
    for number, row in enumerate(data):
        row |= {"rows": torch.tensor(number), "sample_ids": torch.tensor(2**62), "response_ends": row["labels"] * 0}
    plain = ("input_ids", "attention_mask", "labels")
    other = {**batch_of([{name: row[name] for name in plain} for row in data]), "tokenizer_id": torch.tensor(1)}

    def collate(rows):
        return {**batch_of(rows), "tokenizer_id": torch.tensor(7), "sources": {"other": other}}

    batch = collate(data)
    model = make(optimizer=lambda p: torch.optim.Adam(p, lr=0.01)).eval()
    for a, b in zip(model.losses(batch), model.losses({name: batch[name] for name in plain}), strict=True):
        assert torch.equal(a, b)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
    loader = DataLoader(data, batch_size=2, collate_fn=collate)
    trainer.fit(model, loader)
    assert trainer.validate(model, loader, verbose=False)[0]["val/ppl"] > 1
    assert trainer.predict(model, loader)[0]["logits"].shape == (2, T, V)
    positions = torch.arange(T).expand(4, T)
    shifted = model.losses({**batch, "position_ids": positions.flip(1)})
    assert not torch.equal(shifted.ce, model.losses({**batch, "position_ids": positions}).ce)


def test_masked_positions_do_not_count():
    """Padding cut off, and what stands at ignored labels' hidden positions, change nothing."""
    model = make().double().eval()
    (row,) = tokens(1, seed=3)
    length = int(row["attention_mask"].sum())
    cut = {key: value[:length] for key, value in row.items()}
    for a, b in zip(model.losses(batch_of([row])), model.losses(batch_of([cut])), strict=True):
        torch.testing.assert_close(a, b)


def test_token_losses_of_the_field_in_chunks_are_those_of_all_logits_at_once():
    model = make(kd_loss="dkd", standardize=True, label_smoothing=0.1, chunk_size=5).double().eval()
    batch = batch_of(tokens())
    ce, kd = model.losses(batch)
    mask = batch["labels"][:, 1:] != -100
    labels = batch["labels"][:, 1:][mask]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = model.student(**inputs, output_hidden_states=True)
    torch.testing.assert_close(ce, F.cross_entropy(output.logits[:, :-1][mask], labels, label_smoothing=0.1))
    student = standardize_logits(model.net.aux_head(output.hidden_states[-1][:, :-1][mask]))
    teacher = standardize_logits(model.teacher.model(**inputs).logits[:, :-1][mask])
    torch.testing.assert_close(kd, dkd_loss(student, teacher, labels, alpha=1.0, beta=8.0, temperature=2.0))


def test_tokens_without_labels_learn_from_the_teacher_alone():
    """All tokens but padding count then; it was a KeyError."""
    model = make().double().eval()
    batch = batch_of(tokens())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ce, kd = model.losses(inputs)
    assert ce == 0
    every = {**inputs, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    torch.testing.assert_close(kd, model.losses(every).kd)
    rows = [{name: row[name] for name in inputs} for row in tokens()]
    assert fit(make(), rows).callback_metrics["train/loss_ce"] == 0


def test_what_needs_whole_batches_is_refused_for_tokens():
    for kwargs in ({"kd_loss": "mlkd"}, {"class_weights": [1.0] * V}):
        with pytest.raises(ValueError, match=r"Expected a classifier for .*, but got a causal language model"):
            make(**kwargs)


def test_no_token_that_counts_is_a_zero_with_a_graph():
    model = make()
    batch = batch_of(tokens())
    batch["labels"][:] = -100
    ce, kd = model.losses(batch)
    assert ce == kd == 0
    (ce + kd).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.net.parameters())


def test_no_tensor_of_all_tokens_by_vocabulary_is_saved():
    model, saved = make(chunk_size=4), []
    batch = batch_of(tokens(8))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        ce, kd = model.losses(batch)
    assert int((batch["labels"][:, 1:] != -100).sum()) > 4
    assert not [shape for shape in saved if len(shape) > 1 and shape[-1] == V and shape[:-1].numel() > 4]
    (ce + kd).backward()


@pytest.mark.parametrize("mode", ["none", "backbone", "all"])
def test_language_model_trains_and_logs_perplexity(mode):
    model = make(grad_align=mode, optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = fit(model, tokens(16), steps=4)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert ("kd/conflict" in trainer.callback_metrics) == (mode != "none")
    (result,) = trainer.validate(model, DataLoader(tokens(5, seed=9), batch_size=2), verbose=False)
    model.eval()
    batch = batch_of(tokens(5, seed=9))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    nll = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert result["val/loss"] == pytest.approx(nll.item(), rel=1e-5)
    assert result["val/ppl"] == pytest.approx(nll.exp().item(), rel=1e-5)


def test_vocabularies_that_differ_are_named():
    with pytest.raises(ValueError, match="LlamaForCausalLM has 37 and LlamaForCausalLM has 40"):
        DualHeadKD(llama(), llama(vocab_size=40))
    with pytest.raises(ValueError, match="two classifiers or two causal language models"):
        DualHeadKD(llama(), torch.nn.Linear(4, V))


def test_models_that_transform_hidden_states_before_their_output_layer_are_refused():
    from transformers import BertConfig, BertLMHeadModel

    bert = BertLMHeadModel(
        BertConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            is_decoder=True,
        )
    )
    with pytest.raises(ValueError, match="BertLMHeadModel transforms it in between"):
        DualHeadKD(bert, method="ce")


def test_pretrained_body_gets_a_new_head_as_a_student_and_is_refused_as_a_teacher(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(
        BertConfig(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("BertForMaskedLM", "BertForSequenceClassification"))
    model = DualHeadKD(str(tmp_path), method="ce", num_classes=5)
    assert model.net.num_classes == 5
    with pytest.raises(ValueError, match=r"its weights lack .*which would be random"):
        DualHeadKD(str(tmp_path), str(tmp_path), num_classes=5)


def test_student_from_a_config_takes_the_vocabulary():
    model = DualHeadKD(LLAMA, llama(), num_classes=V)
    assert is_causal_lm(model.student)
    assert model.student.get_output_embeddings().weight.shape == (V, 16)


def test_exported_language_model_is_a_plain_folder(tmp_path):
    model = make(optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
    fit(model, tokens(16))
    model.eval()
    model.export(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    batch = batch_of(tokens(4, ragged=False))
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(loaded(batch["input_ids"]).logits, model(input_ids=batch["input_ids"]).logits)
    assert not [name for name in loaded.state_dict() if "aux" in name]


def test_teacher_from_a_folder(tmp_path):
    teacher = llama(seed=4)
    teacher.save_pretrained(tmp_path / "teacher")
    model = DualHeadKD(LLAMA, str(tmp_path / "teacher"), num_classes=V)
    for a, b in zip(model.teacher.model.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="could not be loaded"):
        DualHeadKD(LLAMA, str(tmp_path / "nowhere"), num_classes=V)


# --- images and sequences ---


def test_pairs_reach_models_of_transformers_by_the_name_of_their_input():
    vit = {**VIT, "patch_size": 4, "num_attention_heads": 2}
    student, teacher = (load_classifier(vit, num_classes=3) for _ in range(2))
    model = DualHeadKD(student, teacher).eval()
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    expected = model.losses({"pixel_values": x, "labels": y})
    torch.testing.assert_close(model.losses((x, y)), expected)
    torch.testing.assert_close(model.losses({"pixel_values": x, "labels": y, "rows": y}), expected)


def test_image_classifiers_of_transformers():
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.tensor(i % 4)} for i in range(8)]
    vit = {**VIT, "num_attention_heads": 2, "patch_size": 4}
    model = DualHeadKD(vit, load_classifier(vit, 4), num_classes=4)
    assert model.net.classifier_name == "classifier"
    fit(model, data)
    output = model.net({"pixel_values": torch.stack([row["pixel_values"] for row in data])})
    assert output.logits.shape == output.aux_logits.shape == (8, 4)
    assert output.features.shape == (8, 16)
    torch.testing.assert_close(model.net.main_head(output.features), output.logits)


@pytest.mark.parametrize("config", [{**BERT, "num_attention_heads": 2}, "gpt2"], ids=["bert", "gpt2"])
def test_sequence_classifiers_of_transformers(config, tmp_path):
    """GPT-2 scores every position and picks the last one that is no padding: features are picked with it."""
    if config == "gpt2":
        from transformers import GPT2Config, GPT2ForSequenceClassification

        make_one = lambda: GPT2ForSequenceClassification(  # noqa: E731
            GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=0)
        )
        student, teacher = make_one(), make_one()
    else:
        student, teacher = load_classifier(config, 3), load_classifier(config, 3)
    data = []
    for i, row in enumerate(tokens(8)):
        ids = row["input_ids"].clamp(min=1).masked_fill(row["attention_mask"] == 0, 0)
        data.append({"input_ids": ids, "attention_mask": row["attention_mask"], "labels": torch.tensor(i % 3)})
    model = DualHeadKD(student, teacher)
    fit(model, data)
    model.eval()
    batch = batch_of(data)
    labels = batch.pop("labels")
    output = model.net(batch)
    assert output.features.shape == (8, 16)
    torch.testing.assert_close(model.net.main_head(output.features), output.logits)
    assert torch.isfinite(model.losses({**batch, "labels": labels}).kd)
    model.export(tmp_path / "student")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    torch.testing.assert_close(loaded(**batch).logits, output.logits)


def test_last_layer_is_told_by_timm():
    class Timm(torch.nn.Module):
        """What timm's models have."""

        def __init__(self):
            super().__init__()
            self.fc_norm, self.other, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def get_classifier(self):
            return self.head

    assert find_classifier(Timm()) == "head"
