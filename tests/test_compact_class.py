"""`VQLogitsForCausalLM` where other programs meet it: training without logits, tracing, adapters, and our own modules.

Letters: V vocabulary.
"""

import copy
import inspect
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from test_save_pretrained import tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

from lit_logits import CausalLM, DualHeadKD, DynamicFusionDecoder, GLDFusionModule, VQLogitsLM
from lit_logits.functional.residual_rows import decode_all_rows, decode_rows
from lit_logits.modules import HierarchicalVQLogitsHead, ResidualVQLogitsHead
from lit_logits.modules.vq_logits.tables import TableCache

V = 12
IDS = torch.tensor([[3, 5, 4, 7, 3, 1], [4, 4, 8, 9, 10, 1]])
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": V}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
HEADS = {
    "residual": partial(ResidualVQLogitsHead, codebook_size=4, num_groups=4, num_stages={5: 3, V: 1}, bias=True),
    "two levels": partial(HierarchicalVQLogitsHead, codebook_sizes=(3, 5)),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "original"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, **SPECIAL)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=HEADS)
def compact(request, original, tmp_path_factory):
    torch.manual_seed(0)
    model = VQLogitsLM(original, head=HEADS[request.param])
    model.initialize_head([{"input_ids": IDS, "labels": IDS}])
    folder = tmp_path_factory.mktemp("models") / "compact"
    model.save_pretrained(folder, tokenizer=tokenizer())
    return str(folder)


@pytest.fixture
def model(compact):
    return AutoModelForCausalLM.from_pretrained(compact)


def is_residual(model):
    return isinstance(model.head, ResidualVQLogitsHead)


# ---------------------------------------------------------------------- training


def test_in_training_with_labels_no_logits_are_made(model, monkeypatch):
    """They took 819 MB where the loss takes 108."""
    loss = model(input_ids=IDS, labels=IDS).loss
    model.train()
    monkeypatch.setattr(type(model.head), "forward", lambda *_: pytest.fail("The logits are made."))
    output = model(input_ids=IDS, labels=IDS)
    assert output.logits is None
    torch.testing.assert_close(output.loss, loss)
    output.loss.backward()
    assert all(p.grad is not None for p in model.head.parameters())


def test_labels_that_are_shifted_already(model):
    logits = model(input_ids=IDS).logits
    labels = torch.tensor([[5, 4, -100, 3, 1, 6], [4, -100, 9, 10, 1, -100]])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    output = model(input_ids=IDS, shift_labels=labels)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.logits, logits)
    summed = model(input_ids=IDS, shift_labels=labels, num_items_in_batch=torch.tensor(4)).loss
    torch.testing.assert_close(summed, expected * 9 / 4)


def test_transformers_trainer_trains_and_evaluates(model, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS] * 4
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), max_steps=3, learning_rate=0.01, **settings)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_smoothed_labels_are_those_of_the_next_tokens(model, tmp_path):
    """The Trainer computes that loss by itself, and shifts labels for the classes that it knows: copying was learnt."""
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    trainer = Trainer(
        model, TrainingArguments(str(tmp_path), label_smoothing_factor=1e-6, **settings), eval_dataset=rows
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(model(input_ids=IDS, labels=IDS).loss), rel=1e-4)


# transformers 5.3 counts the first label of each row too, which has no prediction, for all models.
old_count = pytest.mark.skipif(
    "shift" not in inspect.getsource(Trainer._get_num_items_in_batch), reason="this Trainer counts one label too many"
)


@old_count
def test_accumulated_steps_are_those_of_the_whole_batch(compact, tmp_path):
    """Each part of a batch had the same say, however few of its tokens count."""
    rows = [{"input_ids": row, "labels": row.clone()} for row in IDS] * 2
    rows[0]["labels"][:4] = -100
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "optim": "sgd"}
    weights = []
    for parts in (1, 4):
        model = AutoModelForCausalLM.from_pretrained(compact)
        sizes = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, learning_rate=1.0, max_grad_norm=0, **settings, **sizes
        )
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*weights)


