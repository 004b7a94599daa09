"""The wheel holds what it should and works where the checkout is not."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

import lit_logits

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools builds in the source tree, where deleted files of an earlier build would linger."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools >= 77, as pyproject.toml does, for a build without the network")
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lit_logits", "callbacks", "datamodules", "configs", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True)
    return next(out.glob("lit_logits-*.whl"))


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    return set(ZipFile(wheel).namelist())


def test_wheel_holds_every_module_at_its_installed_place(names):
    folders = {"lit_logits": "", "callbacks": "callbacks/", "datamodules": "datamodules/", "configs": "configs/"}
    expected = {
        f"lit_logits/{place}{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in folders.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".yaml", ".cpp"}
    }
    assert expected <= names
    assert "lit_logits/py.typed" in names


def test_wheel_holds_nothing_else(names):
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lit_logits", next(top for top in tops if top.endswith(".dist-info"))}
    assert not [name for name in names if "test" in name.lower()]


def test_wheel_has_the_command_and_the_licence(wheel, names):
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "lit-logits = lit_logits.cli:main" in ZipFile(wheel).read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_unpacked_wheel_works_from_another_folder(wheel, tmp_path):
    ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import sys; sys.path.insert(0, 'site'); import lit_logits, lit_logits.cli as cli\n"
        "import lit_logits.callbacks, lit_logits.datamodules, lit_logits.configs\n"
        "assert all('site/lit_logits' in m.__file__ for n, m in sys.modules.items() if n.startswith('lit_logits'))\n"
        "cli.main(['fit', '--config', 'absent.yaml'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    recipes = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
    assert f"Expected a file or one of the shipped recipes {recipes}, but got 'absent.yaml'." in done.stderr


def test_version_stands_in_one_place_and_all_else_follows(wheel):
    """The wheel takes it from the package, the citation and the changelog name it."""
    metadata = next(name for name in ZipFile(wheel).namelist() if name.endswith("METADATA"))
    assert f"\nVersion: {lit_logits.__version__}\n" in ZipFile(wheel).read(metadata).decode()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == lit_logits.__version__
    sections = re.findall(r"^## \[(.+)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert dict(sections)[lit_logits.__version__] == str(citation["date-released"])


def test_pre_commit_runs_the_tools_that_are_pinned():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pins = {pin for hook in hooks for pin in hook["additional_dependencies"]}
    assert {pin.split("==")[0] for pin in pins} == {"ruff", "codespell"}
    assert pins <= set((ROOT / "constraints.txt").read_text().split())
