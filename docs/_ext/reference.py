"""Writes the pages of the reference: every public name of the package, in groups, and every recipe.

The pages are made at each build from the lists `__all__`, so that no name can be missing. The repository does not hold
them.
"""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

GROUPS = {
    "lightning_modules": ("LightningModules", "lit_logits", "What is trained, or decodes: a class for each method."),
    "modules": ("Heads, models and helpers", "lit_logits.modules", "Modules of torch, and functions around models."),
    "callbacks": ("Callbacks", "lit_logits.callbacks", "When things happen, and what is logged."),
    "data_modules": ("Data modules", "lit_logits.datamodules", "Where batches come from."),
    "functional": ("Functional", "lit_logits.functional", "Tensors in, tensors out: every number comes from here."),
    "contracts": ("Contracts", "lit_logits.contracts", "What parts ask of each other: read this to write your own."),
}
"""File → title, package and what it holds."""

STORAGE = "lit_logits.storage"
"""A package without names of its own: users import from its files."""

_OPTIONAL = {"lit_logits.functional.lookup.triton_kernel"}
"""Files that import what may not be installed; they define no public name."""


def write_reference(folder: Path, recipes: Path) -> None:
    """Write the pages into `folder`; a page that has not changed keeps its date, so that it is not built again."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {f"{name}.rst": _group(*group) for name, group in GROUPS.items()}
    pages["storage.rst"] = _storage()
    pages["recipes.md"] = _recipes(recipes)
    for old in set(folder.iterdir()) - {folder / name for name in pages}:
        old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def public_names() -> set[str]:
    """Return the full names of all that the reference has."""
    packages = [package for _, package, _ in GROUPS.values()]
    files = [file.__name__ for file in _files(importlib.import_module(STORAGE))]
    return {f"{name}.{own}" for name in (*packages, *files) for own in importlib.import_module(name).__all__}


def _group(title: str, package: str, about: str) -> str:
    module = importlib.import_module(package)
    parts = [_heading(title, "="), about, f".. py:module:: {package}"]
    for file, names in _by_file(module):
        parts.append(_heading(names[0] if len(names) == 1 else _title(file), "-"))
        if len(names) > 1 or package == "lit_logits.functional":  # letters and papers that the functions share
            parts.append(f".. automodule:: {file.__name__}\n   :no-index:")
        parts += [_directive(package, name, getattr(module, name)) for name in names]
    return "\n\n".join(parts) + "\n"


def _storage() -> str:
    parts = [_heading("Storage", "="), "What lies on disk: caches of logits, and log-probabilities of servers."]
    for module in _files(importlib.import_module(STORAGE)):
        name = module.__name__
        parts += [_heading(_title(module), "-"), f".. automodule:: {name}", f"Import from ``{name}``."]
        parts += [_directive(name, own, getattr(module, own)) for own in module.__all__]
    return "\n\n".join(parts) + "\n"


def _by_file(package: ModuleType) -> Iterator[tuple[ModuleType, list[str]]]:
    """Yield the files that the names of a package come from, in the order of names, with their names."""
    files: dict[str, list[str]] = {}
    for name in package.__all__:
        files.setdefault(_home(package, name), []).append(name)
    for file, names in sorted(files.items(), key=lambda item: min(item[1], key=str.lower).lower()):
        yield importlib.import_module(file), sorted(names, key=str.lower)


def _home(package: ModuleType, name: str) -> str:
    """Return the module that defines a name; of a `Literal` or a number, which do not know, the one that lists it."""
    home = getattr(getattr(package, name), "__module__", "typing")
    if home.startswith("lit_logits"):
        return str(home)
    return next((file.__name__ for file in _files(package) if name in file.__all__), package.__name__)


def _files(package: ModuleType) -> list[ModuleType]:
    """Return the files of a package and of its folders that have public names."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    names = [file.name for file in found if not file.ispkg and file.name not in _OPTIONAL]
    modules = [importlib.import_module(name) for name in names]
    return [module for module in modules if getattr(module, "__all__", ())]


def _directive(package: str, name: str, value: object) -> str:
    owner = _owner(package, name, value)
    if owner:
        kind = "class" if inspect.isclass(value) else "function"
        return f".. py:{kind}:: {name}\n   :module: {package}\n\n   The same as :py:obj:`{owner}`."
    if inspect.isclass(value):
        return f".. autoclass:: {package}.{name}\n   :members:" + _inherited(value)
    if inspect.isroutine(value):
        return f".. autofunction:: {package}.{name}"
    home, text = _constant(importlib.import_module(package), name)
    shown = repr(value).replace("typing.", "")
    said = [f"   {line}".rstrip() for line in text.replace("|", r"\|").splitlines()]
    lines = [f".. py:data:: {name}", f"   :module: {package}"]
    lines += [f"   :canonical: {home}.{name}"] if home != package else []
    return "\n".join([*lines, *([f"   :value: {shown}"] if len(shown) < 200 else []), "", *said])


def _inherited(value: type) -> str:
    """Return the option that shows what a class takes from bases of ours that have no entry of their own."""
    public = {name.rpartition(".")[2] for name in public_names()}
    bases = value.__mro__[1:]
    hidden = [base for base in bases if base.__module__.startswith("lit_logits") and base.__name__ not in public]
    others = ", ".join(base.__name__ for base in bases if base not in hidden)
    return f"\n   :inherited-members: {others}" if hidden else ""


def _owner(package: str, name: str, value: object) -> str:
    """Return the full name under which a class or a function that two packages export has its page, or nothing."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return ""
    for other in ("lit_logits.contracts", "lit_logits.functional"):
        if other != package and getattr(importlib.import_module(other), name, None) is value:
            return f"{other}.{name}"
    return ""


def _constant(package: ModuleType, name: str) -> tuple[str, str]:
    """Return the file that defines a constant, and the text below it there."""
    for file in [package] if not hasattr(package, "__path__") else _files(package):
        if not isinstance(file.__file__, str):
            continue
        lines = ast.parse(Path(file.__file__).read_text()).body
        for line, below in zip(lines, [*lines[1:], None], strict=True):
            names = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            if any(isinstance(one, ast.Name) and one.id == name for one in names):
                is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                return file.__name__, inspect.cleandoc(str(below.value.value)) if is_text else ""
    return package.__name__, ""


def _title(module: ModuleType) -> str:
    """Return the name of a file in words."""
    words = module.__name__.rpartition(".")[2].split("_")
    words = [word.upper() if word in ("gld", "gw", "kd", "kl", "vq") else word for word in words]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def _heading(text: str, sign: str) -> str:
    return f"{text}\n{sign * (2 * len(text))}"  # some signs are wide


def _recipes(folder: Path) -> str:
    parts = [
        "# Recipes",
        "A recipe is a commented YAML file that ships with the package. `lit-logits fit --config NAME` takes it by its"
        " name, and every line of it can be overridden on the command line.",
    ]
    for path in sorted(folder.glob("*.yaml")):
        parts += [f"## {path.name}", f"```{{literalinclude}} /../configs/{path.name}\n:language: yaml\n```"]
    return "\n\n".join(parts) + "\n"
