"""Figures that callbacks draw."""
