"""How the field splits, augments and normalises the image data sets that it measures on."""

from typing import Literal, NamedTuple

from lit_logits.datamodules.images.tiny_imagenet import is_tiny_imagenet

__all__ = ["PRESETS", "Preset", "find_preset"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Preset(NamedTuple):
    """How a data set is found, split, augmented and normalised.

    Attributes:
        path: a name on the hub or a local folder; empty for the embedded digits.
        image_size: side of the images that a model gets, in pixels.
        mean: of each channel's values in [0, 1].
        std: of each channel's values in [0, 1].
        val_fraction: share of the training split that is held out where the data set has no validation split.
        test_fraction: the same for test.
        label_column: where the data set has several.
        crop: augment by a crop from the padded image, or by resizing a random crop.
        flip: whether a mirrored image is of the same class.
    """

    path: str
    image_size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    label_column: str | None = None
    crop: Literal["padded", "resized"] = "resized"
    flip: bool = True


# A table: each data set with its own figures, so that a row can be read alone.
PRESETS = {
    "digits": Preset(
        path="",
        image_size=8,
        mean=(0.3053,) * 3,  # of all 1,797 images, values 0..16 divided by 16
        std=(0.3760,) * 3,
        val_fraction=0.2,
        test_fraction=0.2,
        crop="padded",
        flip=False,
    ),
    "cifar10": Preset(
        path="uoft-cs/cifar10",
        image_size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        crop="padded",
    ),
    "cifar100": Preset(
        path="uoft-cs/cifar100",
        image_size=32,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        label_column="fine_label",
        crop="padded",
    ),
    # Neither has labels for its test images; results are reported on the validation split, which serves as both.
    "tiny-imagenet": Preset(path="zh-plus/tiny-imagenet", image_size=64, test_fraction=0.0),
    "imagenet": Preset(path="ILSVRC/imagenet-1k", test_fraction=0.0),
}


def find_preset(source: str) -> Preset:
    """Return the preset of a short name, a path on the hub or a folder of Tiny ImageNet; ImageNet's for all others.

    Example:
        >>> find_preset("uoft-cs/cifar100") == find_preset("cifar100"), find_preset("some/other").image_size
        (True, 224)
    """
    if is_tiny_imagenet(source):
        return PRESETS["tiny-imagenet"]._replace(path=source)
    known = PRESETS.get(source) or next((preset for preset in PRESETS.values() if preset.path == source), None)
    return known or Preset(source)
