"""Output layers of `VQLogitsLM`: heads, how they start, and how a model with one is saved."""
