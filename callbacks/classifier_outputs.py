"""What a classifier returned last: evaluation has computed it anyway, and no model runs twice."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_logits.modules.dual_head_kd.net import DualHeadClassifier, DualHeadOutput

__all__ = ["ClassifierOutputs"]


class ClassifierOutputs:
    """Keep the outputs of a classifier's last call, from `start` to `stop`.

    Example:
        >>> import torch
        >>> net, outputs = DualHeadClassifier(nn.Linear(4, 3)), ClassifierOutputs()
        >>> outputs.start(net)
        >>> _ = net({"pixel_values": torch.zeros(2, 4)})
        >>> outputs.take().logits.shape, outputs.take()
        (torch.Size([2, 3]), None)
        >>> outputs.stop()
    """

    def __init__(self) -> None:
        self._hook: RemovableHandle | None = None
        self._last: DualHeadOutput | None = None

    def start(self, net: DualHeadClassifier) -> None:
        """Watch the calls of `net` from now on."""
        self.stop()
        self._hook = net.register_forward_hook(self._remember)

    def take(self) -> DualHeadOutput | None:
        """Return what the last call gave, without a graph, or None if there was none since."""
        last, self._last = self._last, None
        return last

    def stop(self) -> None:
        """Watch no longer."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._last = None

    def _remember(self, module: nn.Module, args: Any, output: DualHeadOutput) -> None:
        self._last = DualHeadOutput(*(None if part is None else part.detach() for part in output))  # type: ignore[arg-type]