@pytest.mark.slow
def test_what_the_trainer_saves_loads_in_a_new_process(model, tmp_path):
    """Also its checkpoint in mid-training, from which a trainer goes on."""
    rows = [{"input_ids": row, "labels": row} for row in IDS] * 4
    settings = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
    }
    settings |= {"per_device_train_batch_size": 1, "learning_rate": 0.01}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), max_steps=4, **settings), train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    expected = model.eval()(input_ids=IDS).logits
    again = Trainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"),
        TrainingArguments(str(tmp_path), max_steps=4, **settings),
        train_dataset=rows,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(again.model.eval()(input_ids=IDS).logits, expected)
    program = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
print(model(input_ids=torch.tensor({IDS.tolist()})).logits.double().sum().item())
"""
    variables = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    assert float(done.stdout) == pytest.approx(float(expected.double().sum()), abs=1e-4)


def test_packed_texts_do_not_see_each_other(model):
    """The packing of trl and of `DataCollatorWithFlattening` tells texts apart by their positions."""
    packed, positions = IDS.flatten()[None], torch.arange(6).repeat(2)[None]
    with torch.no_grad():
        logits = model(input_ids=packed, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(logits.view(2, 6, V), model(input_ids=IDS).logits)


# ---------------------------------------------------------------------- one call outside of `no_grad`


class Calls(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def residual_head(**kwargs):
    torch.manual_seed(0)
    return ResidualVQLogitsHead(8, 30, 4, num_groups=2, token_stages=torch.arange(30) % 2 + 1, **kwargs).eval()


def test_a_graph_costs_nothing_until_it_is_walked_back():
    """The rows were decoded wherever a graph might be wanted: 162 ms instead of 2.8 outside of `no_grad`."""
    head, hidden = residual_head(), torch.randn(3, 8)
    head(hidden)  # packs the codes
    with torch.no_grad(), Calls() as without:
        expected = head(hidden)
    with Calls() as recorded:
        logits = head(hidden)
    assert logits.requires_grad
    assert "aten::embedding" not in recorded.names
    assert len(recorded.names) <= len(without.names) + 2
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("cap", [None, 0.3])
def test_its_gradient_is_that_of_the_decoded_rows(cap):
    head = residual_head(bias=True)
    head.logit_cap = cap
    torch.nn.init.normal_(head.token_bias)
    hidden, weights = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 30)
    inputs = [hidden, head.codebook, head.token_bias]
    logits = head(hidden)
    assert "LookUp" in type(logits.grad_fn).__name__
    found = torch.autograd.grad((logits * weights).sum(), inputs)
    rows = hidden @ head.dense_weight().T
    rows = rows if cap is None else cap * torch.tanh(rows / cap)
    expected = torch.autograd.grad(((rows + head.token_bias) * weights).sum(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    head.codebook.requires_grad_(False)  # as under adapters
    (ours,) = torch.autograd.grad((head(hidden) * weights).sum(), [hidden])
    torch.testing.assert_close(ours, expected[0])


# ---------------------------------------------------------------------- traced code


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


class Losses(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, labels):
        return self.model(input_ids=ids, labels=labels, use_cache=False).loss


# What transformers puts around `forward` reads `co_varnames`, which torch 2.6 cannot trace in any of its models.
old_dynamo = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="torch cannot trace transformers' models"
)


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize(
    "way", [pytest.param("export", marks=old_dynamo), "trace", pytest.param("compile", marks=old_dynamo)]
)
def test_traced_code_gives_the_logits(model, way, with_grad):
    """They looked at addresses and versions of tensors."""
    with torch.set_grad_enabled(with_grad):
        expected = model(input_ids=IDS).logits
        if way == "export":
            program = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False})
            logits = program.module()(input_ids=IDS, use_cache=False).logits
        elif way == "trace":
            logits = torch.jit.trace(Logits(model), IDS, check_trace=False)(IDS)
        else:
            logits = torch.compile(Logits(model), fullgraph=True, backend="eager")(IDS)
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    "way", [pytest.param("export", marks=old_dynamo), "trace", pytest.param("compile", marks=old_dynamo)]
)
def test_traced_code_gives_the_loss(model, way):
    """Which labels count is not known while code is traced."""
    labels = IDS.clone()
    labels[0, 2:4] = -100
    expected = model(input_ids=IDS, labels=labels).loss
    given = {"input_ids": IDS, "labels": labels, "use_cache": False}
    if way == "export":
        loss = torch.export.export(model, (), given).module()(**given).loss
    elif way == "trace":
        loss = torch.jit.trace(Losses(model), (IDS, labels), check_trace=False)(IDS, labels)
    else:
        loss = torch.compile(model, fullgraph=True, backend="eager")(**given).loss
    torch.testing.assert_close(loss, expected)


@old_dynamo
def test_an_exported_program_takes_other_lengths(model):
    length = {"input_ids": {1: torch.export.Dim("T", min=2, max=64)}, "use_cache": None}
    program = torch.export.export(model, (), {"input_ids": IDS, "use_cache": False}, dynamic_shapes=length)
    ids = torch.randint(V, (2, 11))
    logits = program.module()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, model(input_ids=ids).logits)


def test_a_copy_and_a_moved_model_are_unpacked_to_be_traced(model):
    for other in (copy.deepcopy(model).eval(), copy.deepcopy(model).double()):
        expected = other.double()(input_ids=IDS).logits
        logits = torch.jit.trace(Logits(other.double()), IDS, check_trace=False)(IDS)
        torch.testing.assert_close(logits, expected)
    with pytest.raises(RuntimeError, match=r"Expected a model that has run, or was switched to `eval\(\)`"):
        TableCache().kept("stages")


@pytest.mark.slow
def test_onnx(model, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(Logits(model), (IDS,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: IDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(input_ids=IDS).logits.detach())


def test_all_rows_at_once_are_those_of_the_chunks():
    head = residual_head()
    for codebooks in (head.codebook, head.codebook.double()):
        stages = head.stages()
        assert torch.equal(decode_all_rows(codebooks, stages), decode_rows(codebooks, stages, 30))


# ---------------------------------------------------------------------- the output layer, adapters


def test_the_output_layer_gives_the_logits(model):
    output = model.get_output_embeddings()
    hidden = model.base_model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(output(hidden), model(input_ids=IDS).logits)
    if is_residual(model):
        dense = torch.nn.functional.linear(hidden, output.weight, output.bias)
        torch.testing.assert_close(dense, model(input_ids=IDS).logits)
        dense.sum().backward()
        assert model.head.codebook.grad.abs().sum() > 0


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_peft_finds_the_layers_of_the_backbone(compact, targets):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(compact)
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    names = peft.get_peft_model(model, config).targeted_module_names
    assert "model.layers.0.self_attn.q_proj" in names
    assert not [name for name in names if "head" in name]


def test_peft_may_be_imported_after_the_model_is_made(compact):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(compact)
    for layers in vars(peft.utils.constants).values():  # as they are at first
        if isinstance(layers, dict):
            layers.pop(model.config.model_type, None)
    names = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM")).targeted_module_names
    assert "model.layers.0.self_attn.q_proj" in names


def test_two_levels_say_that_they_have_no_rows(compact):
    """trl ended with "object has no attribute 'weight'"."""
    model = AutoModelForCausalLM.from_pretrained(compact)
    if is_residual(model):
        assert model.get_output_embeddings().weight.shape == (V, 16)
        return
    head: Any = model.head
    assert not hasattr(head, "weight")
    with pytest.raises(
        AttributeError, match=r"two levels of codes equal no dense layer\. Let the program take the loss"
    ):
        _ = head.weight
    with pytest.raises(AttributeError, match="no attribute 'wait'"):
        _ = head.wait


def sft_trainer(model):
    """Return trl's trainer as docs/how_to/use_saved_models.md says: two levels have no rows that it could read."""
    pytest.importorskip("trl")
    from trl import SFTTrainer

    class LossOfTheModel(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, *args, **kwargs)

    return SFTTrainer if is_residual(model) else LossOfTheModel


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "packing", "lora"])
def test_trl(model, compact, way, tmp_path):
    trainer_class = sft_trainer(model)
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig

    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    settings |= {"max_steps": 2, "max_length": 18, "learning_rate": 0.01, "packing": way == "packing"}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    before = model.head.codebook.detach().clone() if is_residual(model) else model.head.codes.detach().clone()
    text, words = "word1 word2 word3 word4 word2", AutoTokenizer.from_pretrained(compact)
    row = torch.tensor([[*words(text).input_ids, words.eos_token_id]])
    expected = float(model(input_ids=row, labels=row).loss)
    trainer = trainer_class(
        model,
        SFTConfig(str(tmp_path), **settings),
        train_dataset=Dataset.from_dict({"text": [text] * 32}),
        eval_dataset=Dataset.from_dict({"text": [text] * 4}),
        processing_class=words,
        peft_config=LoraConfig(r=2, target_modules="all-linear") if way == "lora" else None,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[1] < losses[0]
    after = model.head.codebook if is_residual(model) else model.head.codes
    assert torch.equal(after, before) == (way == "lora")


# ---------------------------------------------------------------------- our own modules


BATCH = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}


