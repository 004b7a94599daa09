"""The pages say what is: their code runs, their commands parse, their links lead somewhere, the reference is complete.

The rules are those of CONTRIBUTING.md, "Docs".
"""

import contextlib
import functools
import importlib
import importlib.util
import io
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
from page_parts import write_parts
from pages import PAGES, ROOT, anchors, blocks, commands, links, page_name

import lit_logits.cli
from lit_logits.cli import LitLogitsCLI

RECIPES = {path.name: path for path in (ROOT / "configs").glob("*.yaml")}


class Parsed(Exception):
    """The arguments were right: ends a program that has read them."""


def stop(*args, **kwargs):
    raise Parsed


def code_of(page):
    """The Python of a page, as a program whose lines have the numbers that they have in the page."""
    code = ""
    for block in blocks(page.read_text()):
        if block.language == "python" and block.reason is None:
            code += "\n" * (block.line - 1 - code.count("\n")) + block.text + "\n"
    return code


def runnable():
    """Pages with code; those of `docs/examples` are left out, as tests/test_examples.py runs their scripts."""
    for page in PAGES:
        code = "" if page.parent.name == "examples" else code_of(page)
        if code:
            marks = [pytest.mark.slow] if ".fit(" in code else []
            yield pytest.param(page, marks=marks, id=page_name(page))


@pytest.mark.parametrize("page", [*runnable()])
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """In order, in one namespace, in a folder of its own, with no more than two steps of training."""
    start = L.Trainer.__init__

    @functools.wraps(start)
    def short(self, *args, max_steps=2, **settings):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        limits = {"limit_val_batches": 1, "limit_test_batches": 1, "limit_train_batches": 2}
        start(self, *args, max_steps=2 if max_steps < 0 else min(max_steps, 2), **{**settings, **limits, **quiet})

    monkeypatch.setattr(L.Trainer, "__init__", short)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code = code_of(page)
    names = {"__name__": "__page__", **write_parts(tmp_path, code)}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_what_is_not_run_says_why(page):
    lines = page.read_text().splitlines()
    marked = [number for number, line in enumerate(lines) if line.strip().startswith("<!-- not run")]
    explained = [block for block in blocks(page.read_text()) if block.reason]
    assert len(marked) == len(explained), f"a marker of {page_name(page)} is not above a block, or gives no reason"


TEXT = """# A

<!-- not run: no card -->
```python
f()
```

```python
x = 1
```
    lit-logits fit \\
      --config "a b"
"""


def test_the_reader_of_pages_is_not_blind():
    told = [(block.line, block.text, block.reason) for block in blocks(TEXT)]
    assert told == [(5, "f()", "no card"), (9, "x = 1", None)]
    assert list(commands(TEXT)) == [(11, ["lit-logits", "fit", "--config", "a b"])]
    assert [block.reason for block in blocks("<!-- not run: -->\n```python\n```\n")] == [None]
    assert list(links("[a](b.md#c), [d](https://e.f), `[g](h)`\n```\n[i](j)\n```\n")) == [("b.md", "c")]
    assert anchors("# A `b`, c\n## [d](e) – f\n") == {"a-b-c", "d--f"}


def programs(*names):
    """The commands of all pages whose program has one of these names."""
    for page in PAGES:
        for line, words in commands(page.read_text()):
            head = " ".join(words[:3]) if words[0].startswith("python") else words[0].rpartition("/")[2]
            if re.match("|".join(names), head):
                yield pytest.param(words, page, id=f"{page_name(page)}:{line}")


@functools.cache
def parser():
    """The parser of the command line, which is slow to make."""

    class OnlyParses(LitLogitsCLI):
        def before_instantiate_classes(self):
            stop()

        def parse_arguments(self, parser, args):
            found.append(parser)
            stop()

    found = []
    with contextlib.suppress(Parsed):
        OnlyParses(["fit"])
    return found[0]


COMMANDS = ("fit", "validate", "test", "predict", "import")
OURS = ("lit-logits", r"python3? train\.py", r"python3? -m lit_logits$")


