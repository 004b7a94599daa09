"""The original of a compressed model, which the new head is trained to imitate.

Letters: B batch, T sequence, d hidden size, V vocabulary.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_logits.functional.residual_vq import DenseTarget
from lit_logits.modules.language_models.calls import text_inputs
from lit_logits.modules.language_models.frozen import FrozenModels
from lit_logits.modules.language_models.inspect import find_layers
from lit_logits.modules.language_models.loading import CausalBackbone

__all__ = ["OriginalOutput", "keep_original"]


class OriginalOutput(FrozenModels):
    """A dense output layer and its backbone, held out of training.

    Args:
        weight: (V, d) rows; not copied.
        bias: (V,) in nats, or None.
        backbone: gives the hidden states that the layer reads; frozen in place. None if the backbone of the compressed
            model is not trained, so that its hidden states serve both.
        num_shared_layers: how many of the first layers of `backbone` are frozen and the same in the compressed model;
            see `sharing_layers`.
        hidden_scale: factor of the hidden states of `backbone` that the layer reads.
        logit_cap: c of the soft cap of the layer's logits, or None.

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
        hidden_scale: float = 1.0,
        logit_cap: float | None = None,
    ) -> None:
        super().__init__(*([] if backbone is None else [backbone]))
        self.hidden_scale, self.logit_cap = hidden_scale, logit_cap
        self._rows = _Rows(weight, bias)
        self._shared: list[Any] = []  # the last output of the shared layers
        if backbone is not None and num_shared_layers:
            # An attribute of the instance takes precedence over the method of its class. `backbone` is a copy whose
            # layers share only parameters with the trained model, so that model still runs its own `forward`.
            for layer in find_layers(backbone)[1][:num_shared_layers]:
                layer.forward = _Replay(self._shared, layer.forward)
        self.num_shared_layers = num_shared_layers

    @torch.no_grad()
    def target(
        self,
        hidden: Tensor,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> DenseTarget:
        """Return the target to imitate.

        Args:
            hidden: (B, T, d) that the head of the compressed model reads, used if there is no backbone here.
            input_ids: (B, T) of the backbone, as the others; not needed if there is none here.
            attention_mask: (B, T), or None.
            position_ids: (B, T), or None.
        """
        for backbone in self.models:
            output = backbone(input_ids=input_ids, **text_inputs(backbone, attention_mask, position_ids))
            hidden = output.last_hidden_state * self.hidden_scale
        return DenseTarget(hidden.detach(), self._rows.weight, self._rows.bias, self.logit_cap)

    @contextlib.contextmanager
    def sharing_layers(self, backbone: nn.Module) -> Iterator[None]:
        """Run the shared layers once: within the context the original continues from their output in `backbone`.

        Args:
            backbone: of the compressed model.
        """
        if not self.num_shared_layers:
            yield
            return
        # All shared layers of the original return the output of the last one: each passes it on, and the first layer
        # that is not shared reads what it would have read.
        last = find_layers(backbone)[1][self.num_shared_layers - 1]
        handle = last.register_forward_hook(lambda *given: self._shared.append(given[-1]))
        try:
            yield
        finally:
            handle.remove()
            self._shared.clear()

    def separate(self, backbone: nn.Module) -> "OriginalOutput":
        """Return a copy that shares no tensor with `backbone`, which is about to change.

        Args:
            backbone: of the compressed model, still unchanged; it is copied if this holds none.
        """
        own = copy.deepcopy(self.models[0] if self.models else backbone)
        weight, bias = self._rows.weight, self._rows.bias
        return OriginalOutput(
            weight.clone(),
            None if bias is None else bias.clone(),
            own,
            hidden_scale=self.hidden_scale,
            logit_cap=self.logit_cap,
        )


class _Rows(nn.Module):
    """Rows of an output layer that follow to devices and dtypes and stay out of checkpoints."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        # Not buffers: DDP would send them to all ranks in every forward.
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Rows":
        super()._apply(fn, recurse)
        self.weight, self.bias = fn(self.weight), None if self.bias is None else fn(self.bias)
        return self


def keep_original(parts: CausalBackbone, num_frozen_layers: int = 0, *, same_inputs: bool = True) -> OriginalOutput:
    """Keep a model as it is before training, to be imitated; frozen parameters are shared, the others copied.

    Args:
        parts: of the model that is about to be trained; its frozen parameters are frozen already.
        num_frozen_layers: how many of the first layers are frozen, with all that comes before them; see
            `sharing_layers`.
        same_inputs: whether the layers of both read the same; not so where the trained model gets another input table.

    Raises:
        ValueError: If the model has random weights: there is nothing to imitate.
    """
    if parts.output_weight is None:
        raise ValueError(
            "Expected a pretrained backbone for `kd_weight`, which imitates its output layer, but the backbone is a"
            " config with random weights."
        )
    rule: Any = {"hidden_scale": parts.rule.bias_free_scale, "logit_cap": parts.rule.cap}
    frozen = [parameter for parameter in parts.model.parameters() if not parameter.requires_grad]
    if same_inputs and len(frozen) == len(list(parts.model.parameters())):
        return OriginalOutput(parts.output_weight, parts.output_bias, **rule)
    # Cloned, because a tied output layer is the input table, which is trained.
    weight = parts.output_weight.clone()
    bias = None if parts.output_bias is None else parts.output_bias.clone()
    for num_shared_layers in (num_frozen_layers if same_inputs else 0, 0):
        # `deepcopy` takes what its memo holds as copied already: frozen parameters stay one tensor.
        backbone = copy.deepcopy(parts.model, {id(parameter): parameter for parameter in frozen})
        original = OriginalOutput(weight, bias, backbone, num_shared_layers=num_shared_layers, **rule)
        if num_shared_layers == 0 or _goes_on(original, parts.model):
            break
    return original


@torch.no_grad()
def _goes_on(original: OriginalOutput, backbone: nn.Module) -> bool:
    """Return whether the original can start after the shared layers: in some models later layers read earlier ones too.

    Before training both must give the same hidden states to the bit, so one short text decides.
    """
    weight = next(backbone.parameters())
    if weight.is_meta:
        return False
    was_training = backbone.training
    ids = torch.arange(2, device=weight.device).unsqueeze(0)
    try:
        with original.sharing_layers(backbone.eval()):
            whole = backbone(input_ids=ids, use_cache=False).last_hidden_state
            return torch.equal(original.target(whole, input_ids=ids).hidden, whole * original.hidden_scale)
    except (RuntimeError, TypeError, LookupError, AttributeError):
        return False
    finally:
        backbone.train(was_training)


class _Replay:
    """A layer's `forward` that returns the last of `outputs`, or runs the layer if there is none."""

    def __init__(self, outputs: list[Any], forward: Callable[..., Any]) -> None:
        self.outputs, self.forward = outputs, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs[-1] if self.outputs else self.forward(*args, **kwargs)
