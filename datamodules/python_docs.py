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

__all__ = ["fingerprint_python_docs", "read_python_docs"]

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
    root = _root()
    documents = [topics[name].strip() for name in sorted(topics)]
    files = _source_files(root)
    for path in tqdm(files, desc="Reading the standard library", disable=hide_progress(), leave=False):
        document = "\n\n".join(_docstrings(path, root))
        if document:
            documents.append(document)
    return documents


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _source_files(root: Path) -> list[Path]:
    """Return the library's `.py` files in the order of their paths, without tests and installed packages."""
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(files) if not EXCLUDED.intersection(path.parts[:-1])]


def _docstrings(path: Path, root: Path) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions, each headed by its dotted name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
    yield from _walk(tree, name)


def _walk(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[str]:
    """Yield the docstring of a definition, then those of the definitions directly inside it."""
    docstring = ast.get_docstring(node, clean=False)
    if docstring and docstring.strip():
        yield f"{name}\n\n{inspect.cleandoc(docstring)}"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"{name}.{child.name}")
