"""Evaluation on several processes: each row counts once, whatever the data module, and no rank waits for another."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer
from scripts import run_script
from torch import nn

from lit_logits import CausalLM, DualHeadKD, DynamicFusionDecoder, GLDFusionModule, VQLogitsLM
from lit_logits.callbacks import PredictionWriter
from lit_logits.datamodules import (
    ImageDataModule,
    InstructionDataModule,
    PairSource,
    SequenceDataModule,
    SequenceSource,
    TextDataModule,
)
from lit_logits.modules import VQLogitsHead
from lit_logits.modules.dual_head_kd.classifiers import load_classifier

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "initializer_range": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts and questions with choices; caches and tokenizers are made here."""
    folder = tmp_path_factory.mktemp("rows")
    texts = [{"text": f"The square of {n} is {n * n}. " * 3} for n in range(60)]
    questions = [
        {"prompt": f"{n} and {n + 1}?", "options": [str(2 * n + 1), f"about {n}", "no"][: 2 + n % 2], "right": n % 2}
        for n in range(41)
    ]
    for question in questions:
        question["full"] = question["options"][question["right"]]
    for name, rows in (("texts", texts), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in KINDS:
        make_data(kind, folder).prepare_data()
    return folder


def make_data(kind, folder):
    small = {"cache_dir": str(folder / "cache"), "val_fraction": 0.2, "test_fraction": 0.3, "batch_size": 2}
    if kind == "text":
        return TextDataModule(str(folder / "texts.jsonl"), bpe_vocab_size=300, block_size=29, **small)
    if kind == "images":
        return ImageDataModule("digits", **small | {"batch_size": 256})
    if kind == "sequences":
        source = SequenceSource(str(folder / "questions.jsonl"), text_column="full", label_column="right")
        return SequenceDataModule(source, bpe_vocab_size=300, **small)
    columns = {"choices": {"choices_column": "options", "answer_column": "right"}, "pairs": {"response_column": "full"}}
    source = PairSource(str(folder / "questions.jsonl"), **columns[kind])
    return InstructionDataModule(source, bpe_vocab_size=300, max_test_rows=5, **small)


KINDS = ["text", "images", "choices", "pairs", "sequences"]
METHODS = {**{kind: kind for kind in KINDS}, "vq": "text"}  # each with its data


def loaders(kind, folder, split, world_size):
    for rank in range(world_size):
        data = make_data(kind, folder)
        data.setup()
        data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, state=SimpleNamespace(fn=None))
        yield getattr(data, f"{split}_dataloader")()


def samples(batches):
    """Each sample that counts, as text."""
    rows = []
    for batch in batches:
        for index in range(len(batch["labels"])):
            own = {name: batch[name][index] for name in ("input_ids", "pixel_values", "labels") if name in batch}
            if (own["labels"] != -100).any():
                kept = batch["attention_mask"][index].bool() if "attention_mask" in batch else ...
                rows.append(str([(value[kept] if value.ndim else value).tolist() for value in own.values()]))
    return sorted(rows)


@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_count_each_row_once_in_equally_many_batches(folder, kind, split, world_size):
    """Also a choice's sequences, of a question that fills up, and of fewer questions than ranks."""
    [whole] = [samples(loader) for loader in loaders(kind, folder, split, 1)]
    ranks = list(loaders(kind, folder, split, world_size))
    batches = [list(loader) for loader in ranks]
    assert {len(rank) for rank in batches} == {len(ranks[0])}
    assert len(ranks[0].dataset) % world_size == 0
    assert sorted(row for rank in batches for row in samples(rank)) == whole
    assert len(whole) == len(set(whole)) or kind == "text"


