"""Methods on the logits of language models and classifiers, as PyTorch Lightning modules."""

from lit_logits.causal_lm import CausalLM
from lit_logits.dual_head_kd import DualHeadKD
from lit_logits.dynamic_fusion import DynamicFusionDecoder
from lit_logits.gld_fusion import GLDFusionModule
from lit_logits.vq_logits import VQLogitsLM

__all__ = ["CausalLM", "DualHeadKD", "DynamicFusionDecoder", "GLDFusionModule", "VQLogitsLM"]
__version__ = "0.1.0"
