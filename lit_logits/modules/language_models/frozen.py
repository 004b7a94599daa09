"""Models that are held and not trained: teachers, sources, originals, and models that decode together."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FrozenModels", "input_device"]


class FrozenModels(nn.Module):
    """Models that are held out of `parameters()`, `state_dict()` and `train()`, so out of checkpoint and optimizer.

    They stay in `eval` mode without gradients, and follow this module to other devices and dtypes. A model that
    accelerate has spread (`device_map`) or that was put elsewhere stays where it is.

    A copy of this module, such as callbacks make that average weights, shares the models. It copies them when it goes
    to another device or dtype.

    Args:
        *models: frozen in place.
        keep_dtype: follow to devices only, as models that read token ids may; one that reads images, or hidden states
            of the trained model, must have their dtype.
        pinned: do not follow.

    Example:
        >>> held = FrozenModels(nn.Linear(4, 3)).train()
        >>> len(list(held.parameters())), held.models[0].training, held.half().models[0].weight.dtype
        (0, False, torch.float16)
    """

    def __init__(self, *models: nn.Module, keep_dtype: bool = False, pinned: bool = False) -> None:
        super().__init__()
        for model in models:
            model.eval().requires_grad_(False)
        self._held = models  # in a tuple, so that they are not registered here
        self._keep_dtype, self.pinned, self._shares = keep_dtype, pinned, False
        # Tells where this module is. Not a buffer: DDP sends those in every forward, and a rank that has no batch to
        # evaluate would keep the others waiting.
        self.anchor = torch.empty(0)

    @property
    def models(self) -> tuple[Any, ...]:
        """The models, as they were given."""
        return self._held

    def train(self, mode: bool = True) -> "FrozenModels":
        """Stay in `eval` mode."""
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenModels":
        """Share the models: they do not change."""
        memo |= {id(model): model for model in self._held}
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__ = copy.deepcopy(self.__dict__, memo)
        other._shares = True
        return other

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenModels":
        """Take along the models that are where this module is."""
        # Every move and cast (`to`, `half`, `cuda`) comes through here, and it does not reach what is not registered.
        before = self.anchor.device
        super()._apply(fn, recurse)
        moved = fn(self.anchor)
        if self._shares and (moved.device, moved.dtype) != (before, self.anchor.dtype):
            self._held, self._shares = copy.deepcopy(self._held), False
        self.anchor = moved
        for model in self._held:
            if self.pinned or hasattr(model, "hf_device_map") or input_device(model) not in (before, None):
                continue
            if not self._keep_dtype:
                model._apply(fn, recurse)
            elif self.anchor.device != before:
                model.to(self.anchor.device)
        return self


def input_device(model: nn.Module) -> torch.device | None:
    """Return where a model takes its input; for one that accelerate has spread, where its embedding is computed.

    None is returned for a model without tensors.
    """
    first: nn.Module = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model  # type: ignore[operator]
    device = getattr(getattr(first, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    tensors = (tensor for group in (first.parameters(), first.buffers()) for tensor in group)
    return next((tensor.device for tensor in tensors), None)
