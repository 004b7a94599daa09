"""Classifiers of texts on the command line: two recipes, from texts to a folder that transformers reads."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from lit_logits.cli import main
from lit_logits.datamodules.tokenization import train_bpe
from lit_logits.text_classifiers import fill_vocabulary

pytestmark = pytest.mark.usefixtures("no_network")

NAMES = ["autumn", "spring", "winter"]
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Texts that name their class, beside the runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = [f'"in {name}, number {n}",{name}\n' for n in range(40) for name in NAMES]
    Path("seasons.csv").write_text("text,season\n" + "".join(lines))
    return "seasons.csv"


def run(recipe, source, *arguments, epochs=1, size=TINY):
    """Fit a recipe on the texts with a tiny student."""
    tiny = [f"--model.init_args.student.{name}={value}" for name, value in size.items()]
    source = json.dumps({"path": source, "label_column": "season"})
    options = [f"--config={recipe}.yaml", f"--data.init_args.source={source}", f"--trainer.max_epochs={epochs}"]
    main(["fit", *options, *tiny, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", *arguments])


@pytest.mark.slow
def test_two_commands_make_a_student_that_a_pipeline_reads(texts):
    """The teacher from the texts, the student from the teacher, which answers with names of classes."""
    run("dual_head_kd_text_teacher", texts, "--data.init_args.bpe_vocab_size=300")
    teacher = AutoModelForSequenceClassification.from_pretrained("runs/text_teacher/pretrained")
    assert teacher.config.id2label == dict(enumerate(NAMES))
    assert (teacher.config.vocab_size, teacher.config.pad_token_id) == (300, 0)

    faster = ["--model.init_args.optimizer.init_args.lr=0.02"]
    run("dual_head_kd_text", texts, *faster, epochs=20)
    folder = "runs/dual_head_kd_text/version_0/pretrained"
    student = AutoModelForSequenceClassification.from_pretrained(folder)
    assert student.config.hidden_size == 16
    assert not [name for name, _ in student.named_parameters() if "aux" in name]
    classify = pipeline("text-classification", folder, device="cpu")
    answers = classify([f"in {name}, number 7" for name in NAMES], truncation=True)
    assert [answer["label"] for answer in answers] == NAMES
    saved = yaml.safe_load(Path("runs/dual_head_kd_text/version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["student"]["vocab_size"] == 300

    main(["predict", "--config=runs/dual_head_kd_text/version_0/config.yaml", "--ckpt_path=last"])
    [file] = Path("runs/dual_head_kd_text").glob("*/predictions/*.pt")
    assert torch.load(file)["predictions"]["logits"].shape == (12, 3)


def parsed(student, **kwargs):
    model = Namespace(class_path="lit_logits.DualHeadKD", init_args=Namespace(student=student, num_classes=None))
    data = Namespace(class_path="lit_logits.datamodules.SequenceDataModule", init_args=Namespace(**kwargs))
    return model, data


def test_new_encoders_get_the_vocabulary_of_the_data(texts):
    source = {"path": texts, "label_column": "season"}
    model, data = parsed({"model_type": "bert"}, source=source, bpe_vocab_size=290)
    fill_vocabulary(model, data)
    assert model.init_args.student == {"model_type": "bert", "vocab_size": 290, "pad_token_id": 0}
    fill_vocabulary(model, data)
    given = {"model_type": "bert", "vocab_size": 400, "pad_token_id": 3}
    model.init_args.student = dict(given)
    fill_vocabulary(model, data)
    assert model.init_args.student == given
    model.init_args.student = {"model_type": "bert", "vocab_size": 100}
    with pytest.raises(
        ValueError, match=r"`vocab_size` of the new `student` to be at least the 290 tokens.* but got 100"
    ):
        fill_vocabulary(model, data)


@pytest.mark.parametrize(
    ("student", "data"),
    [
        ("bert-base-uncased", "lit_logits.datamodules.SequenceDataModule"),
        ({"model_type": "resnet"}, "lit_logits.datamodules.ImageDataModule"),
        ({"model_type": "llama"}, "lit_logits.datamodules.InstructionDataModule"),
    ],
)
def test_other_models_and_data_are_left_alone(monkeypatch, student, data):
    """A language model's padding would be the end token, whose embedding no step would train."""
    model, _ = parsed(student)
    before = model.clone()
    monkeypatch.setattr("lit_logits.text_classifiers.ArgumentParser", lambda: 1 / 0)
    fill_vocabulary(model, Namespace(class_path=data, init_args=Namespace()))
    fill_vocabulary(model, None)
    assert model == before


def test_a_pretrained_encoder_is_tuned_with_its_own_tokenizer(texts):
    """It has no layer of classes yet, its tokenizer no end token, and it takes token types."""
    Path("bpe").mkdir()
    train_bpe(["autumn spring winter"], 259, Path("bpe"), for_encoders=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained("bpe")
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained("encoder")
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **TINY)).save_pretrained("encoder")
    own = ["--model.init_args.student=encoder", "--data.init_args.tokenizer=encoder"]
    run("dual_head_kd_text_teacher", texts, *own, size={})
    classify = pipeline("text-classification", "runs/text_teacher/pretrained", device="cpu")
    assert classify("in autumn")[0]["label"] in NAMES
    assert classify.model.config.hidden_size == 16
