"""Texts, or pairs of texts, with classes."""
