"""Decoding step of an output layer: dense in bfloat16 and int8, and residual product codes."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_cases.runner import Case, Group, Round
from lit_logits.modules import ResidualVQLogitsHead

__all__ = ["group", "quantized", "residual_head"]

HIDDEN_SIZE, VOCAB_SIZE, BATCHES, WIDTH = 4096, 128_256, (1, 8, 64), 8
SMALL = (64, 1000, (1, 8), 8)
MIN_INT8_ROWS = 32  # torch._int_mm wants more than 16 on a GPU

Step = Callable[[], Any]


@functools.lru_cache(maxsize=1)
def _weight(hidden_size: int, vocab_size: int, device: torch.device) -> Tensor:
    weight = torch.empty(vocab_size, hidden_size, device=device, dtype=torch.bfloat16)
    return weight.normal_(0, hidden_size**-0.5)


@functools.lru_cache(maxsize=1)
def _int8_weight(hidden_size: int, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return quantized(_weight(hidden_size, vocab_size, device))


@functools.lru_cache(maxsize=1)
def residual_head(hidden_size: int, vocab_size: int, width: int, device: torch.device) -> ResidualVQLogitsHead:
    """Two stages of 256 codes for every `width` coordinates, random; the second is smaller, as in fitted heads."""
    torch.manual_seed(0)
    codebook_size = min(256, vocab_size)
    head = ResidualVQLogitsHead(hidden_size, vocab_size, codebook_size, num_groups=hidden_size // width, token_stages=2)
    with torch.no_grad():
        head.codebook[1] *= 0.35
    head.codebook.requires_grad_(False)
    return head.to(device).eval()


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 (N, d) and the float32 scale of each row (N, 1), symmetric."""
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-8) / 127
    return (rows / scale).round().clamp(-127, 127).to(torch.int8), scale


def _dense(hidden: Tensor, *sizes: Any) -> Callable[[], Tensor]:
    weight = _weight(*sizes, hidden.device)
    return lambda: F.linear(hidden, weight)


def _int8_product(hidden: Tensor, *sizes: Any) -> Callable[[], Tensor]:
    weight, scale = _int8_weight(*sizes, hidden.device)
    scales = scale.T

    def step() -> Tensor:
        rows, row_scale = quantized(hidden)
        padded = F.pad(rows, (0, 0, 0, max(0, MIN_INT8_ROWS - len(rows))))
        return (torch._int_mm(padded, weight.T)[: len(rows)] * row_scale * scales).to(hidden.dtype)

    return step


def _int8_weight_only(hidden: Tensor, *sizes: Any) -> Callable[[], Tensor]:
    weight, scale = _int8_weight(*sizes, hidden.device)
    scales = scale.T.to(hidden.dtype)
    return lambda: F.linear(hidden, weight.to(hidden.dtype)) * scales


DENSE: dict[str, Callable[..., Callable[[], Tensor]]] = {
    "dense, bf16": _dense,
    "dense, int8, torch._int_mm of rows quantised at the step": _int8_product,
    "dense, int8, weights made bf16 at the step": _int8_weight_only,
}
CODED = "ResidualVQLogitsHead, two stages"


def _prepare(name: str, result: str, sizes: tuple[int, int], width: int, batch_size: int, device: torch.device) -> Step:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(batch_size, sizes[0], device=device, generator=generator).bfloat16()
    if name in DENSE:
        logits: Step = DENSE[name](hidden, *sizes)
        step: Step = logits if result == "logits" else lambda: logits().argmax(-1)
    else:
        head = residual_head(*sizes, width, device)
        step = functools.partial(head if result == "logits" else head.greedy, hidden)
    return torch.no_grad()(step)


def _release() -> None:
    for cached in (_weight, _int8_weight, residual_head):
        cached.cache_clear()


def group(small: bool) -> Group:
    """The group of decoding steps."""
    hidden_size, vocab_size, batches, width = SMALL if small else (HIDDEN_SIZE, VOCAB_SIZE, BATCHES, WIDTH)
    rounds = []
    for batch_size in batches:
        for result in ("logits", "greedy"):
            cases = []
            for name in (*DENSE, CODED):
                prepare = functools.partial(_prepare, name, result, (hidden_size, vocab_size), width, batch_size)
                cases.append(Case(f"{name}, {result}", prepare, seconds=10.0 if name == CODED else 3.0, calls=5))
            rounds.append(Round(f"batch {batch_size}", cases))
    title = f"Decoding step of an output layer, H = {hidden_size:,}, V = {vocab_size:,}, hidden states in bf16"
    return Group("decoding", title, 4, rounds, release=_release)
