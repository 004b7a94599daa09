"""The benchmark of fusion's criteria: a table of all settings, those that validation likes best, and a picture."""

import argparse
import json
import re

import pytest
import torch

from benchmarks import fusion_answers, fusion_criteria
from benchmarks.fusion_criteria import fixed, table
from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe
from lit_logits.modules import new_causal_lm

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


@pytest.fixture
def folder(tmp_path):
    """A large model, a base, two experts, and a source."""
    rows = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}. #### {2 * n}"} for n in range(8)]
    (tmp_path / "source.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for seed, name in enumerate(["large", "base", "expert-0", "expert-1"]):
        train_bpe([row["question"] + row["answer"] for row in rows] * 20, 290, tmp_path / name)
        torch.manual_seed(seed)
        config = {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
        new_causal_lm({**config, "vocab_size": len(load_tokenizer(tmp_path / name))}).save_pretrained(tmp_path / name)
    return tmp_path


def test_every_setting_has_a_line_and_the_picture_is_drawn(folder, capsys):
    experts = [str(folder / "expert-0"), str(folder / "expert-1")]
    arguments = ["--model", folder / "large", "--base", folder / "base", "--experts", *experts]
    arguments += ["--source", folder / "source.jsonl", "--rows", 4, "--validation-rows", 4, "--batch-size", 4]
    arguments += ["--max-length", 100, "--answers", 2, "--answer-tokens", 4, "--answer-experts", 1, "--drafts", 1]
    arguments += ["--picture", folder / "picture.png"]
    fusion_criteria.main([str(argument) for argument in arguments])
    printed = capsys.readouterr().out
    lines = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert lines[2:5] == ["base alone", "expert alone", "large alone"]
    assert lines.count("calibrated") == 2  # by perplexity, and by answers
    drafts = [line.split("|")[4].strip() for line in printed.splitlines() if re.match(r"\| (none|1|2|4) \|", line)]
    assert drafts == ["1 of 1"] * 4  # the same text
    assert (folder / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_answers_alone(folder, capsys):
    arguments = ["--model", folder / "large", "--base", folder / "base", "--experts", folder / "expert-0"]
    arguments += ["--source", folder / "source.jsonl", "--rows", 0, "--validation-rows", 2, "--batch-size", 2]
    fusion_criteria.main([str(one) for one in [*arguments, "--answers", 3, "--answer-tokens", 2]])
    lines = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[2:] == ["large alone", "expert alone", "fixed α = 1.0", "`distance`", "`projection`"]
    chosen = ["--answer-ways", "large", "projection"]
    fusion_criteria.main([str(one) for one in [*arguments, "--answers", 3, "--answer-tokens", 2, *chosen]])
    lines = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[2:] == ["large alone", "`projection`"]


def test_experts_of_other_tasks_beside(folder, capsys):
    arguments = ["--model", folder / "large", "--base", folder / "base", "--experts", folder / "expert-0"]
    arguments += ["--source", folder / "source.jsonl", "--rows", 2, "--validation-rows", 2, "--batch-size", 2]
    fusion_criteria.main([str(one) for one in [*arguments, "--beside", folder / "expert-1"]])
    lines = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    ways = ["`{}`, alone", "`{}`, routing: step", "`{}`, routing: text"]
    assert lines[2:] == [
        *(way.format("distance") for way in ways),
        "`projection`, alone",
        "`projection`, mode: joint",
    ] + [way.format("projection") for way in ways[1:]]


def test_the_rows_that_test_have_not_validated(folder):
    made = argparse.Namespace(source=str(folder / "source.jsonl"), model=str(folder / "large"), max_length=100)
    made.rows, made.answers, made.validation_rows, made.batch_size = 2, 3, 4, 2
    validation, test = (
        {str(row.tolist()) for batch in part for row in batch["input_ids"]}
        for part in fusion_criteria.read_batches(made)
    )
    assert (len(validation), len(test)) == (4, 3)
    assert not validation & test


def test_rows_are_cut_within_a_batch():
    batches = [{"input_ids": torch.arange(start, start + 4)[:, None]} for start in (0, 4, 8)]
    cut = fusion_answers.first_rows(batches, 5)
    assert [batch["input_ids"].flatten().tolist() for batch in cut] == [[0, 1, 2, 3], [4]]


def test_token_f1():
    assert fusion_answers.token_f1("A set of a list.", "a list, a set") == pytest.approx(2 * 4 / 9)
    assert fusion_answers.token_f1("", "yes") == 0


@pytest.mark.parametrize("rows", [0, 3, -2])
def test_rows_that_validate_fill_batches(rows, capsys):
    arguments = ["--model", "x", "--base", "x", "--experts", "x", "--source", "x", "--batch-size", "2"]
    with pytest.raises(SystemExit):
        fusion_criteria.main([*arguments, f"--validation-rows={rows}"])
    assert f"must be a multiple of 2, but is {rows}" in capsys.readouterr().err


def test_settings_are_compared_with_the_best_fixed_weight():
    tests = [{fixed(alpha): (abs(alpha - 1) + seed, alpha) for alpha in fusion_criteria.GRID} for seed in (0.0, 1.0)]
    for test in tests:
        test |= {one: test[fixed(0.5)] for one in fusion_criteria.SETTINGS if one.static_alpha is None}
    lines = table(tests, [fixed(1.0), fixed(0.75)], {}).splitlines()
    found = {line.split("|")[1].strip(): line.split("|")[3].strip() for line in lines[2:]}
    assert "of fixed α = 1.0" in lines[0]
    assert found["fixed α = 1.0"] == "1.0000 ± 0.0000"
    assert found["`distance`"] == "1.6487 ± 0.0000"  # e^½
    assert found["calibrated"].startswith("1.1420 ±")  # of 1 and e^¼
