"""Parameters and buffers: nn.Modules that know nothing of a Trainer."""

from lit_logits.modules.backbone import (
    CausalBackbone,
    find_layers,
    freeze_first_layers,
    is_encoder,
    load_backbone,
    load_causal_lm,
    make_config,
    new_causal_lm,
)
from lit_logits.modules.calibration import Calibration, calibrate
from lit_logits.modules.cifar_mobilenet import MobileNetV2, mobilenetv2
from lit_logits.modules.cifar_resnet import (
    CifarResNet,
    resnet8,
    resnet8x4,
    resnet20,
    resnet32,
    resnet32x4,
    resnet56,
    resnet110,
)
from lit_logits.modules.cifar_shufflenet import ShuffleNetV1, ShuffleNetV2, shufflenetv1, shufflenetv2
from lit_logits.modules.cifar_vgg import CifarVGG, vgg8, vgg13
from lit_logits.modules.cifar_wrn import WideResNet, wrn_16_2, wrn_40_1, wrn_40_2
from lit_logits.modules.classifiers import (
    MODEL_ZOO,
    classifier_logits,
    find_classifier,
    is_causal_lm,
    load_classifier,
    tap_features,
)
from lit_logits.modules.compact_lm import VQLogitsConfig, VQLogitsForCausalLM, compact_model, dense_model
from lit_logits.modules.dense_logits import DenseLogitsHead
from lit_logits.modules.dual_head_kd import (
    AuxHeadKind,
    AuxiliaryHead,
    DualHeadClassifier,
    DualHeadOutput,
    GradAlign,
    GradientAligner,
)
from lit_logits.modules.dynamic_fusion import FusedCausalLM, FusedScores
from lit_logits.modules.folders import check_model_folder, replace_folder, restore_replaced
from lit_logits.modules.fused_decoding import (
    FusedStep,
    FusionTrace,
    SmallModels,
    check_decoding,
    position_ids_of,
    split_prompts,
)
from lit_logits.modules.fusion_models import (
    FusionModels,
    check_causal_lm,
    check_same_tokenizer,
    digest_model,
    eos_token_ids,
    find_tokenizer,
    load_fusion_models,
    num_logits,
)
from lit_logits.modules.generation import continue_prompts
from lit_logits.modules.gld_fusion import FusionCriterion, GraphAlignment, SourceTerms
from lit_logits.modules.head_init import (
    HeadInit,
    choose_init,
    describe_head,
    describe_model,
    describe_untying,
    initialize_dense_head,
    initialize_residual_head,
    initialize_vq_head,
)
from lit_logits.modules.logit_cache import (
    CACHE_FIELDS,
    CACHE_FORMAT,
    CACHE_VERSION,
    LogitCache,
    SourceLogits,
    describe_cache,
    is_logit_cache,
)
from lit_logits.modules.logit_sources import LogitSource, counted_positions, load_source, tokenizer_id, view_of
from lit_logits.modules.lora import add_lora, has_lora, merged_state_dict, save_merged
from lit_logits.modules.metrics import TokenMean
from lit_logits.modules.model_calls import accepted_inputs, cache_argument, read_with_cache
from lit_logits.modules.optimization import make_optimizers
from lit_logits.modules.original_output import OriginalOutput, keep_original
from lit_logits.modules.residual_vq_logits import ResidualVQLogitsHead, default_stages, fit_output_layer
from lit_logits.modules.run_settings import differing_settings
from lit_logits.modules.teacher import FrozenTeacher, load_teacher, load_weights, read_weights
from lit_logits.modules.vq_logits import CodebookUpdate, MappingStrategy, VQLogitsHead

__all__ = [
    "CACHE_FIELDS",
    "CACHE_FORMAT",
    "CACHE_VERSION",
    "MODEL_ZOO",
    "AuxHeadKind",
    "AuxiliaryHead",
    "Calibration",
    "CausalBackbone",
    "CifarResNet",
    "CifarVGG",
    "CodebookUpdate",
    "DenseLogitsHead",
    "DualHeadClassifier",
    "DualHeadOutput",
    "FrozenTeacher",
    "FusedCausalLM",
    "FusedScores",
    "FusedStep",
    "FusionCriterion",
    "FusionModels",
    "FusionTrace",
    "GradAlign",
    "GradientAligner",
    "GraphAlignment",
    "HeadInit",
    "LogitCache",
    "LogitSource",
    "MappingStrategy",
    "MobileNetV2",
    "OriginalOutput",
    "ResidualVQLogitsHead",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "SmallModels",
    "SourceLogits",
    "SourceTerms",
    "TokenMean",
    "VQLogitsConfig",
    "VQLogitsForCausalLM",
    "VQLogitsHead",
    "WideResNet",
    "accepted_inputs",
    "add_lora",
    "cache_argument",
    "calibrate",
    "check_causal_lm",
    "check_decoding",
    "check_model_folder",
    "check_same_tokenizer",
    "choose_init",
    "classifier_logits",
    "compact_model",
    "continue_prompts",
    "counted_positions",
    "default_stages",
    "dense_model",
    "describe_cache",
    "describe_head",
    "describe_model",
    "describe_untying",
    "differing_settings",
    "digest_model",
    "eos_token_ids",
    "find_classifier",
    "find_layers",
    "find_tokenizer",
    "fit_output_layer",
    "freeze_first_layers",
    "has_lora",
    "initialize_dense_head",
    "initialize_residual_head",
    "initialize_vq_head",
    "is_causal_lm",
    "is_encoder",
    "is_logit_cache",
    "keep_original",
    "load_backbone",
    "load_causal_lm",
    "load_classifier",
    "load_fusion_models",
    "load_source",
    "load_teacher",
    "load_weights",
    "make_config",
    "make_optimizers",
    "merged_state_dict",
    "mobilenetv2",
    "new_causal_lm",
    "num_logits",
    "position_ids_of",
    "read_weights",
    "read_with_cache",
    "replace_folder",
    "resnet8",
    "resnet8x4",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet56",
    "resnet110",
    "restore_replaced",
    "save_merged",
    "shufflenetv1",
    "shufflenetv2",
    "split_prompts",
    "tap_features",
    "tokenizer_id",
    "vgg8",
    "vgg13",
    "view_of",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
