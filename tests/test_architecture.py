"""The import rule of the house, held by walking the syntax trees.

torch ← functional ← contracts, storage ← modules ← <method>.py ← cli ← train.py
functional, storage, modules ← callbacks ← cli
torch, lightning ← datamodules ← cli

Inside a layer no room imports another one, but for the shared ones. Inside the package imports name the room, not the
facade that users import. Facades alone import `lit_logits.lazy`, which imports nothing.
"""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"lit_logits": "lit_logits", "callbacks": "lit_logits.callbacks", "datamodules": "lit_logits.datamodules"}


class Rule(NamedTuple):
    """What a layer may import of this library (prefixes), and which other packages it may not, or alone may."""

    inside: tuple[str, ...]
    banned: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None


FUNCTIONAL, STORAGE, MODULES = "lit_logits.functional", "lit_logits.storage", "lit_logits.modules"
CONTRACTS = "lit_logits.contracts"
CALLBACKS, DATAMODULES = "lit_logits.callbacks", "lit_logits.datamodules"

# Libraries that one module of a layer alone may import: for transport plans, sparse matrices, GPUs and Parquet.
ONLY_THERE = {
    f"{FUNCTIONAL}.gw_search": ("ot", "scipy"),
    f"{FUNCTIONAL}.cooccurrence": ("numpy", "scipy", "sklearn"),
    f"{FUNCTIONAL}.lookup.triton_kernel": ("triton",),  # optional: `lookup.device` imports it where it is installed
    f"{STORAGE}.served": ("pyarrow",),
}
RULES = {
    "functional": Rule(inside=(FUNCTIONAL,), only=("torch", "tqdm")),
    "contracts": Rule(inside=(FUNCTIONAL, CONTRACTS), only=("torch",)),
    "storage": Rule(inside=(FUNCTIONAL, STORAGE), only=("torch", "safetensors", "tqdm", "filelock")),
    "modules": Rule(inside=(FUNCTIONAL, CONTRACTS, STORAGE, MODULES), banned=("lightning", "datasets", "matplotlib")),
    "method": Rule(inside=(FUNCTIONAL, CONTRACTS, STORAGE, MODULES), banned=("datasets",)),
    "callbacks": Rule(inside=(FUNCTIONAL, CONTRACTS, STORAGE, MODULES, CALLBACKS), banned=("datasets",)),
    "datamodules": Rule(inside=(DATAMODULES,)),
    "cli": Rule(inside=("lit_logits",)),
    "lazy": Rule(inside=(), only=()),
    "package": Rule(inside=("lit_logits",)),
}

# Rooms inside a layer that others of the layer may not import.
ROOMS = {
    MODULES: ("vq_logits", "gld_fusion", "dynamic_fusion", "dual_head_kd"),
    DATAMODULES: ("text", "images", "instructions", "sequences"),
}
FACADES = (FUNCTIONAL, MODULES, CALLBACKS, DATAMODULES)


def room_of(module: str) -> tuple[str, str] | None:
    """Layer and room of a dotted name, where the room is not shared."""
    for layer, rooms in ROOMS.items():
        room = module.removeprefix(f"{layer}.").split(".")[0]
        if module.startswith(f"{layer}.") and room in rooms:
            return layer, room
    return None


def layer_of(module: str) -> str:
    """The key of `RULES` for a dotted module name; whatever is new at the top of the package is a method file."""
    parts = module.split(".")
    if len(parts) == 1:
        return "package"
    commands = ("__main__", "harness", "recipe_parser", "run_folders", "text_classifiers")
    name = "cli" if parts[1] in commands else parts[1]
    return name if name in RULES else "method"


def imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """Dotted names that a module imports anywhere in its tree, also in functions; relative ones made absolute.

    Of `from a import b` both `a` and `a.b` are given, as `b` may be a module.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of `source` that its layer's rule forbids."""
    rule = RULES[layer_of(module)]
    found = []
    for name in imports(source, module, is_package):
        top = name.split(".")[0]
        if top == "lit_logits":
            parents = {"lit_logits"}  # `from lit_logits import x` is judged by `lit_logits.x`
            wrong = name not in parents and not any(f"{name}.".startswith(f"{prefix}.") for prefix in rule.inside)
            wrong = wrong and not (is_package and f"{name}.".startswith("lit_logits.lazy."))
            wrong = wrong or (name.startswith("lit_logits.cli") and layer_of(module) != "cli")
            own, room = room_of(module), room_of(name)
            wrong = wrong or (room is not None and module.startswith(f"{room[0]}.") and own != room and not is_package)
            wrong = wrong or (name in FACADES and not is_package and module != "lit_logits.cli")
        else:
            third_party = top not in sys.stdlib_module_names
            wrong = top in rule.banned or (
                rule.only is not None and third_party and top not in (*rule.only, *ONLY_THERE.get(module, ()))
            )
        if wrong:
            found.append(f"{module} ({layer_of(module)}) imports {name}")
    return found


