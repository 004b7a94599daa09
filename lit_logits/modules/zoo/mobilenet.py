"""MobileNetV2 of half width for 32 × 32 images, as in the tables of the distillation literature.

Parameters are named as in the checkpoints of that literature, so such a file loads.

References:
    [0]: MobileNetV2, 2018, arXiv 1801.04381, Table 2.
"""

from torch import Tensor, nn

__all__ = ["MobileNetV2", "mobilenetv2"]

# Expansion, channels at full width, blocks, stride of the first block.
_STAGES = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


class MobileNetV2(nn.Module):
    """Inverted residual blocks between a stem and 1,280 features; head `classifier.0`.

    It departs from [0] as the tables do: the second stage keeps the size.

    Args:
        num_classes: C.
        width_mult: factor on the channels of stem and blocks.

    Example:
        >>> import torch
        >>> MobileNetV2(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 100, width_mult: float = 0.5) -> None:
        super().__init__()
        channels, features = int(32 * width_mult), max(1280, int(1280 * width_mult))
        self.conv1 = _conv(3, channels, 3, stride=2)
        stages = []
        for expansion, width, blocks, stride in _STAGES:
            stage = []
            for index in range(blocks):
                out = int(width * width_mult)
                stage.append(_InvertedResidual(channels, out, expansion, stride if index == 0 else 1))
                channels = out
            stages.append(nn.Sequential(*stage))
        self.blocks = nn.ModuleList(stages)
        self.conv2 = _conv(channels, features, 1)
        classifier = nn.Linear(features, num_classes)
        self.classifier = nn.Sequential(classifier)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, 3, H, W)."""
        x = self.conv1(pixel_values)
        for stage in self.blocks:
            x = stage(x)
        return self.classifier(self.conv2(x).mean((2, 3)))


class _InvertedResidual(nn.Module):
    def __init__(self, in_channels: int, channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            *_conv(in_channels, inner, 1),
            *_conv(inner, inner, 3, stride=stride, groups=inner),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def _conv(in_channels: int, channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def mobilenetv2(num_classes: int = 100) -> MobileNetV2:
    """Make MobileNetV2 of half width; 812,836 parameters with 100 classes."""
    return MobileNetV2(num_classes)
