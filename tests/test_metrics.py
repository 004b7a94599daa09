"""`TokenMean`: weights, NaN, and sums that stay exact in a module of fewer bits."""

import pytest
import torch
from torch import nn

from lit_logits.modules import TokenMean


def test_mean_over_updates_and_weights():
    mean = TokenMean()
    mean.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    mean.update(10.0, weight=2)
    mean.update(torch.zeros(0))
    assert mean.compute().item() == pytest.approx((1 + 2 + 3 + 4 + 20) / 6)
    mean.reset()
    assert mean.compute().isnan()


def test_nan_is_not_left_out():
    mean = TokenMean()
    mean.update(torch.tensor([1.0, torch.nan]))
    assert mean.compute().isnan()


def test_a_cast_module_keeps_counting():
    """In bfloat16 a count of ones stops at 256, and a perplexity with it."""
    module = nn.ModuleDict({"mean": TokenMean()}).to(torch.bfloat16).half()
    for _ in range(2000):
        module["mean"].update(torch.tensor([3.0], dtype=torch.bfloat16))
    assert module["mean"].weight.item() == 2000
    assert module["mean"].compute().item() == 3
    module["mean"].reset()
    assert module["mean"].total.dtype == torch.float32
