"""How Sphinx builds these pages: `make docs`. It needs no network."""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

from reference import public_names, write_reference  # noqa: E402

import lit_logits  # noqa: E402

project = "lit-logits"
author = "The lit-logits contributors"
project_copyright = "2026, the lit-logits contributors"
version = release = lit_logits.__version__

OTHERS = r"(collections|ctypes|datasets|lightning|matplotlib|numpy|os|pathlib|scipy|torch|transformers|typing)\..*"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "_ext"]
if any((HERE / "examples").glob("*.ipynb")):  # shown with the outputs that they hold, and not run here
    extensions[0] = "myst_nb"
    nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
# In docstrings `name` is a link where there is such a name, and code where there is none.
default_role = "py:obj"
# Types of signatures are links as well. Those of other packages have no page here, and `make docs` reads no network.
nitpicky = True
# Classes that are passed inside the package only have none either.
nitpick_ignore_regex = [("py:obj", "(?s:.*)"), (r"py:\w+", OTHERS), ("py:class", r"lit_logits(\.\w+){2,}")]
add_module_names = False
python_maximum_signature_line_length = 96
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"lit-logits {version}"
html_static_path: list[str] = []
html_show_sphinx = False
html_copy_source = False

_SECTIONS = re.compile(r"^(Args|Attributes|Example|Examples|Raises|Returns|References|Yields|Note):$")


def formulas_stay_as_they_are(app: Any, what: str, name: str, thing: object, options: Any, lines: list[str]) -> None:
    """Make blocks of code of what a docstring indents outside of its sections: formulas, and lines of a recipe.

    Elsewhere |x| is an absolute value, where reStructuredText would look for a substitution.
    """
    found, section, in_block = [], "", False
    for number, line in enumerate(lines):
        if line and not line[0].isspace():
            match = _SECTIONS.match(line)
            section, in_block = match[1] if match else "", False
        elif line and not section and not in_block and number and not lines[number - 1]:
            found += [".. code-block:: text", ""]
            in_block = True
        if section in ("Args", "Attributes"):
            line = re.sub(r"^( +\w+: )(\w\.)$", r"\1\\\2", line)  # `d.` would begin a list that counts with letters
        if section == "References":
            line = re.sub(r"^( +)(\[\d+\]: )", r"\1* \2", line)  # a line each
        found.append(line if in_block or section.startswith("Example") else line.replace("|", r"\|"))
    # Of the first line of a property, napoleon would take what stands before a colon for its type.
    lines[:] = ["..", "", *found] if what in ("attribute", "data", "property") else found


def only_our_own_members(app: Any, what: str, name: str, thing: object, skip: bool, options: Any) -> bool | None:
    """Leave out members without words, such as fields of a NamedTuple, which stand under Attributes."""
    if skip or what != "class":
        return None
    is_field = inspect.isdatadescriptor(thing) and not isinstance(thing, property)
    return True if is_field or not inspect.getdoc(thing) else None


def link_short_names(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Lead `VQLogitsHead` to where that public name is, from any page, unless two have it."""
    target = str(node.get("reftarget", "")).removesuffix("()")
    full = {name for name in _PUBLIC if name.endswith(f".{target}")} if node.get("refdomain") == "py" else set()
    if len(full) != 1 or node.get("reftype") != "obj":
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", full.pop(), node, text)


def link_public_names(app: Any, page: str, source: list[str]) -> None:
    """Make a link of `VQLogitsHead` in the prose of a page, where the name is public."""
    if page.startswith("reference/generated/"):
        return
    parts = re.split(r"(^```.*?^```|^#.*?$|\[[^\]\n]*\]\([^)\n]*\))", source[0], flags=re.DOTALL | re.MULTILINE)
    for place in range(0, len(parts), 2):  # between blocks, headings and links
        parts[place] = re.sub(r"(?<![`}])`([A-Za-z_]\w+)`(?!`)", _as_link, parts[place])
    source[0] = "".join(parts)


def _as_link(match: re.Match[str]) -> str:
    is_public = any(name.endswith(f".{match[1]}") for name in _PUBLIC)
    return f"{{py:obj}}{match[0]}" if is_public else match[0]


_PUBLIC = public_names()


def setup(app: Any) -> None:
    """Write the reference, and join Sphinx."""
    write_reference(HERE / "reference" / "generated", HERE.parent / "configs")
    app.connect("autodoc-process-docstring", formulas_stay_as_they_are, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", only_our_own_members)
    app.connect("source-read", link_public_names)
    app.connect("missing-reference", link_short_names)
