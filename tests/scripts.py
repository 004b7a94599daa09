"""Scripts that tests run as a program of their own, such as those that start several processes."""

import subprocess
import sys
from pathlib import Path

__all__ = ["run_script"]


def run_script(file: Path, text: str) -> None:
    """Write a script and run it to its end, which must be a good one."""
    file.write_text(text)
    result = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "sync_dist" not in result.stderr, result.stderr[-3000:]  # what is logged is the same on all ranks
