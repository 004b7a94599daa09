"""Paragraphs of the standard library's docstrings, each with the module that it is from: the texts on every machine.

A class is a public module or package of at least 40 paragraphs; the name of the class itself may stand in the text.
"""

import re
from collections import Counter

from lit_logits.datamodules.python_docs import fingerprint_python_docs, is_public, iter_docstrings, iter_modules, prose

__all__ = ["fingerprint_python_paragraphs", "read_python_paragraphs"]

MIN_PARAGRAPHS = 40
"""A module with fewer is no class."""


def fingerprint_python_paragraphs() -> str:
    """Return a digest of the library that `read_python_paragraphs` reads."""
    return fingerprint_python_docs()


def read_python_paragraphs() -> list[tuple[str, str]]:
    """Return paragraphs and the names of their modules, by path; the same on every call.

    A paragraph that stands in two modules is left out, and so is a repetition.
    """
    modules: dict[str, set[str]] = {}
    for name, tree in iter_modules():
        if is_public(name):
            for _, docstring in iter_docstrings(tree, name):
                for text in filter(None, map(prose, re.split(r"\n\s*\n", docstring))):
                    modules.setdefault(text, set()).add(name.split(".")[0])
    pairs = [(text, next(iter(names))) for text, names in modules.items() if len(names) == 1]
    counts = Counter(module for _, module in pairs)
    return [(text, module) for text, module in pairs if counts[module] >= MIN_PARAGRAPHS]
