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
from lit_logits.modules.language_models.inspect import find_layers
from lit_logits.modules.language_models.loading import CausalBackbone

__all__ = ["OriginalOutput", "keep_original"]


class OriginalOutput(nn.Module):
    """Holds a dense output layer, and the backbone it belongs to, out of `parameters()` and `state_dict()`.

    Args:
        weight: (V, d) rows; not copied.
        bias: (V,) in nats, or None.
        backbone: what the layer reads, in place frozen and in `eval` mode; None where the backbone of the compressed
            model is not trained, so that its hidden states serve both.
        num_shared_layers: how many of the first layers are those of the compressed model, frozen; see `sharing_layers`.

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
        super().__init__()
        self.num_shared_layers = num_shared_layers
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

    @contextlib.contextmanager
    def sharing_layers(self, backbone: nn.Module) -> Iterator[None]:
        """Within, the shared layers run once: a run of the original goes on from where the last one of `backbone` was.

        Args:
            backbone: of the compressed model.
        """
        outputs: list[Any] = []
        theirs = [layer for held in self._held for layer in find_layers(held)[1][: self.num_shared_layers]]
        before = [vars(layer).get("forward") for layer in theirs]  # hooks of others may live there
        handles = []
        if theirs:
            last = find_layers(backbone)[1][len(theirs) - 1]
            handles.append(last.register_forward_hook(lambda *given: outputs.append(given[-1])))
        for layer in theirs:
            layer.forward = _Replay(outputs, layer.forward)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer, forward in zip(theirs, before, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

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
    bias = None if parts.output_bias is None else parts.output_bias.clone()
    backbone = copy.deepcopy(parts.model, {id(parameter): parameter for parameter in frozen})
    original = OriginalOutput(parts.output_weight.clone(), bias, backbone, num_shared_layers=num_frozen_layers)
    if num_frozen_layers and not _goes_on(original, parts.model):
        original.num_shared_layers = 0
    return original


@torch.no_grad()
def _goes_on(original: OriginalOutput, backbone: nn.Module) -> bool:
    """Whether the original can start behind the shared layers: some read more than the layer in front of them."""
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
