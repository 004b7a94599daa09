"""The original model of a compressed one: what its head is trained to imitate.

Letters: B batch, T sequence, d hidden size, V vocabulary.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_logits.functional import DenseTarget

__all__ = ["OriginalOutput"]


class OriginalOutput(nn.Module):
    """Holds a dense output layer, and the backbone it belongs to, out of `parameters()` and `state_dict()`.

    Args:
        weight: (V, d) rows; not copied.
        bias: (V,) in nats, or None.
        backbone: what the layer reads, in place frozen and in `eval` mode; None where the backbone of the compressed
            model is not trained, so that its hidden states serve both.

    Example:
        >>> original = OriginalOutput(torch.zeros(5, 3))
        >>> len(original.state_dict()), original.target(torch.ones(2, 3)).weight.shape
        (0, torch.Size([5, 3]))

    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias
        self._held = () if backbone is None else (backbone.eval().requires_grad_(False),)  # so not registered here

    @torch.no_grad()
    def target(self, hidden: Tensor, **inputs: Any) -> DenseTarget:
        """What to imitate.

        Args:
            hidden: (B, T, d) of the compressed model, taken over where there is no backbone.
            **inputs: of the backbone.

        """
        for backbone in self._held:
            hidden = backbone(**inputs, use_cache=False).last_hidden_state
        return DenseTarget(hidden.detach(), self._weight, self._bias)

    def separate(self, backbone: nn.Module) -> "OriginalOutput":
        """The same with tensors of its own, where `backbone`, of the compressed model, is about to change.

        Args:
            backbone: as it still is; it serves where this holds none.

        """
        own = copy.deepcopy(self._held[0] if self._held else backbone)
        return OriginalOutput(self._weight.clone(), None if self._bias is None else self._bias.clone(), own)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OriginalOutput":
        for backbone in self._held:
            backbone._apply(fn, recurse)
        self._weight = fn(self._weight)
        self._bias = None if self._bias is None else fn(self._bias)
        return super()._apply(fn, recurse)
