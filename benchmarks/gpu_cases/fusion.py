"""The search for fusion weights of one decoding step."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cases.runner import Case, Group, Round
from lit_logits.functional import fusion_problem, fusion_weights

__all__ = ["fusion_logits", "group", "host_may_read"]

VOCABS, BATCHES, EXPERTS = (32_000, 128_256), (1, 8, 32), (1, 3)
SMALL = ((300,), (1, 3), (1, 3))


def fusion_logits(batch: int, vocab: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Large model, base and experts on the CPU: a Zipf-like profile with noise, from which experts move away."""
    g = torch.Generator().manual_seed(0)
    profile = -1.1 * torch.arange(1, vocab + 1).log()
    ranks = torch.stack([torch.randperm(vocab, generator=g) for _ in range(batch)])
    large = 1.5 * profile[ranks] + torch.randn(batch, vocab, generator=g)
    base = profile[ranks] + torch.randn(batch, vocab, generator=g)
    return large, base, base + torch.randn(experts, batch, vocab, generator=g)


@contextmanager
def host_may_read() -> Iterator[None]:
    """Let the search read values on a device, so that it ends early and the host waits at every pass."""
    name = "may_read"
    holders = [m for key, m in [*sys.modules.items()] if key.startswith("lit_logits.functional") and hasattr(m, name)]
    kept = [getattr(holder, name) for holder in holders]
    for holder in holders:
        setattr(holder, name, lambda tensor: True)
    try:
        yield
    finally:
        for holder, function in zip(holders, kept, strict=True):
            setattr(holder, name, function)


def _prepare(way: str, mode: Any, size: tuple[int, int, int], device: torch.device) -> Callable[[], Any]:
    logits = [tensor.to(device) for tensor in fusion_logits(*size)]
    if way == "as it is":
        return functools.partial(fusion_weights, *logits, mode=mode)

    def step() -> Any:
        with host_may_read():
            return fusion_weights(*logits, mode=mode)

    return step


def group(small: bool) -> Group:
    """The group of searches."""
    vocabs, batches, counts = SMALL if small else (VOCABS, BATCHES, EXPERTS)
    ways = ("as it is", "the host reads values") if hasattr(fusion_problem, "may_read") else ("as it is",)
    rounds = []
    for vocab in vocabs:
        for batch in batches:
            for experts in counts:
                modes = ("single",) if experts == 1 else ("single", "joint")
                cases = [
                    Case(f"{mode}, {way}", functools.partial(_prepare, way, mode, (batch, vocab, experts)), seconds=2.0)
                    for mode in modes
                    for way in ways
                ]
                rounds.append(Round(f"V = {vocab:,}, B = {batch}, S = {experts}", cases))
    return Group("fusion", "Search for fusion weights, logits in float32", 3, rounds)
