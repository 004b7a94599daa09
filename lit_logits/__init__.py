"""Methods on the logits of language models and classifiers, as PyTorch Lightning modules."""

from lit_logits.dual_head_kd import DualHeadKD
from lit_logits.vq_logits import VQLogitsLM

__all__ = ["DualHeadKD", "VQLogitsLM"]
__version__ = "0.1.0"