@pytest.mark.parametrize("kind", ["text", "images", "sequences"])
def test_ranks_predict_each_row_once(folder, kind):
    """All rows that they get, those without labels too."""
    [[*whole]] = loaders(kind, folder, "predict", 1)
    ranks = list(loaders(kind, folder, "predict", 5))
    batches = [list(loader) for loader in ranks]
    assert [len(rank) for rank in batches] == [len(rank) for rank in ranks]
    sizes = [sum(len(batch["labels"]) for batch in rank) for rank in batches]
    assert sum(sizes) == sum(len(batch["labels"]) for batch in whole)
    assert max(sizes) - min(sizes) == 1
    assert sorted(row for rank in batches for row in samples(rank)) == samples(whole)


def test_the_run_folder_is_asked_for_by_ranks_that_get_no_batch_too(folder, tmp_path, monkeypatch):
    """Ranks ask for it together, and those with fewer batches would leave the others waiting."""
    asked = []
    monkeypatch.setattr(Trainer, "log_dir", property(lambda _: asked.append(1) or str(tmp_path)))
    data = make_data("images", folder)
    trainer = Trainer(accelerator="cpu", callbacks=[PredictionWriter()], **QUIET)
    trainer.predict(make_model("images", data), data, return_predictions=False)
    assert len(list(tmp_path.glob("predictions/*.pt"))) == 3
    assert len(asked) == 2  # once by Lightning


def make_model(kind, data):
    torch.manual_seed(0)
    if kind == "text":
        return CausalLM(LLAMA, vocab_size=data.vocab_size)
    if kind == "vq":
        return VQLogitsLM(LLAMA, vocab_size=data.vocab_size, head=partial(VQLogitsHead, codebook_size=8))
    if kind == "images":
        nets = [nn.Sequential(nn.Flatten(), nn.Linear(192, 10)) for _ in range(2)]
        return DualHeadKD(*nets, num_classes=10)
    if kind == "sequences":
        config = {**LLAMA, "model_type": "bert", "vocab_size": data.vocab_size}
        return DualHeadKD(*(load_classifier(config, data.num_classes) for _ in range(2)))
    models = [CausalLM(LLAMA, vocab_size=data.vocab_size).model for _ in range(3)]
    if kind == "choices":
        options = {"generation": {"max_new_tokens": 2}, "exact_match": True}
        return DynamicFusionDecoder(*models[:2], [models[2]], tokenizer=data.tokenizer, **options)
    return GLDFusionModule(models[0], {"other": models[1]}, top_k=4)


def evaluate(folder, **options):
    """Return what all methods log of their data, in validation and in test, and in a fit."""
    found = {}
    for kind, source in METHODS.items():
        data = make_data(source, folder)
        model = make_model(kind, data)
        for stage in ("validate", "test"):
            trainer = Trainer(accelerator="cpu", **QUIET, **options)
            found[f"{kind} {stage}"] = getattr(trainer, stage)(model, data, verbose=False)[0]
        if kind != "choices":
            Trainer(accelerator="cpu", max_steps=1, limit_val_batches=1.0, **QUIET, **options).fit(model, data)
    return found


TWO_RANKS = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_filling import evaluate

if __name__ == "__main__":
    found = evaluate(Path({folder!r}), devices=2, strategy="ddp_fork")
    Path({out!r}).write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_log_what_one_does(folder, tmp_path):
    """Sums over two gloo ranks are those of one process: of no split are rows counted twice, or a rank waited for."""
    out = tmp_path / "found.json"
    settings = {"tests": str(Path(__file__).parent), "folder": str(folder), "out": str(out)}
    run_script(tmp_path / "run.py", TWO_RANKS.format(**settings))
    whole, ranks = evaluate(folder), json.loads(out.read_text())
    assert {name: sorted(values) for name, values in ranks.items()} == {k: sorted(v) for k, v in whole.items()}
    assert {"test/acc", "test/exact_match"} <= set(whole["choices test"])
    assert {"val/loss_uld", "val/loss_gld"} <= set(whole["pairs validate"])
    for name, values in whole.items():
        assert ranks[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
