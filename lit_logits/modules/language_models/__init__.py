"""Causal language models of transformers: loaded, inspected, called, adapted."""
