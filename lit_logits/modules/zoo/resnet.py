"""Residual networks for 32 × 32 images, as the tables of the distillation literature use them.

`resnet20` has 6n + 2 layers in three stages of n blocks, 16, 32 and 64 channels wide; `resnet8x4` and `resnet32x4` are
four times as wide after a stem of 32. Shortcuts that change the shape are 1 × 1 convolutions. Parameters are named as
in the teacher checkpoints that those tables come from, so such a file loads.

References:
    [0]: Deep Residual Learning, 2015, arXiv 1512.03385, Sec. 4.2.
    [1]: Contrastive Representation Distillation, 2019, arXiv 1910.10699 (the models of the tables).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CifarResNet", "resnet8", "resnet8x4", "resnet20", "resnet32", "resnet32x4", "resnet56", "resnet110"]


class CifarResNet(nn.Module):
    """Stem, three stages of basic blocks, average over positions, linear classifier `fc`.

    Args:
        depth: 6n + 2 layers.
        widths: channels of the stem and of the three stages.
        num_classes: C.

    Raises:
        ValueError: If the depth is not 6n + 2.

    Example:
        >>> import torch
        >>> CifarResNet(8, (16, 16, 32, 64), num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, depth: int, widths: Sequence[int] = (16, 16, 32, 64), num_classes: int = 100) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"Expected `depth` to be 6n + 2, such as 8, 20 or 56, but got {depth}.")
        blocks = (depth - 2) // 6
        stem, first, second, third = widths
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _stage(stem, first, blocks, stride=1)
        self.layer2 = _stage(first, second, blocks, stride=2)
        self.layer3 = _stage(second, third, blocks, stride=2)
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(shortcut + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = _BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(_BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def resnet8(num_classes: int = 100) -> CifarResNet:
    """Make ResNet-8; 83,892 parameters with 100 classes."""
    return CifarResNet(8, num_classes=num_classes)


def resnet20(num_classes: int = 100) -> CifarResNet:
    """Make ResNet-20; 278,324 parameters with 100 classes."""
    return CifarResNet(20, num_classes=num_classes)


def resnet32(num_classes: int = 100) -> CifarResNet:
    """Make ResNet-32; 472,756 parameters with 100 classes."""
    return CifarResNet(32, num_classes=num_classes)


def resnet56(num_classes: int = 100) -> CifarResNet:
    """Make ResNet-56; 861,620 parameters with 100 classes."""
    return CifarResNet(56, num_classes=num_classes)


def resnet110(num_classes: int = 100) -> CifarResNet:
    """Make ResNet-110; 1,736,564 parameters with 100 classes."""
    return CifarResNet(110, num_classes=num_classes)


def resnet8x4(num_classes: int = 100) -> CifarResNet:
    """Make ResNet-8, four times as wide; 1,233,540 parameters with 100 classes."""
    return CifarResNet(8, (32, 64, 128, 256), num_classes)


def resnet32x4(num_classes: int = 100) -> CifarResNet:
    """Make ResNet-32, four times as wide; 7,433,860 parameters with 100 classes."""
    return CifarResNet(32, (32, 64, 128, 256), num_classes)
