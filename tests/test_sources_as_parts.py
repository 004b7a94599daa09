"""The part of a data module that says where rows come from: in recipes, on the command line, in saved settings."""

import inspect
import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from lit_logits import datamodules
from lit_logits.cli import LitLogitsCLI, main
from lit_logits.datamodules import (
    ImageDataModule,
    ImageSource,
    InstructionDataModule,
    PairSource,
    SourceTokenizer,
    TextDataModule,
    TextSource,
)

DATA = {"TextDataModule": TextSource, "ImageDataModule": ImageSource, "InstructionDataModule": PairSource}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps({"q": f"{i} + 1", "a": str(i + 1)}) + "\n" for i in range(30)))


def made(*arguments, name="InstructionDataModule"):
    """The data module that the command line makes; nothing else is made, for a model would want the vocabulary."""
    parser = LightningArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    given = [] if name is None else ["--data", name]
    return parser.instantiate_classes(parser.parse_args([*given, *arguments])).data


def given_source(data):
    own = {TextDataModule: "corpus", ImageDataModule: "images", InstructionDataModule: "pairs"}
    part = getattr(data, own[type(data)])
    return part.path, part.subset


@pytest.mark.parametrize("name", DATA)
def test_every_form_of_a_source_is_the_same(name):
    cls = getattr(datamodules, name)
    source = DATA[name]("some/thing", "small")
    recipe = {"data": {"class_path": name, "init_args": {"source": {"path": "some/thing", "subset": "small"}}}}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    found = [
        cls(source),
        cls({"path": "some/thing", "subset": "small"}),
        made("--data.source", "{path: some/thing, subset: small}", name=name),
        made("--data.source.path", "some/thing", "--data.source.subset", "small", name=name),
        made("--config", "recipe.yaml", name=None),
    ]
    assert [given_source(data) for data in found] == [("some/thing", "small")] * 5
    assert given_source(made("--data.source", "some/thing", name=name)) == ("some/thing", None)
    for words, expected in (
        (["--data.init_args.source.subset", "large"], ("some/thing", "large")),
        (["--data.init_args.source", "other"], ("other", None)),
        (["--data.init_args.source.path", "other"], ("other", "small")),
    ):
        assert given_source(made("--config", "recipe.yaml", *words, name=None)) == expected


def test_a_list_of_files_stays_one():
    assert made("--data.source", "[a.jsonl, b.jsonl]").pairs.path == ["a.jsonl", "b.jsonl"]
    assert made("--data.source", "{path: [a.txt, b.txt]}", name="TextDataModule").corpus.path == ["a.txt", "b.txt"]


@pytest.mark.parametrize("name", DATA)
def test_a_file_that_is_there_is_named_and_not_read_as_a_recipe(name):
    """jsonargparse reads a file whose name is given for a part, unless a path is among the types."""
    Path("part.yaml").write_text("path: elsewhere\n")
    for file in ("pairs.jsonl", "part.yaml"):
        recipe = {"data": {"class_path": name, "init_args": {"source": file}}}
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
        for arguments in (["--data.source", file], ["--data.source.path", file]):
            assert given_source(made(*arguments, name=name)) == (file, None)
        assert given_source(made("--config", "recipe.yaml", name=None)) == (file, None)
        for value in (Path(file), {"path": file}):
            assert given_source(getattr(datamodules, name)(value)) == (file, None)
    if name == "InstructionDataModule":
        for arguments in (["--data.source_tokenizers", "{a: part.yaml}"], ["--data.source_tokenizers.a", "part.yaml"]):
            assert made(*arguments).source_tokenizers["a"].tokenizer == "part.yaml"
        given = "{a: {tokenizer: part.yaml}}"
        assert made("--data.source_tokenizers", given).source_tokenizers["a"].tokenizer == "part.yaml"


def test_source_tokenizers_by_every_form():
    expected = {"a": SourceTokenizer("x", "{prompt} {response}"), "b": SourceTokenizer("y", "chat", "Be short.")}
    template = ["--data.template", "{prompt} {response}"]
    both = made(
        "--data.source_tokenizers", "{a: x, b: {tokenizer: y, template: chat, system_prompt: Be short.}}", *template
    )
    one = ["--data.source_tokenizers.a", "x"]
    other = ["--data.source_tokenizers.b", "{tokenizer: y, template: chat, system_prompt: Be short.}"]
    assert both.source_tokenizers == made(*one, *other, *template).source_tokenizers == expected


def test_print_config_round_trips(capsys):
    source = "{path: pairs.jsonl, prompt_column: q, response_column: a}"
    others = "{a: x, b: {tokenizer: y, template: chat}}"
    first = ["--data", "InstructionDataModule", "--data.source", source, "--data.source_tokenizers", others]
    printed = []
    for arguments in (["--model", "CausalLM", "--model.model", "x", *first], ["--config", "printed.yaml"]):
        with pytest.raises(SystemExit):
            LitLogitsCLI(["fit", *arguments, "--print_config"])
        printed.append(capsys.readouterr().out)
        Path("printed.yaml").write_text(printed[0])
    assert printed[0] == printed[1]
    saved = yaml.safe_load(printed[0])["data"]["init_args"]
    assert saved["source"] == {
        **{"path": "pairs.jsonl", "subset": None, "prompt_column": "q", "response_column": "a"},
        **{"choices_column": None, "answer_column": None, "teacher_column": None, "messages_column": None},
    }
    assert saved["source_tokenizers"]["a"] == "x"


def test_saved_hyper_parameters_make_the_same_source():
    """Of a subclass that saves them, as Lightning stores them: plain data, which torch loads without trust."""
    saved = {"path": "pairs.jsonl", "prompt_column": "q", "response_column": "a"}
    torch.save({"source": saved}, "hparams.pt")
    assert InstructionDataModule(**torch.load("hparams.pt", weights_only=True)).pairs.source == PairSource(**saved)


NEW = ("path", "teacher_column", "messages_column")
OLD = [(name, argument) for name, part in DATA.items() for argument in inspect.signature(part).parameters]


@pytest.mark.parametrize(("name", "old"), [pair for pair in OLD if pair[1] not in NEW])
def test_an_argument_of_version_0_1_is_told_the_new_form(name, old, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model", "CausalLM", "--data", name, f"--data.{old}", "x"])
    error = capsys.readouterr().err
    assert f"`source: {{path: ..., {old}: ...}}`" in error
    assert f"`--data.source.path ... --data.source.{old} ...`" in error


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [("chat_template", True, "`template: chat`"), ("chat_sources", ["a"], "{NAME: {tokenizer: ..., template: chat}}")],
)
def test_a_recipe_of_version_0_1_is_told_the_new_form(old, value, new, capsys):
    Path("recipe.yaml").write_text(
        yaml.safe_dump({"data": {"class_path": "InstructionDataModule", "init_args": {old: value}}})
    )
    with pytest.raises(SystemExit):
        main(["fit", "--model", "CausalLM", "--config", "recipe.yaml"])
    assert new in capsys.readouterr().err


def test_a_misspelt_argument_of_a_source_is_named_and_no_old_one(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model", "CausalLM", "--data", "TextDataModule", "--data.source", "{path: x, subste: y}"])
    error = capsys.readouterr().err
    assert "Option 'subste' is not accepted" in error
    assert "Since version 0.2" not in error


@pytest.mark.parametrize("data", [TextDataModule, ImageDataModule, InstructionDataModule])
def test_a_data_module_takes_eighteen_arguments_at_most(data):
    assert len(inspect.signature(data).parameters) <= 18
