"""ShuffleNets for 32 × 32 images, as in the tables of the distillation literature.

The stem is a 1 × 1 convolution of 24 channels and keeps the size. Parameters are named as in the checkpoints of that
literature, so such a file loads.

References:
    [0]: ShuffleNet, 2017, arXiv 1707.01083.
    [1]: ShuffleNet V2, 2018, arXiv 1807.11164.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ShuffleNetV1", "ShuffleNetV2", "shufflenetv1", "shufflenetv2"]

_STEM = 24


class ShuffleNetV1(nn.Module):
    """Bottlenecks of grouped 1 × 1 and depthwise 3 × 3 convolutions with shuffled channels [0]; head `linear`.

    Args:
        num_classes: C.
        groups: of the 1 × 1 convolutions.

    Example:
        >>> ShuffleNetV1(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 100, groups: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.layer1 = self._stage(_STEM, 240, 4, groups)
        self.layer2 = self._stage(240, 480, 8, groups)
        self.layer3 = self._stage(480, 960, 4, groups)
        self.linear = nn.Linear(960, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, groups: int) -> nn.Sequential:
        first = _Bottleneck(in_channels, channels - in_channels, 2, groups)  # its shortcut is concatenated
        return nn.Sequential(first, *(_Bottleneck(channels, channels, 1, groups) for _ in range(blocks - 1)))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class ShuffleNetV2(nn.Module):
    """Blocks that change one half of the channels and shuffle them [1], at width 1; head `linear`.

    Args:
        num_classes: C.

    Example:
        >>> ShuffleNetV2(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.layer1 = nn.Sequential(_DownBlock(_STEM, 116), *(_SplitBlock(116) for _ in range(3)))
        self.layer2 = nn.Sequential(_DownBlock(116, 232), *(_SplitBlock(232) for _ in range(7)))
        self.layer3 = nn.Sequential(_DownBlock(232, 464), *(_SplitBlock(464) for _ in range(3)))
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


class _Bottleneck(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        inner = channels // 4
        self.stride, self.groups = stride, 1 if in_channels == _STEM else groups
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = _shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        if self.stride == 1:
            return F.relu(x + y)
        return F.relu(torch.cat([y, F.avg_pool2d(x, 3, stride=2, padding=1)], 1))


class _SplitBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, y = x.chunk(2, dim=1)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(y)))))
        return _shuffle(torch.cat([kept, F.relu(self.bn3(self.conv3(y)))], 1), 2)


class _DownBlock(nn.Module):
    """Two branches, one straight from a depthwise convolution, one through a bottleneck, of half the channels each."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        right = F.relu(self.bn5(self.conv5(right)))
        return _shuffle(torch.cat([left, right], 1), 2)


def _shuffle(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def shufflenetv1(num_classes: int = 100) -> ShuffleNetV1:
    """Make ShuffleNetV1 with three groups; 949,258 parameters with 100 classes."""
    return ShuffleNetV1(num_classes)


def shufflenetv2(num_classes: int = 100) -> ShuffleNetV2:
    """Make ShuffleNetV2 at width 1; 1,355,528 parameters with 100 classes."""
    return ShuffleNetV2(num_classes)
