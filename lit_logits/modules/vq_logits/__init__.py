"""Output layers of `VQLogitsLM`: heads, their start, and the export of a model with one."""
