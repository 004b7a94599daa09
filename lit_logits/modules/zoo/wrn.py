"""Wide residual networks for 32 × 32 images: `wrn_d_k` has d layers and k times the channels.

Parameters are named as in the teacher checkpoints of the distillation literature, so such a file loads.

References:
    [0]: Wide Residual Networks, 2016, arXiv 1605.07146.
"""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WideResNet", "wrn_16_2", "wrn_40_1", "wrn_40_2"]


class WideResNet(nn.Module):
    """Stem of 16 channels, three stages of pre-activated blocks of 16k, 32k and 64k, linear classifier `fc`.

    Args:
        depth: 6n + 4 layers.
        widen_factor: k.
        num_classes: C.

    Raises:
        ValueError: If the depth is not 6n + 4.

    Example:
        >>> import torch
        >>> WideResNet(10, 1, num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int, widen_factor: int = 1, num_classes: int = 100) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"Expected `depth` to be 6n + 4, such as 16 or 40, but got {depth}.")
        blocks = (depth - 4) // 6
        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = _Stage(16, widths[0], blocks, stride=1)
        self.block2 = _Stage(widths[0], widths[1], blocks, stride=2)
        self.block3 = _Stage(widths[1], widths[2], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, 3, H, W)."""
        x = self.block3(self.block2(self.block1(self.conv1(pixel_values))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class _Block(nn.Module):
    """Normalise, activate and convolve, twice; if the shape changes, the shortcut starts after the first activation."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if in_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))


class _Stage(nn.Module):
    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        rest = (_Block(channels, channels, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(_Block(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def wrn_16_2(num_classes: int = 100) -> WideResNet:
    """Make WRN-16-2; 703,284 parameters with 100 classes."""
    return WideResNet(16, 2, num_classes)


def wrn_40_1(num_classes: int = 100) -> WideResNet:
    """Make WRN-40-1; 569,780 parameters with 100 classes."""
    return WideResNet(40, 1, num_classes)


def wrn_40_2(num_classes: int = 100) -> WideResNet:
    """Make WRN-40-2; 2,255,156 parameters with 100 classes."""
    return WideResNet(40, 2, num_classes)
