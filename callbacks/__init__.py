"""Callbacks: when things happen, and what is logged."""

from lit_logits.callbacks.codebook_monitor import CodebookMonitor
from lit_logits.callbacks.codebook_reinit import CodebookReinit

__all__ = ["CodebookMonitor", "CodebookReinit"]
