"""Checks of the arguments of `DualHeadKD`."""

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from torch import Tensor, nn

from lit_logits.functional.checks import check_not_negative
from lit_logits.functional.dual_head_kd import LogitLoss
from lit_logits.modules.dual_head_kd.classifiers import find_classifier, is_causal_lm
from lit_logits.modules.dual_head_kd.net import AuxiliaryHead, DualHeadClassifier
from lit_logits.modules.schedules import StepValue, value_at

__all__ = [
    "Method",
    "check_cache",
    "check_checkpoint",
    "check_has_labels",
    "check_has_teacher",
    "check_mixing",
    "check_options",
    "check_pair",
    "check_whole_gradients",
]

Method = Literal["ce", "kd", "single_head", "dual_head"]


def check_options(
    method: str,
    kd_loss: str | None,
    temperature: float | None,
    ce_weight: float,
    kd_factor: StepValue | None,
    lr_interval: str,
) -> None:
    """Refuse arguments out of range."""
    if method not in get_args(Method):
        raise ValueError(f"Expected `method` to be 'ce', 'kd', 'single_head' or 'dual_head', but got {method!r}.")
    if kd_loss is not None and kd_loss not in get_args(LogitLoss):
        raise ValueError(f"Expected `kd_loss` to be one of {sorted(get_args(LogitLoss))}, but got {kd_loss!r}.")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"Expected `temperature` to be positive, but got {temperature}.")
    check_not_negative(ce_weight=ce_weight, kd_factor=0 if kd_factor is None else value_at(kd_factor, 0))
    if lr_interval not in ("epoch", "step"):
        raise ValueError(f"Expected `lr_interval` to be 'epoch' or 'step', but got {lr_interval!r}.")


def check_cache(is_cached: bool, *, is_causal_lm: bool) -> None:
    """Refuse to keep the logits of a language model, one row of its vocabulary a token."""
    if is_cached and is_causal_lm:
        raise ValueError(
            "Expected `teacher_cache` to be None for a causal language model, but got a folder. `GLDFusionModule`"
            " learns from cached top-k logits (`LogitCacheWriter`)."
        )


def check_checkpoint(names: Iterable[str], method: str, aux_head: AuxiliaryHead | None) -> None:
    """Refuse the tensors of another method or kind of auxiliary head, and say which one fits."""
    aux_names = [name for name in names if name.startswith("net.aux_head.")]
    if bool(aux_names) != (aux_head is not None):
        given, own = ("with", "without") if aux_names else ("without", "with")
        raise ValueError(
            f"Expected a checkpoint {own} an auxiliary head for method={method!r}, but this one is {given} it. Pass the"
            " `method` (and `aux_head`) that it was trained with."
        )
    theirs = "nonlinear" if any(name.startswith("net.aux_head.trunk.") for name in aux_names) else "linear"
    if aux_head is not None and theirs != aux_head.kind:
        raise ValueError(
            f"Expected a checkpoint with aux_head={aux_head.kind!r}, but this one has {theirs!r}. Pass the `aux_head`"
            " that it was trained with."
        )


def check_has_labels(batch: Mapping[str, Tensor], method: str, kd_loss: str) -> None:
    """Refuse a batch without labels where the teacher alone is not enough."""
    if "labels" not in batch and (method == "ce" or kd_loss == "dkd"):
        raise ValueError(
            f"Expected batches with `labels` for method={method!r} and kd_loss={kd_loss!r}, but got {sorted(batch)}."
        )


def check_has_teacher(has_teacher: bool, method: str) -> None:
    """Refuse to train without the teacher that the method learns from."""
    if method != "ce" and not has_teacher:
        raise ValueError(
            f"Expected a `teacher` for method={method!r}, but got None, which serves evaluation only. Train one with"
            " method='ce'."
        )


def check_mixing(is_active: bool, kd_loss: str, *, is_causal_lm: bool, is_cached: bool) -> None:
    """Refuse mixed images where there are none, where each must have one class, and where all must come again."""
    if is_active and is_causal_lm:
        raise ValueError(
            "Expected `mixup_alpha` and `cutmix_alpha` to be 0 for a causal language model, whose tokens cannot be"
            " mixed, but got more."
        )
    if is_active and kd_loss == "dkd":
        raise ValueError(
            "Expected `mixup_alpha` and `cutmix_alpha` to be 0 for kd_loss='dkd', which needs one class a sample, but"
            " got more. Use 'kl', or another `kd_loss`."
        )
    if is_active and is_cached:
        raise ValueError(
            "Expected `mixup_alpha` and `cutmix_alpha` to be 0 with a `teacher_cache`, as mixed images do not come"
            " again, but got more."
        )


def check_pair(net: DualHeadClassifier, teacher: nn.Module) -> None:
    """Refuse a teacher of other classes. If its last layer is not found, the first batch tells."""
    student, other = type(net.student).__name__, type(teacher).__name__
    if teacher is net.student or not set(map(id, teacher.parameters())).isdisjoint(map(id, net.parameters())):
        raise ValueError("Expected a teacher that shares no parameters with the student: it is frozen. Pass a copy.")
    if is_causal_lm(teacher) != net.is_causal_lm:
        raise ValueError(f"Expected two classifiers or two causal language models, but got {student} and {other}.")
    try:
        layer = teacher.get_submodule(find_classifier(teacher))
    except ValueError:
        return
    if layer.out_features != net.num_classes:
        raise ValueError(
            f"Expected student and teacher to have the same classes, but {student} has {net.num_classes} and {other}"
            f" has {layer.out_features}. Pass the same `num_classes` (or vocabulary) to both."
        )


def check_whole_gradients(strategy: str, grad_align: str) -> None:
    """Refuse a strategy, by the name of its class, that shards gradients which are to be aligned."""
    if strategy.startswith(("FSDP", "DeepSpeed", "ModelParallel")):
        raise ValueError(
            f"Expected the strategy 'ddp' or one device for grad_align={grad_align!r}, because {strategy} shards the"
            " gradients, but got that. Set `grad_align: none`."
        )
