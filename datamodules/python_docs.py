"""The corpus that is on every machine: the documentation inside the running Python's standard library.

A document is one topic of the language reference (`pydoc_data.topics`, the text of `help("ASSIGNMENT")`) or the
docstrings of one module, each under its dotted name. Sources are parsed, never imported.
"""

import ast
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tqdm import tqdm

from lit_logits.datamodules.caching import digest, hide_progress

__all__ = ["fingerprint_python_docs", "iter_modules", "read_python_docs"]

EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"})


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
        document = "\n\n".join(_walk(tree, name))
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


def _walk(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[str]:
    """Yield the docstring of a definition, then those of the definitions directly inside it."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring and docstring.strip():
        yield f"{name}\n\n{inspect.cleandoc(docstring)}"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"{name}.{child.name}")
