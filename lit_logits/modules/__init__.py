"""Parameters and buffers: nn.Modules that know nothing of a Trainer."""

from lit_logits.modules.backbone import CausalBackbone, load_backbone, load_causal_lm
from lit_logits.modules.calibration import Calibration, calibrate
from lit_logits.modules.dense_logits import DenseLogitsHead
from lit_logits.modules.head_init import (
    HeadInit,
    choose_init,
    describe_head,
    describe_untying,
    initialize_dense_head,
    initialize_vq_head,
)
from lit_logits.modules.vq_logits import CodebookUpdate, MappingStrategy, VQLogitsHead

__all__ = [
    "Calibration",
    "CausalBackbone",
    "CodebookUpdate",
    "DenseLogitsHead",
    "HeadInit",
    "MappingStrategy",
    "VQLogitsHead",
    "calibrate",
    "choose_init",
    "describe_head",
    "describe_untying",
    "initialize_dense_head",
    "initialize_vq_head",
    "load_backbone",
    "load_causal_lm",
]
