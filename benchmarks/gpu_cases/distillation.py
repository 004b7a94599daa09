"""A step of DualHeadKD with and without gradient alignment, and the parts of GLD's loss."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cases.runner import Case, Group, Round
from lit_logits.functional import graph_strengths, sorted_gw_bound, top_k_logits, top_k_uld, top_k_values

__all__ = ["alignment_group", "graphs_group"]

STEPS: dict[str, dict[str, Any]] = {
    "cross-entropy alone": {"method": "ce"},
    "KD": {"method": "kd"},
    "dual head": {"method": "dual_head"},
    "dual head, aligned": {"method": "dual_head", "grad_align": "backbone"},
}
TOP_K = 10  # of the recipes


def _kd_step(name: str, student: str, teacher: str, batch_size: int, device: torch.device) -> Callable[[], None]:
    """Forward, backward, alignment and SGD, as the LightningModule's hooks do it."""
    from benchmarks.dual_head_step import distillation_step
    from lit_logits import DualHeadKD
    from lit_logits.modules import load_classifier

    torch.manual_seed(0)
    source = None if STEPS[name]["method"] == "ce" else load_classifier(teacher, 100)
    model = DualHeadKD(student, source, num_classes=100, **STEPS[name]).to(device).train()
    g = torch.Generator().manual_seed(0)
    batch = {
        "pixel_values": torch.randn(batch_size, 3, 32, 32, generator=g).to(device),
        "labels": torch.randint(100, (batch_size,), generator=g).to(device),
    }
    return distillation_step(model, batch)


def alignment_group(small: bool) -> Group:
    """The group of DualHeadKD's steps."""
    student, teacher, batch = ("resnet8", "resnet20", 4) if small else ("resnet8x4", "resnet32x4", 64)
    cases = [Case(name, functools.partial(_kd_step, name, student, teacher, batch)) for name in STEPS]
    rounds = [Round(f"batch {batch}", cases)]
    return Group("alignment", f"DualHeadKD, {student} from {teacher}, 32 × 32, float32", 1, rounds)


def _logits(size: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    g = torch.Generator(device).manual_seed(0)
    return torch.randn(size, device=device, generator=g).mul_(3).to(dtype)


def _top_k(size: tuple[int, int, int], dtype: torch.dtype, backward: bool, device: torch.device) -> Callable[[], None]:
    logits = _logits(size, device, dtype).requires_grad_(backward)

    def step() -> None:
        top = top_k_logits(logits, TOP_K)
        if backward:
            (top.log_probs.sum() + top.mean.sum() + top.std.sum()).backward()
            logits.grad = None

    return step


def _plain_top_k(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    logits = _logits(size, device, dtype).requires_grad_()

    def step() -> None:
        log_probs = logits.log_softmax(-1).topk(TOP_K).values
        (log_probs.sum() + logits.mean(-1).sum() + logits.std(-1, correction=0).sum()).backward()
        logits.grad = None

    return step


def _bound(size: tuple[int, int, int], nodes: Any, device: torch.device) -> Callable[[], None]:
    """Strengths of both sides and their bound, from the top-k on, with the gradient."""
    top = top_k_logits(_logits(size, device, torch.bfloat16), TOP_K)
    values, ids = top_k_values(top, "standardize"), top.token_ids
    student = values.clone().requires_grad_()
    other, other_ids = values.roll(1, 0) + 0.1, ids.roll(1, 0)

    def step() -> None:
        one, two = graph_strengths(student, ids, nodes=nodes), graph_strengths(other, other_ids, nodes=nodes)
        num_nodes = None if nodes == "rank" else torch.minimum(one.num_nodes, two.num_nodes)
        sorted_gw_bound(one.strengths, two.strengths, num_nodes).mean().backward()
        student.grad = None

    return step


def _uld(size: tuple[int, int, int], device: torch.device) -> Callable[[], None]:
    logits = _logits(size, device, torch.bfloat16).requires_grad_()
    teacher = top_k_logits(logits.detach().roll(1, 0), TOP_K)

    def step() -> None:
        top_k_uld(top_k_logits(logits, TOP_K), teacher).mean().backward()
        logits.grad = None

    return step


def graphs_group(small: bool) -> Group:
    """The group of GLD's parts."""
    size = (2, 16, 500) if small else (4, 1024, 128_256)
    half = torch.bfloat16
    cases = [
        Case("top_k_logits, forward and backward", functools.partial(_top_k, size, half, True)),
        Case("log_softmax, topk, mean, std, forward and backward", functools.partial(_plain_top_k, size, half)),
        Case("top_k_logits, forward", functools.partial(_top_k, size, half, False)),
        Case("strengths and bound, nodes by rank", functools.partial(_bound, size, "rank")),
        Case("strengths and bound, nodes by vocabulary", functools.partial(_bound, size, "vocabulary")),
        Case("top-k and ULD, forward and backward", functools.partial(_uld, size)),
    ]
    rounds = [Round(f"B·T = {size[0] * size[1]:,}, V = {size[2]:,}, k = {TOP_K}", cases)]
    return Group("graphs", "GLD's loss, logits in bf16", 1, rounds)
