"""Side-by-side measurements: `python -m benchmarks.NAME` prints a Markdown table."""
