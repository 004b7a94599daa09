"""Means over all tokens of all ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["TokenMean"]


class TokenMean(Metric):
    """Σ w v / Σ w over all values, updates and ranks; NaN where there were none, and where a value is NaN.

    A diverged model must not look healthy, so NaN is not left out. The sums stay float32 in a module that is cast to
    bfloat16, whose eight bits would soon stop counting.

    Example:
        >>> mean = TokenMean().to(torch.bfloat16)
        >>> for _ in range(1000):
        ...     mean.update(torch.tensor([1.0, 2.0]), weight=torch.tensor([3.0, 1.0]))
        >>> mean.compute()
        tensor(1.2500)
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "weight"):
            self.add_state(name, default=torch.tensor(0.0), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> Any:
        """Follow to devices, and to no dtype."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)

    def update(self, values: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Take in `values` (any shape, on any device), each of `weight` (broadcast)."""
        values = torch.as_tensor(values).to(self.total)
        weight = torch.as_tensor(weight).to(self.total).expand_as(values)
        self.total += (values * weight).sum()
        self.weight += weight.sum()

    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.weight
