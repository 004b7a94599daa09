"""Runs the examples and writes them as pages with their output and pictures: `make examples`.

    python examples/render.py [vq_logits dual_head_kd ...]

A page is docs/examples/NAME.md. What scripts write to stderr, such as logs, is left out.
"""

import shutil
import sys
import time
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs" / "examples"
NAMES = ("vq_logits", "dual_head_kd", "dynamic_fusion", "gld_fusion")


def render(name: str) -> None:
    notebook = jupytext.read(HERE / f"{name}.py")
    began = time.perf_counter()
    NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        cell["outputs"] = [output for output in outputs if output.get("name") != "stderr"]
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    pictures = PAGES / name
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    for file, data in resources["outputs"].items():
        if f"({file})" in text:  # a picture is there in several formats
            (pictures / file).write_bytes(data)
            text = text.replace(f"({file})", f"({name}/{file})")
    source = f"<!-- made by `make examples` of examples/{name}.py -->\n\n"
    (PAGES / f"{name}.md").write_text("\n".join(line.rstrip() for line in (source + text.strip()).splitlines()) + "\n")
    print(f"{name}: {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or NAMES:
        render(chosen)
