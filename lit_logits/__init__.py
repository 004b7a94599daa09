"""Methods on the logits of language models and classifiers, as PyTorch Lightning modules."""

from lit_logits.vq_logits import VQLogitsLM

__all__ = ["VQLogitsLM"]
__version__ = "0.1.0"
