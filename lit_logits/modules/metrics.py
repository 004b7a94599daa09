"""Means over all tokens of all ranks, and the values that are logged from them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["StageMeans", "TokenMean", "loss_and_perplexity"]

STAGES = ("val", "test")


class TokenMean(Metric):
    """Weighted mean Σ w v / Σ w over all values, updates and ranks; NaN if there are no values, or one of them is NaN.

    A diverged model must not look healthy, so NaN is not left out. The sums stay float32 in a module that is cast to
    bfloat16: its 8 bits of precision would soon swallow every further value.

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
        """Follow to devices, but not to other dtypes."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)

    def update(self, values: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Take in `values` (any shape, on any device), each of `weight` (broadcast)."""
        values = torch.as_tensor(values).to(self.total)
        weight = torch.as_tensor(weight).to(self.total).expand_as(values)
        # Not in place: a state that was reset under `inference_mode` must not be changed in place outside of it.
        self.total = self.total + (values * weight).sum()
        self.weight = self.weight + weight.sum()

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.weight


class StageMeans(nn.Module):
    """Means over all tokens of all ranks, by name, for validation and for test.

    Example:
        >>> means = StageMeans("nll", "acc")
        >>> means.update("val", nll=torch.tensor([1.0, 3.0]), acc=torch.tensor([1.0, 0.0]))
        >>> means.compute("val")
        {'nll': tensor(2.), 'acc': tensor(0.5000)}
    """

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict({stage: nn.ModuleDict({n: TokenMean() for n in names}) for stage in STAGES})

    def update(self, stage: str, **values: Tensor | tuple[Tensor, Tensor]) -> None:
        """Take in values by name, or pairs of a mean and the number that it was taken over."""
        for name, value in values.items():
            metric: Any = self._of(stage)[name]
            metric.update(*(value if isinstance(value, tuple) else (value,)))

    def compute(self, stage: str) -> dict[str, Tensor]:
        """Return the means, NaN where nothing was taken in, and reset them.

        All ranks must call it, because it adds up their sums. Log the means with `sync_dist=True`: it changes nothing,
        as they are equal on all ranks, but Lightning warns without it.
        """
        means = {name: metric.compute() for name, metric in self._of(stage).items()}
        for metric in self._of(stage).values():
            metric.reset()
        return means

    def _of(self, stage: str) -> Any:
        return self.metrics[stage]


def loss_and_perplexity(stage: str, nll: Tensor) -> dict[str, Tensor]:
    """Return the log entries of a mean negative log-likelihood in nats a token: itself and its exponential."""
    return {f"{stage}/loss": nll, f"{stage}/ppl": nll.exp()}
