"""The corpus that is on every machine: the documentation inside the running Python's standard library.

A document is one topic of the language reference (`pydoc_data.topics`, the text of `help("ASSIGNMENT")`) or the
docstrings of one module, each under its dotted name. Sources are parsed, never imported.
"""

import ast
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tqdm import tqdm

from lit_logits.datamodules.caching import digest, hide_progress

__all__ = [
    "MAX_CHARACTERS",
    "fingerprint_python_docs",
    "is_public",
    "iter_docstrings",
    "iter_modules",
    "prose",
    "read_python_docs",
]

EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"})

INTERNAL = frozenset({"__main__", "encodings", "idlelib", "lib2to3", "turtledemo"})
"""Parts of the library that are an application's inside, or a hundred times the same classes."""

MIN_WORDS = 4
"""A paragraph with fewer words says nothing."""

MAX_CHARACTERS = 480
"""A longer paragraph is more than one piece of text."""


def fingerprint_python_docs() -> str:
    """Return a digest of the Python version and of the names and sizes of the files that `read_python_docs` reads."""
    root = _root()
    files = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in _source_files(root)]
    return digest("python-docs", sys.version, files)


def read_python_docs() -> list[str]:
    """Return the documents, topics first, then modules by path; about 2 MB of text.

    A file that cannot be read or parsed is left out. The order is the same on every call.
    """
    documents = [topics[name].strip() for name in sorted(topics)]
    for name, tree in iter_modules():
        document = "\n\n".join(f"{owner}\n\n{docstring}" for owner, docstring in iter_docstrings(tree, name))
        if document:
            documents.append(document)
    return documents


def iter_modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield the dotted name and the syntax tree of each module, by path; what cannot be parsed is left out."""
    root = _root()
    files = _source_files(root)
    for path in tqdm(files, desc="Reading the standard library", disable=hide_progress(), leave=False):
        tree = _parse(path)
        if tree is not None:
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts), tree


def iter_docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    """Yield the name and the docstring of a definition, then those of the definitions directly inside it."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring and docstring.strip():
        yield name, inspect.cleandoc(docstring)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from iter_docstrings(child, f"{name}.{child.name}")


def is_public(name: str) -> bool:
    """Return whether a module is there for everybody, by its dotted name.

    Example:
        >>> is_public("email.message"), is_public("email._policybase"), is_public("idlelib.editor")
        (True, False, False)
    """
    parts = name.split(".")
    return INTERNAL.isdisjoint(parts) and not any(part.startswith("_") for part in parts)


def prose(block: str) -> str:
    r"""Return a paragraph on one line, or "" if it is code, a list or a table, or too short or too long.

    Example:
        >>> prose("Open the file and\nreturn its lines.")
        'Open the file and return its lines.'
    """
    lines = block.split("\n")
    if any(line[:1].isspace() or line.startswith(("-", "*", "+", ">>>", "#", "|")) for line in lines):
        return ""
    text = re.sub(r":[a-z:]+:`~?([^`]*)`", r"`\1`", " ".join(block.split()))
    letters = sum(character.isalpha() or character.isspace() for character in text)
    if len(text.split()) < MIN_WORDS or len(text) > MAX_CHARACTERS or letters < 0.8 * len(text):
        return ""
    return text if text[0].isalpha() and text[-1] in ".!?)" and "->" not in text else ""


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _source_files(root: Path) -> list[Path]:
    """Return the library's `.py` files in the order of their paths, without tests and installed packages."""
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(files) if not EXCLUDED.intersection(path.parts[:-1])]


def _parse(path: Path) -> ast.Module | None:
    """Return the syntax tree of a file, or None if it cannot be read or parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
