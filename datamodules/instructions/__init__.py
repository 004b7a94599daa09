"""Prompt and response pairs."""
