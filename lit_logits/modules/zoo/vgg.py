"""VGG networks for 32 × 32 images with batch normalisation and one linear classifier.

Parameters are named as in the teacher checkpoints of the distillation literature, so such a file loads.

References:
    [0]: Very Deep Convolutional Networks, 2014, arXiv 1409.1556.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CifarVGG", "vgg8", "vgg13"]


class CifarVGG(nn.Module):
    """Five blocks of 3 × 3 convolutions, halved in size between the first four, then averaged; head `classifier`.

    Args:
        widths: channels of the convolutions of each of the five blocks.
        num_classes: C.

    Example:
        >>> import torch
        >>> CifarVGG([[8], [8], [8], [8], [8]], num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, widths: Sequence[Sequence[int]], num_classes: int = 100) -> None:
        super().__init__()
        channels = 3
        for index, block in enumerate(widths):
            layers: list[nn.Module] = []
            for width in block:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            # The last activation of a block is applied in `forward`, as in the models that the checkpoints come from.
            self.add_module(f"block{index}", nn.Sequential(*layers[:-1]))
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, 3, H, W), H and W at least 8."""
        x = pixel_values
        for index in range(5):
            # Images of 64 pixels and more are halved once again before the last block.
            if index in (1, 2, 3) or (index == 4 and x.shape[-1] > 4):
                x = F.max_pool2d(x, 2)
            x = F.relu(self.get_submodule(f"block{index}")(x))
        return self.classifier(x.mean((2, 3)))


def vgg8(num_classes: int = 100) -> CifarVGG:
    """Make VGG-8; 3,965,028 parameters with 100 classes."""
    return CifarVGG([[64], [128], [256], [512], [512]], num_classes)


def vgg13(num_classes: int = 100) -> CifarVGG:
    """Make VGG-13; 9,462,180 parameters with 100 classes."""
    return CifarVGG([[64, 64], [128, 128], [256, 256], [512, 512], [512, 512]], num_classes)
