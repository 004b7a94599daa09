"""Callbacks: when things happen, and what is logged."""

from lit_logits.callbacks.codebook_monitor import CodebookMonitor
from lit_logits.callbacks.codebook_reinit import CodebookReinit
from lit_logits.callbacks.neural_collapse_monitor import NeuralCollapseMonitor

__all__ = ["CodebookMonitor", "CodebookReinit", "NeuralCollapseMonitor"]