def test_a_compact_model_is_trained_further_by_cross_entropy(compact, tmp_path):
    lm = CausalLM(compact)
    losses = lm._losses(BATCH).ce
    total, count = losses.sum(), len(losses)
    torch.testing.assert_close(total / count, AutoModelForCausalLM.from_pretrained(compact)(**BATCH).loss)
    total.backward()
    assert all(p.grad is not None for p in lm.model.head.parameters())
    lm.save_pretrained(tmp_path / "saved", tokenizer=tokenizer())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(input_ids=IDS).logits, lm.model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("role", ["large", "expert"])
def test_a_compact_model_is_fused(compact, original, role):
    parts = (compact, original, [original]) if role == "large" else (original, original, [compact])
    decoder = DynamicFusionDecoder(*parts, static_alpha=[1.0])
    models = [AutoModelForCausalLM.from_pretrained(path)(input_ids=IDS).logits for path in (*parts[:2], parts[2][0])]
    expected = (models[0] + models[2] - models[1]).log_softmax(-1)
    torch.testing.assert_close(decoder(IDS).log_softmax(-1), expected)


@pytest.mark.parametrize("role", ["pivot", "source"])
def test_a_compact_model_learns_from_others_and_teaches(compact, original, role, monkeypatch):
    pivot, source = (compact, original) if role == "pivot" else (original, compact)
    module = GLDFusionModule(pivot, {"big": source}, top_k=4)
    monkeypatch.setattr(GLDFusionModule, "log", lambda *_, **__: None)
    monkeypatch.setattr(GLDFusionModule, "log_dict", lambda *_, **__: None)
    loss = module.training_step(BATCH, 0)
    loss.backward()
    assert all(p.grad is not None for p in module.pivot.get_output_embeddings().parameters())
    logits = AutoModelForCausalLM.from_pretrained(source)(input_ids=IDS).logits
    top = module.sources["big"](BATCH, 4, 1.0).top_k
    expected = logits.log_softmax(-1).topk(4).values
    torch.testing.assert_close(top.log_probs[0, 0], expected[0, 0], atol=1e-3, rtol=1e-3)


def test_a_compact_teacher_is_welcome_and_a_student_is_told_what_to_do(compact, original):
    losses = DualHeadKD(original, compact).losses(BATCH)
    assert all(bool(loss.isfinite()) for loss in losses)
    with pytest.raises(ValueError, match=r"compressed\. Distil into the original model and compress it afterwards"):
        DualHeadKD(compact, original)


def test_what_is_compressed_is_not_compressed_again(compact):
    with pytest.raises(ValueError, match=r"has a compressed head already\. Train it further with `CausalLM`"):
        VQLogitsLM(compact, head=HEADS["residual"])


def test_the_pipeline_of_transformers(compact):
    [found] = pipeline("text-generation", compact)("word1 word2", max_new_tokens=3)
    assert found["generated_text"].startswith("word1 word2")
