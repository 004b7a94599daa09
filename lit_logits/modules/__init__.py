"""Parameters and buffers: nn.Modules that know nothing of a Trainer."""

from lit_logits.modules.backbone import (
    CausalBackbone,
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
from lit_logits.modules.fused_decoding import (
    FusedStep,
    FusionTrace,
    SmallModels,
    accepted_inputs,
    check_decoding,
    position_ids_of,
    split_prompts,
)
from lit_logits.modules.fusion_models import (
    FusionModels,
    check_same_tokenizer,
    digest_model,
    eos_token_ids,
    find_tokenizer,
    load_fusion_models,
    num_logits,
)
from lit_logits.modules.head_init import (
    HeadInit,
    choose_init,
    describe_head,
    describe_untying,
    initialize_dense_head,
    initialize_vq_head,
)
from lit_logits.modules.metrics import TokenMean
from lit_logits.modules.optimization import make_optimizers
from lit_logits.modules.teacher import FrozenTeacher, load_teacher, load_weights, read_weights
from lit_logits.modules.vq_logits import CodebookUpdate, MappingStrategy, VQLogitsHead

__all__ = [
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
    "FusionModels",
    "FusionTrace",
    "GradAlign",
    "GradientAligner",
    "HeadInit",
    "MappingStrategy",
    "MobileNetV2",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "SmallModels",
    "TokenMean",
    "VQLogitsHead",
    "WideResNet",
    "accepted_inputs",
    "calibrate",
    "check_decoding",
    "check_same_tokenizer",
    "choose_init",
    "classifier_logits",
    "describe_head",
    "describe_untying",
    "digest_model",
    "eos_token_ids",
    "find_classifier",
    "find_tokenizer",
    "initialize_dense_head",
    "initialize_vq_head",
    "is_causal_lm",
    "is_encoder",
    "load_backbone",
    "load_causal_lm",
    "load_classifier",
    "load_fusion_models",
    "load_teacher",
    "load_weights",
    "make_config",
    "make_optimizers",
    "mobilenetv2",
    "new_causal_lm",
    "num_logits",
    "position_ids_of",
    "read_weights",
    "resnet8",
    "resnet8x4",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet56",
    "resnet110",
    "shufflenetv1",
    "shufflenetv2",
    "split_prompts",
    "tap_features",
    "vgg8",
    "vgg13",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
