"""Training step of an output layer: forward, and backward to hidden states and weights, in bfloat16."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_cases.runner import Case, Group, Round
from lit_logits.modules import HierarchicalVQLogitsHead, VQLogitsHead

__all__ = ["LOSSES", "group", "zipf_labels"]

Loss = Callable[[Tensor, Tensor], Tensor]
HIDDEN_SIZE, VOCAB_SIZE, TOKENS = 4096, 128_256, (1024, 4096, 16_384)
SMALL = (64, 1000, (32, 64))


def zipf_labels(num_tokens: int, vocab_size: int, device: torch.device) -> Tensor:
    """Token ids whose probability is about 1 over the rank."""
    drawn = torch.rand(num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (((vocab_size + 1) ** drawn).long() - 1).clamp(0, vocab_size - 1).to(device)


@functools.lru_cache(maxsize=1)
def _dense_weight(hidden_size: int, vocab_size: int, device: torch.device) -> nn.Parameter:
    """(V, d); all dense cases share it, and their steps leave no gradient in it."""
    weight = torch.empty(vocab_size, hidden_size, device=device, dtype=torch.bfloat16)
    return nn.Parameter(weight.normal_(0, hidden_size**-0.5))


def _plain(weight: Tensor) -> Loss:
    return lambda hidden, labels: F.cross_entropy(F.linear(hidden, weight), labels)


def _float_logits(weight: Tensor) -> Loss:
    return lambda hidden, labels: F.cross_entropy(F.linear(hidden, weight).float(), labels)


def _torch_chunks(weight: Tensor) -> Loss:
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy in chunks, as 2.13 has")
    options = nn.LinearCrossEntropyOptions()
    return lambda hidden, labels: F.linear_cross_entropy(hidden, weight, labels, options=options)


def _liger(weight: Tensor) -> Loss:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, labels: loss(weight, hidden, labels)


def _apple(weight: Tensor) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, labels: linear_cross_entropy(hidden, weight, labels)


def _collapsed(hidden_size: int, vocab_size: int) -> nn.Module:
    return VQLogitsHead(hidden_size, vocab_size, 2048 if vocab_size > 10_000 else 32, bias=False)


def _two_levels(hidden_size: int, vocab_size: int) -> nn.Module:
    return HierarchicalVQLogitsHead(hidden_size, vocab_size, (512, 256) if vocab_size > 10_000 else (16, 64))


DENSE: dict[str, Callable[[Tensor], Loss]] = {
    "dense, cross_entropy": _plain,
    "dense, cross_entropy of float32 logits": _float_logits,
    "dense, torch's linear_cross_entropy in chunks": _torch_chunks,
    "dense, Liger's fused linear cross-entropy": _liger,
    "dense, Apple's cut cross-entropy": _apple,
}
HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "VQLogitsHead, collapsed, K = 2,048": _collapsed,
    "HierarchicalVQLogitsHead, 512 clusters + 256": _two_levels,
}
LOSSES = (*DENSE, *HEADS)


def _prepare(name: str, hidden_size: int, vocab_size: int, num_tokens: int, device: torch.device) -> Callable[[], None]:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, device=device, generator=generator).bfloat16().requires_grad_()
    labels = zipf_labels(num_tokens, vocab_size, device)
    if name in DENSE:
        parameters: list[Tensor] = [_dense_weight(hidden_size, vocab_size, device)]
        loss: Callable[..., Tensor] = DENSE[name](parameters[0])
    else:
        head: Any = HEADS[name](hidden_size, vocab_size).to(device)
        parameters = list(head.parameters())
        for parameter in parameters:  # not the buffers, which count in float32
            parameter.data = parameter.data.bfloat16()
        loss = head.loss

    def step() -> None:
        loss(hidden, labels).backward()
        for tensor in (hidden, *parameters):
            tensor.grad = None

    return step


def group(small: bool) -> Group:
    """The group of training steps."""
    hidden_size, vocab_size, tokens = SMALL if small else (HIDDEN_SIZE, VOCAB_SIZE, TOKENS)
    rounds = []
    for num_tokens in tokens:
        cases = [Case(name, functools.partial(_prepare, name, hidden_size, vocab_size, num_tokens)) for name in LOSSES]
        rounds.append(Round(f"N = {num_tokens:,}", cases))
    title = f"Training step of an output layer, H = {hidden_size:,}, V = {vocab_size:,}, bf16"
    return Group("losses", title, 6, rounds, release=_dense_weight.cache_clear)
