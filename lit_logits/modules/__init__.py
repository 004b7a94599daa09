"""Parts for users: heads, criteria, sources, models. Code inside the package imports from the submodules instead."""

from typing import TYPE_CHECKING

from lit_logits.lazy import lazy_names

if TYPE_CHECKING:
    from lit_logits.modules.dual_head_kd.classifiers import MODEL_ZOO, load_classifier
    from lit_logits.modules.dual_head_kd.net import AuxiliaryHead, DualHeadClassifier, DualHeadOutput, GradientAligner
    from lit_logits.modules.dual_head_kd.teacher import FrozenTeacher, load_teacher, load_weights
    from lit_logits.modules.dynamic_fusion.decoding import FusionTrace, split_prompts
    from lit_logits.modules.dynamic_fusion.fused_lm import FusedCausalLM, FusedScores
    from lit_logits.modules.dynamic_fusion.loading import load_fusion_models
    from lit_logits.modules.gld_fusion.criterion import GLDCriterion, GraphAlignment
    from lit_logits.modules.gld_fusion.importing import import_log_probs
    from lit_logits.modules.gld_fusion.sources import LogitSource, load_source
    from lit_logits.modules.language_models.loading import CausalBackbone, load_backbone, load_causal_lm, new_causal_lm
    from lit_logits.modules.language_models.lora import add_lora, save_merged
    from lit_logits.modules.language_models.pruning import keep_layers, spread_layers
    from lit_logits.modules.language_models.tokenizers import find_tokenizer
    from lit_logits.modules.metrics import TokenMean
    from lit_logits.modules.optimization import make_optimizers
    from lit_logits.modules.schedules import LinearRamp
    from lit_logits.modules.vq_logits.calibration import Calibration, calibrate
    from lit_logits.modules.vq_logits.config import VQLogitsConfig
    from lit_logits.modules.vq_logits.dense import DenseLogitsHead
    from lit_logits.modules.vq_logits.describe import describe_head, describe_model
    from lit_logits.modules.vq_logits.export import VQLogitsForCausalLM, VQLogitsModel
    from lit_logits.modules.vq_logits.fit import fit_output_layer
    from lit_logits.modules.vq_logits.generation import continue_prompts
    from lit_logits.modules.vq_logits.head import VQLogitsHead
    from lit_logits.modules.vq_logits.hierarchical import HierarchicalVQLogitsHead
    from lit_logits.modules.vq_logits.joining import compact_model, dense_model
    from lit_logits.modules.vq_logits.moving import CodebookUpdate, MappingStrategy
    from lit_logits.modules.vq_logits.original import OriginalOutput
    from lit_logits.modules.vq_logits.packed import PackedHierarchicalVQLogitsHead
    from lit_logits.modules.vq_logits.residual import ResidualVQLogitsHead
    from lit_logits.modules.vq_logits.start import HeadInit
    from lit_logits.storage.logit_cache import LogitCache
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "lit_logits.modules.dual_head_kd.classifiers": "MODEL_ZOO load_classifier",
            "lit_logits.modules.dual_head_kd.net": "AuxiliaryHead DualHeadClassifier DualHeadOutput GradientAligner",
            "lit_logits.modules.dual_head_kd.teacher": "FrozenTeacher load_teacher load_weights",
            "lit_logits.modules.dynamic_fusion.decoding": "FusionTrace split_prompts",
            "lit_logits.modules.dynamic_fusion.fused_lm": "FusedCausalLM FusedScores",
            "lit_logits.modules.dynamic_fusion.loading": "load_fusion_models",
            "lit_logits.modules.gld_fusion.criterion": "GLDCriterion GraphAlignment",
            "lit_logits.modules.gld_fusion.importing": "import_log_probs",
            "lit_logits.modules.gld_fusion.sources": "LogitSource load_source",
            "lit_logits.modules.language_models.loading": "CausalBackbone load_backbone load_causal_lm new_causal_lm",
            "lit_logits.modules.language_models.lora": "add_lora save_merged",
            "lit_logits.modules.language_models.pruning": "keep_layers spread_layers",
            "lit_logits.modules.language_models.tokenizers": "find_tokenizer",
            "lit_logits.modules.metrics": "TokenMean",
            "lit_logits.modules.optimization": "make_optimizers",
            "lit_logits.modules.schedules": "LinearRamp",
            "lit_logits.modules.vq_logits.calibration": "Calibration calibrate",
            "lit_logits.modules.vq_logits.config": "VQLogitsConfig",
            "lit_logits.modules.vq_logits.dense": "DenseLogitsHead",
            "lit_logits.modules.vq_logits.describe": "describe_head describe_model",
            "lit_logits.modules.vq_logits.export": "VQLogitsForCausalLM VQLogitsModel",
            "lit_logits.modules.vq_logits.fit": "fit_output_layer",
            "lit_logits.modules.vq_logits.generation": "continue_prompts",
            "lit_logits.modules.vq_logits.head": "VQLogitsHead",
            "lit_logits.modules.vq_logits.hierarchical": "HierarchicalVQLogitsHead",
            "lit_logits.modules.vq_logits.joining": "compact_model dense_model",
            "lit_logits.modules.vq_logits.moving": "CodebookUpdate MappingStrategy",
            "lit_logits.modules.vq_logits.original": "OriginalOutput",
            "lit_logits.modules.vq_logits.packed": "PackedHierarchicalVQLogitsHead",
            "lit_logits.modules.vq_logits.residual": "ResidualVQLogitsHead",
            "lit_logits.modules.vq_logits.start": "HeadInit",
            "lit_logits.storage.logit_cache": "LogitCache",
        },
    )

__all__ = [
    "MODEL_ZOO",
    "AuxiliaryHead",
    "Calibration",
    "CausalBackbone",
    "CodebookUpdate",
    "DenseLogitsHead",
    "DualHeadClassifier",
    "DualHeadOutput",
    "FrozenTeacher",
    "FusedCausalLM",
    "FusedScores",
    "FusionTrace",
    "GLDCriterion",
    "GradientAligner",
    "GraphAlignment",
    "HeadInit",
    "HierarchicalVQLogitsHead",
    "LinearRamp",
    "LogitCache",
    "LogitSource",
    "MappingStrategy",
    "OriginalOutput",
    "PackedHierarchicalVQLogitsHead",
    "ResidualVQLogitsHead",
    "TokenMean",
    "VQLogitsConfig",
    "VQLogitsForCausalLM",
    "VQLogitsHead",
    "VQLogitsModel",
    "add_lora",
    "calibrate",
    "compact_model",
    "continue_prompts",
    "dense_model",
    "describe_head",
    "describe_model",
    "find_tokenizer",
    "fit_output_layer",
    "import_log_probs",
    "keep_layers",
    "load_backbone",
    "load_causal_lm",
    "load_classifier",
    "load_fusion_models",
    "load_source",
    "load_teacher",
    "load_weights",
    "make_optimizers",
    "new_causal_lm",
    "save_merged",
    "split_prompts",
    "spread_layers",
]