def sources() -> dict[str, Path]:
    """Dotted module name → file, of everything that is installed."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_one_way(module):
    path = SOURCES[module]
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize("module", SOURCES)
def test_module_has_a_docstring_and_a_public_surface(module):
    """A package's `__init__` may be a docstring alone; where it imports, it says what it passes on."""
    path = SOURCES[module]
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    assigned = [target.id for target in targets if isinstance(target, ast.Name)]
    is_bare_package = path.name == "__init__.py" and len(tree.body) == 1
    assert "__all__" in assigned or is_bare_package


def test_only_the_entry_point_imports_the_cli():
    files = [path for path in ROOT.glob("*.py") if "lit_logits.cli" in imports(path.read_text(), path.stem)]
    assert [path.name for path in files] == ["train.py"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lit_logits.functional.vq_logits", "import lightning"),
        ("lit_logits.functional.vq_logits", "from transformers import AutoModel"),
        ("lit_logits.functional.vq_logits", "from ..modules.vq_logits.head import VQLogitsHead"),
        ("lit_logits.functional.vq_logits", "from lit_logits.storage.logit_cache import LogitCache"),
        ("lit_logits.storage.logit_cache", "import transformers"),
        ("lit_logits.storage.logit_cache", "from lit_logits.modules.metrics import TokenMean"),
        ("lit_logits.modules.gld_fusion.sources", "from lit_logits.modules.dynamic_fusion.loading import load"),
        ("lit_logits.modules.metrics", "from lit_logits.lazy import lazy_names"),
        ("lit_logits.modules.metrics", "from lit_logits.modules.vq_logits.head import VQLogitsHead"),
        ("lit_logits.datamodules.text.corpus", "from lit_logits.datamodules.images.sources import ImageSource"),
        ("lit_logits.vq_logits", "from lit_logits.modules import VQLogitsHead"),
        ("lit_logits.functional.vq_logits", "def late():\n    import numpy"),
        ("lit_logits.modules.vq_logits.head", "from lightning import LightningModule"),
        ("lit_logits.modules.vq_logits.head", "import lit_logits.vq_logits"),
        ("lit_logits.vq_logits", "from lit_logits.gld_fusion import GLDFusionModule"),
        ("lit_logits.vq_logits", "from lit_logits import gld_fusion"),
        ("lit_logits.vq_logits", "from .callbacks import CodeUsage"),
        ("lit_logits.vq_logits", "from lit_logits.datamodules.text.datamodule import TextDataModule"),
        ("lit_logits.callbacks.code_usage", "from lit_logits.vq_logits import VQLogitsLM"),
        ("lit_logits.callbacks.code_usage", "from lit_logits.cli import main"),
        ("lit_logits.datamodules.text.corpus", "from lit_logits.functional import checks"),
        ("lit_logits", "from lit_logits.cli import main"),
    ],
)
def test_a_planted_violation_is_caught(module, source):
    assert violations(source, module, is_package=module == "lit_logits")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lit_logits.functional.vq_logits", "import math\nfrom torch import Tensor\nfrom tqdm import tqdm"),
        ("lit_logits.functional.vq_logits", "from .checks import check_range"),
        (
            "lit_logits.modules.vq_logits.head",
            "import transformers\nfrom lit_logits.storage import folders",
        ),
        (
            "lit_logits.vq_logits",
            "import lightning\nfrom lit_logits.modules.metrics import TokenMean",
        ),
        (
            "lit_logits.callbacks.code_usage",
            "import matplotlib\nfrom lit_logits.modules.vq_logits import head",
        ),
        ("lit_logits.datamodules.text.corpus", "import datasets\nfrom lit_logits.datamodules.text.packing import pack"),
        ("lit_logits.modules.gld_fusion.sources", "from lit_logits.modules.language_models.loading import load"),
    ],
)
def test_an_allowed_import_passes(module, source):
    assert violations(source, module) == []


def test_no_text_installs_the_package_from_an_index():
    """It is on none: what stands in texts and errors works from a checkout."""
    kinds = {".py", ".md", ".yaml", ".cfg", ".toml", ".txt"}
    folders = [ROOT, *(ROOT / name for name in (*FOLDERS, "configs", "docs", "benchmarks"))]
    paths = {path for folder in folders for path in (folder.glob("*") if folder == ROOT else folder.rglob("*"))}
    texts = {path: path.read_text() for path in paths if path.suffix in kinds and path.is_file()}
    assert len(texts) > 100
    assert [path.name for path, text in texts.items() if "pip install lit-logits" in text] == []
