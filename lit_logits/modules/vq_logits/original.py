"""The original model of a compressed one: what its head is trained to imitate.

Letters: B batch, T sequence, d hidden size, V vocabulary.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_logits.functional.residual_vq import DenseTarget
from lit_logits.modules.language_models.frozen import FrozenModels
from lit_logits.modules.language_models.inspect import find_layers
from lit_logits.modules.language_models.loading import CausalBackbone

__all__ = ["OriginalOutput", "keep_original"]


class OriginalOutput(FrozenModels):
    """A dense output layer, and the backbone it belongs to, held out of training.

    Args:
        weight: (V, d) rows; not copied.
        bias: (V,) in nats, or None.
        backbone: what the layer reads, frozen in place; None where the backbone of the compressed model is not trained,
            so that its hidden states serve both.
        num_shared_layers: how many of the first layers of `backbone` are those of the compressed model, frozen; see
            `sharing_layers`.

    Example:
        >>> original = OriginalOutput(torch.zeros(5, 3))
        >>> len(original.state_dict()), original.target(torch.ones(2, 3)).weight.shape
        (0, torch.Size([5, 3]))
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        backbone: nn.Module | None = None,
        *,
        num_shared_layers: int = 0,
    ) -> None:
        super().__init__(*([] if backbone is None else [backbone]))
        self._rows = _Rows(weight, bias)
        self._shared: list[Any] = []  # the last output of the shared layers
        if backbone is not None and num_shared_layers:
            for layer in find_layers(backbone)[1][:num_shared_layers]:
                layer.forward = _Replay(self._shared, layer.forward)
        self.num_shared_layers = num_shared_layers

    @torch.no_grad()
    def target(self, hidden: Tensor, **inputs: Any) -> DenseTarget:
        """Return what to imitate.

        Args:
            hidden: (B, T, d) of the compressed model, taken over where there is no backbone.
            **inputs: of the backbone.
        """
        for backbone in self.models:
            hidden = backbone(**inputs, use_cache=False).last_hidden_state
        return DenseTarget(hidden.detach(), self._rows.weight, self._rows.bias)

    @contextlib.contextmanager
    def sharing_layers(self, backbone: nn.Module) -> Iterator[None]:
        """Within, the shared layers run once: the original goes on from where the last run of `backbone` left them.

        Args:
            backbone: of the compressed model.
        """
        if not self.num_shared_layers:
            yield
            return
        last = find_layers(backbone)[1][self.num_shared_layers - 1]
        handle = last.register_forward_hook(lambda *given: self._shared.append(given[-1]))
        try:
            yield
        finally:
            handle.remove()
            self._shared.clear()

    def separate(self, backbone: nn.Module) -> "OriginalOutput":
        """Return the same with tensors of its own, where `backbone`, of the compressed model, is about to change.

        Args:
            backbone: as it still is; it serves where this holds none.
        """
        own = copy.deepcopy(self.models[0] if self.models else backbone)
        weight, bias = self._rows.weight, self._rows.bias
        return OriginalOutput(weight.clone(), None if bias is None else bias.clone(), own)


class _Rows(nn.Module):
    """Rows of an output layer that follow to devices and dtypes, and are in no checkpoint."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)


def keep_original(parts: CausalBackbone, num_frozen_layers: int = 0) -> OriginalOutput:
    """A model as it is before training, to be imitated; what is frozen serves both.

    Args:
        parts: of the model that is about to be trained; what is frozen in it is frozen already.
        num_frozen_layers: how many of the first layers are frozen, as is all in front of them; see `sharing_layers`.

    Raises:
        ValueError: for a model of random weights, which says nothing.
    """
    if parts.output_weight is None:
        raise ValueError(
            "Expected a pretrained backbone for `kd_weight`, which imitates its output layer, but the backbone is a"
            " config with random weights."
        )
    frozen = [parameter for parameter in parts.model.parameters() if not parameter.requires_grad]
    if len(frozen) == len(list(parts.model.parameters())):
        return OriginalOutput(parts.output_weight, parts.output_bias)
    weight = parts.output_weight.clone()
    bias = None if parts.output_bias is None else parts.output_bias.clone()
    for num_shared_layers in (num_frozen_layers, 0):
        backbone = copy.deepcopy(parts.model, {id(parameter): parameter for parameter in frozen})
        original = OriginalOutput(weight, bias, backbone, num_shared_layers=num_shared_layers)
        if num_shared_layers == 0 or _goes_on(original, parts.model):
            break
    return original


@torch.no_grad()
def _goes_on(original: OriginalOutput, backbone: nn.Module) -> bool:
    """Whether the original can start after the shared layers: in some models a layer reads more than the one before."""
    weight = next(backbone.parameters())
    if weight.is_meta:
        return False
    was_training = backbone.training
    ids = torch.arange(2, device=weight.device).unsqueeze(0)
    try:
        with original.sharing_layers(backbone.eval()):
            whole = backbone(input_ids=ids, use_cache=False).last_hidden_state
            return torch.equal(original.target(whole, input_ids=ids).hidden, whole)
    except (RuntimeError, TypeError, LookupError, AttributeError):
        return False
    finally:
        backbone.train(was_training)


class _Replay:
    """A layer's `forward` that gives the last of `outputs`, and runs the layer where there is none."""

    def __init__(self, outputs: list[Any], forward: Callable[..., Any]) -> None:
        self.outputs, self.forward = outputs, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs[-1] if self.outputs else self.forward(*args, **kwargs)
