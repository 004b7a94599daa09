"""Parts that `torch.compile(fullgraph=True)` takes whole: values and gradients are those without it.

The backend `eager` runs what was traced as it is, so that no compiler is needed: what breaks a graph breaks it there.
Not claimed: `HierarchicalVQLogitsHead`, whose layout is kept by the version of its mapping, which no graph can ask for,
and the loss of `ResidualVQLogitsHead`, whose own backward the compiler does not take.
"""

from importlib.metadata import version

import pytest
import torch

from lit_logits.functional import (
    binary_kl_norm,
    dkd_loss,
    graph_strengths,
    kd_kl_divergence,
    sorted_gw_bound,
    top_k_logits,
    top_k_values,
)
from lit_logits.modules import DenseLogitsHead, ResidualVQLogitsHead, VQLogitsHead

# torch 2.6 cannot trace `torch.amp.is_autocast_available`.
VQ = pytest.param(
    "vq", marks=pytest.mark.skipif(tuple(map(int, version("torch").split(".")[:2])) < (2, 7), reason="needs torch 2.7")
)
HEADS = {
    "dense": lambda: DenseLogitsHead(16, 40),
    "vq": lambda: VQLogitsHead(16, 40, codebook_size=8),
    "residual": lambda: ResidualVQLogitsHead(16, 40, 8, num_stages=2),
}


def check_compiled(function, inputs, *rest):
    """Compare values and gradients over the inputs with and without the compiler."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    results = []
    for run in (function, compiled):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        value = run(*leaves, *rest)
        value.sum().backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(results[0]) == len(results[1]) > 1
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def gld(student, source):
    """Two graphs over ranks, compared as the loss does."""
    strengths = [
        graph_strengths(top_k_values(top_k_logits(one, 4), "standardize")).strengths for one in (student, source)
    ]
    return sorted_gw_bound(strengths[0], strengths[1].detach())


@pytest.mark.parametrize("name", ["dense", VQ, "residual"])
def test_logits_of_heads(name):
    torch.manual_seed(0)
    check_compiled(HEADS[name]().forward, [torch.randn(6, 16)])


@pytest.mark.parametrize("name", ["dense", VQ])
def test_losses_of_heads(name):
    torch.manual_seed(0)
    check_compiled(HEADS[name]().loss, [torch.randn(6, 16)], torch.tensor([0, 3, -100, 5, 7, 39]))


@pytest.mark.parametrize("loss", [binary_kl_norm, kd_kl_divergence])
def test_losses_of_two_heads(loss):
    torch.manual_seed(0)
    check_compiled(
        lambda student, teacher: loss(student, teacher.detach(), temperature=2.0), list(torch.randn(2, 5, 7))
    )


def test_decoupled_loss():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7)
    check_compiled(lambda student: dkd_loss(student, teacher, torch.arange(5)), [student])


def test_bound_between_graphs():
    torch.manual_seed(0)
    check_compiled(gld, list(torch.randn(2, 2, 5, 12)))