def complaint(arguments, monkeypatch):
    """What the command line says against these arguments, or nothing."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            if arguments[0] == "import":
                monkeypatch.setattr(lit_logits.cli.ArgumentParser, "instantiate_classes", stop)
                lit_logits.cli._import(arguments[1:])
            else:
                parser().parse_args([word for word in arguments if word != "--debug"])
        except Parsed:
            pass
        except SystemExit as end:
            return (said.getvalue() or str(end)) if end.code else ""
    return ""


@pytest.mark.parametrize(("words", "page"), [*programs(*OURS)])
def test_a_command_parses(words, page, tmp_path, monkeypatch):
    """With a shipped recipe in place of a file that an earlier command of the page writes."""
    start = next(place for place, word in enumerate(words) if word in COMMANDS)
    given = [word for word in words[start:] if word not in ("...", "…")]
    stand_in = next((name for name in re.findall(r"\w+\.yaml", page.read_text()) if name in RECIPES), "vq_logits.yaml")
    for place, word in enumerate(given):
        if given[place - 1] in ("--config", "-c") and word not in RECIPES:
            given[place] = str(RECIPES[stand_in])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_parts(tmp_path, " ".join(given))
    assert complaint(given, monkeypatch) == ""


@pytest.mark.parametrize("slip", ["--trainer.max_stepz 1", "--model.init_args.head.init_args.codebook_sise 4"])
def test_a_slip_is_a_complaint(slip, monkeypatch):
    assert complaint(["fit", "--config", "vq_logits.yaml", *slip.split()], monkeypatch)
    assert complaint(["import", "--config", "gld_fusion.yaml", "--filez", "a.jsonl"], monkeypatch)


@pytest.mark.parametrize(("words", "page"), [*programs(r"python3? -m benchmarks\.")])
def test_a_benchmark_knows_its_options(words, page, monkeypatch):
    name = words[2]
    assert "ArgumentParser" in (ROOT / f"{name.replace('.', '/')}.py").read_text(), f"{name} is no command"
    for module in [module for module in sys.modules if module == name]:
        monkeypatch.delitem(sys.modules, module)
    import argparse

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        stop()

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [name, *words[3:]])
    monkeypatch.syspath_prepend(str(ROOT))
    said, is_parsed = io.StringIO(), False
    with contextlib.redirect_stderr(said):
        try:
            runpy.run_module(name, run_name="__main__")
        except Parsed:
            is_parsed = True
        except SystemExit:
            pass
    assert is_parsed, said.getvalue()


@pytest.mark.parametrize(("words", "page"), [*programs("make")])
def test_make_knows_its_targets(words, page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in words[1:] if "=" not in word} <= targets


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    """What is generated stands for itself: Sphinx looks there."""
    for path, anchor in links(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        if "generated" in target.parts:
            assert target.stem in pages_of_the_reference(), f"{path} in {page_name(page)}"
            continue
        assert target.exists(), f"{path} in {page_name(page)}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), f"{path}#{anchor} in {page_name(page)}"


@functools.cache
def generator():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "_ext" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_of_the_reference():
    return {*generator().GROUPS, "storage", "recipes"}


def test_no_public_name_is_missing_from_the_reference(tmp_path):
    """Every `__all__` of a package for users, and of each file of `storage`, has its directive."""
    generator().write_reference(tmp_path, ROOT / "configs")
    text = "".join(page.read_text() for page in tmp_path.iterdir())
    text = re.sub(r"^(\.\. py:\w+:: )(\w+)\n   :module: (\S+)$", r"\1\3.\2", text, flags=re.MULTILINE)
    told = set(re.findall(r"^\.\. (?:auto|py:)(?!module)\w+:: (\S+)$", text, re.MULTILINE))
    names = ["", ".modules", ".callbacks", ".datamodules", ".functional", ".contracts"]
    storage = importlib.import_module("lit_logits.storage")
    names += [f".storage.{file.name}" for file in pkgutil.iter_modules(storage.__path__)]
    packages = [importlib.import_module(f"lit_logits{name}") for name in names]
    public = {f"{package.__name__}.{name}" for package in packages for name in package.__all__}
    assert len(public) > 250
    assert public == told
    assert all(f"## {name}" in text for name in RECIPES)


def test_papers_name_what_there_is():
    """Every name is public, a module, or an argument; every paper that a docstring cites is there."""
    page = (ROOT / "docs" / "papers.md").read_text()
    public = {name.rpartition(".")[2] for name in generator().public_names()}
    arguments = {"all", "backbone", "class_reduction", "graph_values", "uld_values"}
    assert set(re.findall(r"`([A-Za-z_]\w+)`", page)) <= public | arguments
    for name in re.findall(r"`(lit_logits\.[\w.]+)`", page):
        importlib.import_module(name)
    sources = [file for place in ("lit_logits", "callbacks", "datamodules") for file in (ROOT / place).rglob("*.py")]
    cited = {number for file in sources for number in re.findall(r"arXiv (\d{4}\.\d{5})", file.read_text())}
    assert len(cited) > 20
    assert cited <= set(re.findall(r"arXiv (\d{4}\.\d{5})", page))


def test_the_page_of_the_command_line_has_every_option():
    page = (ROOT / "docs" / "reference" / "command_line.md").read_text()
    (commands_of,) = [action.choices for action in parser()._actions if hasattr(action, "add_subcommand")]
    options = {option for one in commands_of.values() for action in one._actions for option in action.option_strings}
    own = {option for option in options if re.fullmatch(r"--\w+", option)} | {"--files", "--folder", "--top_k"}
    assert {"--ckpt_path", "--model", "--return_predictions"} <= own
    assert own <= set(re.findall(r"--\w+", page))
    assert all(f"| `{name}` |" in page for name in [*commands_of, "import"])


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    """As `make docs` does. What is in the built inventory is what users find."""
    pytest.importorskip("sphinx")
    build = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going"]
    command = [*build, str(ROOT / "docs"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    from sphinx.util.inventory import InventoryFile

    with (tmp_path / "objects.inv").open("rb") as file:
        found = InventoryFile.load(file, "", os.path.join)
    kinds = getattr(found, "data", found)  # Sphinx 8.2 and later have a class for it
    assert generator().public_names() <= {name for kind, names in kinds.items() for name in names if "py:" in kind}
    for page in tmp_path.rglob("*.html"):
        assert not re.search(r'(src|href)="https?://[^"]+\.(js|css|woff2?)"', page.read_text()), page


def test_every_page_is_reached():
    """From the first page, by tables of contents."""
    reached, todo = set(), [ROOT / "docs" / "index.md"]
    while todo:
        page = todo.pop()
        reached.add(page)
        for block in blocks(page.read_text()):
            if block.language == "{toctree}":
                for entry in block.text.splitlines():
                    found = page.parent.glob(f"{entry}.md") if entry and not entry.startswith(":") else ()
                    todo += [target for target in found if target in PAGES and target not in reached]
    assert {page for page in PAGES if Path("docs") in page.relative_to(ROOT).parents} == reached
