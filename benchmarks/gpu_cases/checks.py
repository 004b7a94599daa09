"""Whether the device computes what the CPU computes: the largest differences, before anything is timed."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_cases.decoding import residual_head
from benchmarks.gpu_cases.fusion import fusion_logits
from benchmarks.gpu_cases.losses import zipf_labels
from benchmarks.gpu_cases.runner import Case, Group, Round
from lit_logits.functional import fusion_weights, graph_strengths, sorted_gw_bound, top_k_logits, top_k_values
from lit_logits.modules import HierarchicalVQLogitsHead, VQLogitsHead

__all__ = ["differences", "group"]

Result = dict[str, Any]


def differences(found: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> Result:
    """Largest absolute difference, what may be expected at most, and whether it holds; NaN never does."""
    largest = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            raise AssertionError(f"shapes {tuple(one.shape)} and {tuple(other.shape)} differ")
        gap = (one.detach().double().cpu() - other.detach().double().cpu()).abs()
        largest = max(largest, float("inf") if bool(gap.isnan().any()) else float(gap.max()))
    return {"max difference": largest, "limit": limit, "holds": "yes" if largest <= limit else "NO"}


def _look_up(dtype: torch.dtype, batch_size: int, sizes: tuple[int, int], device: torch.device) -> Result:
    head = residual_head(*sizes, 8, torch.device("cpu"))
    hidden = torch.randn(batch_size, sizes[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        expected = head(hidden.float())
        found = copy.deepcopy(head).to(device)(hidden.to(device))
    scale = float(expected.abs().max())
    return differences([found], [expected], scale * (1e-5 if dtype == torch.float32 else 1.5e-2))


def _greedy(dtype: torch.dtype, batch_size: int, sizes: tuple[int, int], device: torch.device) -> Result:
    """How far the chosen tokens' logits are below the largest, by the CPU."""
    head = residual_head(*sizes, 8, torch.device("cpu"))
    hidden = torch.randn(batch_size, sizes[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        logits = head(hidden.float())
    chosen = copy.deepcopy(head).to(device).greedy(hidden.to(device)).cpu()
    best = logits.amax(-1)
    result = differences([logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)], [best], 1e-4 * float(best.abs().max()))
    if dtype != torch.float32:
        result["limit"] = 1.5e-2 * float(best.abs().max())
        result["holds"] = "yes" if result["max difference"] <= result["limit"] else "NO"
    return {**result, "other tokens": int((chosen != logits.argmax(-1)).sum())}


def _loss(kind: str, tokens: int, sizes: tuple[int, int], device: torch.device) -> Result:
    """The loss and its gradients, those in units of the largest entry."""
    torch.manual_seed(0)
    small = sizes[1] <= 2000
    head: nn.Module = (
        VQLogitsHead(*sizes, 32 if small else 1024)
        if kind == "collapsed"
        else HierarchicalVQLogitsHead(*sizes, (16, 64) if small else (256, 256))
    )
    hidden = torch.randn(tokens, sizes[0], generator=torch.Generator().manual_seed(1))
    labels = zipf_labels(tokens, sizes[1], torch.device("cpu"))
    labels[::5] = -100
    expected, found = (_loss_and_gradients(copy.deepcopy(head), hidden, labels, at) for at in ("cpu", device))
    scales = [float(tensor.detach().abs().max().clamp(min=1e-12)) for tensor in expected]
    ours, theirs = ([t.detach().cpu() / s for t, s in zip(side, scales, strict=True)] for side in (found, expected))
    return differences(ours, theirs, limit=1e-4)


def _loss_and_gradients(head: Any, hidden: Tensor, labels: Tensor, device: Any) -> list[Tensor]:
    head = head.to(device)
    rows = hidden.clone().to(device).requires_grad_()
    loss = head.loss(rows, labels.to(device))
    loss.backward()
    gradients = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
    assert rows.grad is not None
    return [loss, rows.grad, *gradients]


def _fusion(mode: Any, size: tuple[int, int, int], device: torch.device) -> Result:
    logits = fusion_logits(*size)
    expected = fusion_weights(*logits, mode=mode)
    found = fusion_weights(*(tensor.to(device) for tensor in logits), mode=mode)
    objective = differences([found.objective], [expected.objective], 1e-4)
    result = differences([found.alpha], [expected.alpha], 1e-4)
    return {**result, "of the objective": objective["max difference"]}


def _graphs(nodes: Any, size: tuple[int, int, int], device: torch.device) -> Result:
    batch, positions, vocab = size
    g = torch.Generator().manual_seed(0)
    sides = [torch.randn(batch, positions, vocab, generator=g) for _ in range(2)]

    def bound(at: Any) -> list[Tensor]:
        strengths = []
        for side in sides:
            top = top_k_logits(side.to(at), 10)
            strengths.append(graph_strengths(top_k_values(top, "standardize"), top.token_ids, nodes=nodes))
        one, other = strengths
        num_nodes = None if nodes == "rank" else torch.minimum(one.num_nodes, other.num_nodes)
        return [sorted_gw_bound(one.strengths, other.strengths, num_nodes)]

    expected, found = bound("cpu"), bound(device)
    return differences(found, expected, 1e-4 * max(1.0, float(expected[0].abs().max())))


def _case(name: str, function: Callable[..., Result], *args: Any) -> Case:
    def prepare(device: torch.device) -> Callable[[], Result]:
        return functools.partial(function, *args, device)

    return Case(name, prepare, timed=False)


def group(small: bool) -> Group:
    """The group of checks."""
    sizes = (64, 1000) if small else (1024, 32_000)
    tokens, batches = (32, (1, 3)) if small else (1024, (1, 8, 64))
    sequences = (2, 300) if small else (8, 32_000)
    graphs = (2, 8, 300) if small else (4, 256, 32_000)
    rounds = []
    for batch in batches:
        cases = []
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            cases += [
                _case(f"look-up, logits, {name}", _look_up, dtype, batch, sizes),
                _case(f"look-up, greedy, {name}", _greedy, dtype, batch, sizes),
            ]
        rounds.append(Round(f"batch {batch}", cases))
    losses = [_case(f"{kind} loss and gradients, relative", _loss, kind, tokens, sizes) for kind in KINDS]
    rounds.append(Round(f"N = {tokens:,}", losses))
    searches = [
        _case(f"fusion weights, {mode}, S = {experts}", _fusion, mode, (*sequences, experts))
        for mode, experts in (("single", 1), ("single", 3), ("joint", 3))
    ]
    rounds.append(Round(f"B = {sequences[0]}, V = {sequences[1]:,}", searches))
    kinds = [_case(f"graph bound, nodes by {nodes}", _graphs, nodes, graphs) for nodes in ("rank", "vocabulary")]
    rounds.append(Round(f"B, T, V = {graphs}", kinds))
    return Group("checks", "Device against CPU", 2, rounds, release=residual_head.cache_clear)


KINDS = ("collapsed", "two-level")
