"""The examples run, on reduced steps, and the pages show the code that they have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "render")


def code_cells(script):
    """Cells of a percent-script that are code."""
    for cell in script.read_text().split("# %%")[1:]:
        head, _, code = cell.partition("\n")
        if "[markdown]" not in head:
            yield code.strip()


def test_there_is_an_example_for_each_method():
    methods = {"vq_logits", "dual_head_kd", "dynamic_fusion", "gld_fusion"}
    assert {path.stem for path in SCRIPTS} == methods
    assert {path.stem for path in (ROOT / "docs/examples").glob("*.md")} == methods | {"index"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_page_shows_the_code_and_its_pictures(script):
    page = (ROOT / "docs/examples" / f"{script.stem}.md").read_text()
    for code in code_cells(script):
        assert code in page, f"Run `make examples`: docs/examples/{script.stem}.md lacks\n{code}"
    for picture in (ROOT / "docs/examples" / script.stem).iterdir():
        assert f"({script.stem}/{picture.name})" in page
        assert picture.stat().st_size < 400_000
    assert "Traceback" not in page


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs(script, tmp_path):
    if script.stem == "gld_fusion":
        pytest.importorskip("ot")
    env = {**os.environ, "EXAMPLE_STEPS": "3", "MPLBACKEND": "Agg"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
