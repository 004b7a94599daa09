"""Config files: what is printed and saved runs again, texts stay texts, and recipes and modules are found by name."""

import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import _typehints
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.demos.boring_classes import BoringDataModule  # noqa: F401  (a short name)
from tiny_runs import CountingData, ParseOnly, cli, fit, in_empty_folder  # noqa: F401  # fixtures by name
from torch import nn

from lit_logits.cli import LitLogitsCLI, main
from lit_logits.datamodules import PairSource

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_print_config_round_trips(capsys):
    with pytest.raises(SystemExit):
        cli("fit", "--model.optimizer.lr=0.3", "--print_config")
    first = capsys.readouterr().out
    parsed = yaml.safe_load(first)
    assert parsed["seed_everything"] == 42
    assert parsed["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.3
    assert parsed["trainer"]["logger"]["init_args"]["save_dir"] == "runs"

    Path("again.yaml").write_text(first)
    with pytest.raises(SystemExit):
        LitLogitsCLI(["fit", "--config=again.yaml", "--print_config"])
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("classes", [[], ["--model=VQLogitsLM"], ["--data=TextDataModule", "--model=CausalLM"]])
def test_a_printed_config_that_lacks_something_says_so(classes, capsys):
    with pytest.raises(SystemExit) as stopped:
        LitLogitsCLI(["fit", *classes, "--print_config"])
    printed = capsys.readouterr()
    assert not stopped.value.code
    assert "seed_everything: 42" in printed.out
    lacks = "model" if len(classes) != 1 else "backbone"
    assert f"cannot be run before it is filled in: the following arguments are required: {lacks}" in printed.err
    assert len(printed.err.splitlines()) == 1


def test_a_printed_config_that_is_whole_says_nothing(capsys):
    with pytest.raises(SystemExit):
        cli("fit", "--print_config")
    assert capsys.readouterr().err == ""


class Texts(CountingData):
    """Data with texts, some of them of a part."""

    def __init__(self, size: int = 5, template: str | None = None, source: str | PairSource = "x") -> None:
        super().__init__(size)
        self.template, self.source = template, source


TEMPLATES = ["Q: {prompt}", "Q: {prompt}\nA: {response}", "{prompt}: {response}", "[INST] as: {prompt}", "note:", "a:b"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_text_with_a_colon_is_no_yaml(template, capsys):
    """It was read as a mapping; it is a plain string, also in what is saved."""
    part = ["--data.source=PairSource", "--data.source.path=x", "--data.source.prompt_column", template]
    arguments = ["fit", "--model=CountingLM", "--data=Texts", "--data.size=4", f"--data.template={template}", *part]
    data = ParseOnly(arguments).config.fit.data.init_args
    assert (data.template, data.source.prompt_column, data.size) == (template, template, 4)
    assert type(data.template) is type(data.source.prompt_column) is str
    with pytest.raises(SystemExit):
        LitLogitsCLI([*arguments, "--print_config"])
    saved = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert saved["template"] == saved["source"]["prompt_column"] == template


def test_a_mapping_in_braces_is_one():
    source = "{path: 'x', prompt_column: 'a: b'}"
    data = ParseOnly(["fit", "--model=CountingLM", "--data=Texts", f"--data.source={source}"]).config.fit.data
    assert (data.init_args.source.path, data.init_args.source.prompt_column) == ("x", "a: b")


def test_a_default_that_is_an_enumeration_is_saved():
    """That of `Timer` could not be."""
    fit("--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:00:10:00")
    saved = "runs/CountingLM/version_0/config.yaml"
    assert yaml.safe_load(Path(saved).read_text())["trainer"]["callbacks"][0]["init_args"]["interval"] == "step"
    again = LitLogitsCLI(["fit", f"--config={saved}"]).trainer
    [timer] = [callback for callback in again.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    assert timer.time_remaining() > 0


def test_shipped_recipe_is_found_by_name_and_a_file_here_comes_first(tmp_path, monkeypatch):
    (tmp_path / "shipped").mkdir()
    recipe = "model: CountingLM\ndata: {class_path: CountingData, init_args: {size: %d}}\n"
    (tmp_path / "shipped/tiny.yaml").write_text(recipe % 6)
    monkeypatch.setattr(
        "lit_logits.recipe_parser.files", lambda package: {"lit_logits.configs": tmp_path / "shipped"}[package]
    )

    assert ParseOnly(["fit", "--config", "tiny.yaml"]).config.fit.data.init_args.size == 6
    Path("tiny.yaml").write_text(recipe % 8)
    assert ParseOnly(["fit", "-c", "tiny.yaml"]).config.fit.data.init_args.size == 8


def test_unknown_recipe_names_the_shipped_ones(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").touch()
    monkeypatch.setattr("lit_logits.recipe_parser.files", lambda package: tmp_path)
    with pytest.raises(SystemExit):
        ParseOnly(["fit", "--config=absent.yaml"])
    message = capsys.readouterr().err
    assert "Expected a file or one of the shipped recipes ['tiny.yaml'], but got 'absent.yaml'." in message


def test_recipes_of_the_checkout_are_the_installed_ones():
    from importlib.resources import files

    assert {path.name for path in CONFIGS} <= {path.name for path in files("lit_logits.configs").iterdir()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(config):
    parsed = ParseOnly(["fit", f"--config={config.name}"]).config.fit
    assert parsed.model.class_path.startswith("lit_logits.")
    assert parsed.data.class_path.startswith("lit_logits.datamodules.")


def test_own_module_by_dotted_path(monkeypatch):
    Path("my_models.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel\nclass Mine(BoringModel):\n    pass\n"
    )
    monkeypatch.syspath_prepend(".")
    assert type(fit(model="my_models.Mine", data="BoringDataModule").model).__name__ == "Mine"


def test_own_module_in_the_working_directory(monkeypatch, capsys):
    """As the README has it: `--model my_package.MyLM` where my_package is."""
    Path("here.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel\nclass Mine(BoringModel):\n    pass\n"
    )
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--model", "here.Mine", "--print_config"])
    assert not stopped.value.code
    assert "class_path: here.Mine" in capsys.readouterr().out


FUSION = ["fit", "--model=DynamicFusionDecoder", "--model.model=models/large", "--model.base=models/small"]


def test_a_path_is_looked_for_among_classes_once(monkeypatch):
    """It was at each look at the value: seconds before a run of a few models."""
    seen = []
    real = _typehints.get_import_path
    monkeypatch.setattr(_typehints, "get_import_path", lambda value: (seen.append(value), real(value))[1])
    cli = ParseOnly([*FUSION, "--model.experts=[models/one, models/two]", "--data=CountingData"])
    cli.parser.dump(cli.config)
    assert 1 <= seen.count(nn.Linear) <= 6  # whether abstract classes count or not, and again after each import


def test_a_class_that_is_defined_after_a_first_run_is_found(monkeypatch):
    ParseOnly([*FUSION, "--data=CountingData"])
    late = type("LateClass", (nn.Module,), {"__module__": __name__})
    monkeypatch.setattr(sys.modules[__name__], "LateClass", late, raising=False)
    model = ParseOnly([*FUSION, "--model.base=LateClass", "--data=CountingData"]).config.fit.model
    assert model.init_args.base.class_path == f"{__name__}.LateClass"
