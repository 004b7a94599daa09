"""Questions about Python's standard library, with the answers that its sources and docstrings give.

A pair asks what a module, class or function does, how it is called, what its defaults are, what it raises, what a class
derives from and offers, what a module holds, or which definition a sentence describes. Sources are parsed, never
imported.
"""

import ast
import copy
import inspect
import re
from collections.abc import Iterator
from typing import NamedTuple

from lit_logits.datamodules.instructions.splits import Example
from lit_logits.datamodules.python_docs import MAX_CHARACTERS, fingerprint_python_docs, is_public, iter_modules, prose

__all__ = ["fingerprint_python_questions", "read_python_questions"]

MAX_NAMES = 12
"""A longer list of names is not taken for an answer."""

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class _Subject(NamedTuple):
    """The subject of a question: a definition, its kind, its dotted name and its docstring."""

    node: ast.Module | Definition
    kind: str
    name: str
    docstring: str


def fingerprint_python_questions() -> str:
    """Return a digest of the library that `read_python_questions` reads."""
    return fingerprint_python_docs()


def read_python_questions() -> list[Example]:
    """Return the pairs, modules by path; the same on every call.

    An example's keys are its prompt, its response, and the docstring and the name of what it is about: everything that
    is said of one definition stays in one split. A question with two answers is left out.
    """
    examples: dict[str, list[Example]] = {}
    for name, tree in iter_modules():
        if is_public(name):
            for subject in _subjects(tree, "module", name):
                for prompt, response in _pairs(subject):
                    keys = (prompt, response, f"about {subject.name}", *filter(None, [subject.docstring]))
                    where = f"the question {prompt!r}"
                    examples.setdefault(prompt, []).append(Example(prompt, response, keys, where=where))
    return [same[0] for same in examples.values() if len({example.response for example in same}) == 1]


def _subjects(node: ast.Module | Definition, kind: str, name: str) -> Iterator[_Subject]:
    """Yield a module or definition and the public ones inside it, without what is local to functions."""
    yield _Subject(node, kind, name, inspect.cleandoc(ast.get_docstring(node, clean=False) or ""))
    for child in _public(node) if isinstance(node, ast.Module | ast.ClassDef) else []:
        function = "method" if kind == "class" else "function"
        yield from _subjects(child, "class" if isinstance(child, ast.ClassDef) else function, f"{name}.{child.name}")


def _public(node: ast.Module | ast.ClassDef) -> list[Definition]:
    children = [child for child in node.body if isinstance(child, Definition)]
    return [child for child in children if not child.name.startswith("_")]


def _pairs(subject: _Subject) -> Iterator[tuple[str, str]]:
    """Yield the questions about a definition, each with its answer."""
    node, kind, name, docstring = subject
    title = f"the {kind} `{name}`"
    blocks = re.split(r"\n\s*\n", docstring)
    paragraphs = [text for text in map(prose, blocks) if text]
    if paragraphs and paragraphs[0] == prose(blocks[0]):
        yield (f"What is {title} for?" if kind in ("module", "class") else f"What does {title} do?"), paragraphs[0]
        if kind != "module" and name.split(".")[-1] not in paragraphs[0]:
            first = re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z])", paragraphs[0])[0]
            yield f"Which {kind} of `{name.rpartition('.')[0]}` has this description? {first}", f"`{name}`"
        if len(paragraphs) > 1:
            yield f"What else should I know about {title}?", paragraphs[1]
    if not docstring:  # what nobody described has a signature that nobody asks for
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield from _call_pairs(node, title, name)
    else:
        yield from _content_pairs(node, title)


def _call_pairs(node: ast.FunctionDef | ast.AsyncFunctionDef, title: str, name: str) -> Iterator[tuple[str, str]]:
    """Yield how a function is called, its defaults and the exceptions that its own body raises."""
    arguments = ast.unparse(_bare(node.args))
    if 0 < len(arguments) <= MAX_CHARACTERS // 2:
        yield f"How is {title} called?", f"`{name}({arguments})`"
    defaults = _defaults(node.args)
    if defaults and len(defaults) <= MAX_NAMES:
        values = _join([f"`{argument}` is `{value}`" for argument, value in defaults])
        yield f"What are the defaults of {title}?", f"In `{name.split('.')[-1]}`, {values}."
    raised = _raised(node)
    if raised:
        yield f"Which exceptions does {title} raise itself?", f"`{name.split('.')[-1]}` raises {_names(raised)}."


def _content_pairs(node: ast.Module | ast.ClassDef, title: str) -> Iterator[tuple[str, str]]:
    """Yield what a class derives from, and what a class or module defines."""
    classes = [child.name for child in _public(node) if isinstance(child, ast.ClassDef)]
    functions = [child.name for child in _public(node) if not isinstance(child, ast.ClassDef)]
    functions = list(dict.fromkeys(functions))  # a property and its setter
    if isinstance(node, ast.ClassDef):
        bases = [ast.unparse(base) for base in node.bases]
        if bases and bases != ["object"]:
            yield f"What does {title} derive from?", f"`{node.name}` derives from {_names(bases)}."
        if 1 < len(functions) <= MAX_NAMES:
            yield f"Which methods does {title} define?", f"`{node.name}` defines {_names(functions)}."
        return
    for kind, names in {"classes": classes, "functions": functions}.items():
        if 1 < len(names) <= MAX_NAMES:
            yield f"Which public {kind} does {title} define?", f"It defines {_names(names)}."


def _bare(arguments: ast.arguments) -> ast.arguments:
    """Return a copy of the parameters as a caller sees them: without annotations and without `self`."""
    arguments = copy.deepcopy(arguments)
    for argument in (node for node in ast.walk(arguments) if isinstance(node, ast.arg)):
        argument.annotation = None
    positional = arguments.posonlyargs or arguments.args
    if positional and positional[0].arg in ("self", "cls", "mcls", "metacls"):
        del positional[0]
    return arguments


def _defaults(arguments: ast.arguments) -> list[tuple[str, str]]:
    """Return the names and default values of the optional parameters."""
    positional = [*arguments.posonlyargs, *arguments.args]
    pairs = [*zip(positional[len(positional) - len(arguments.defaults) :], arguments.defaults, strict=True)]
    named = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    pairs += [(argument, value) for argument, value in named if value is not None]
    return [(argument.arg, ast.unparse(value)) for argument, value in pairs]


def _raised(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Return the names of the exceptions in `raise Name` and `raise Name(...)`, in the order of the source."""
    raised = [inner.exc for inner in ast.walk(node) if isinstance(inner, ast.Raise)]
    names = [ast.unparse(exc.func if isinstance(exc, ast.Call) else exc) for exc in raised if exc is not None]
    names = [name for name in names if re.fullmatch(r"(\w+\.)*[A-Z]\w+", name)]
    return list(dict.fromkeys(names))


def _names(names: list[str]) -> str:
    return _join([f"`{name}`" for name in names])


def _join(items: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))
