"""Operations on images: on PIL ones where they are decoded, on batches of tensors on the device.

Nothing is drawn here: random numbers are arguments. Boxes are PIL's (left, upper, right, lower), in pixels of the
image. B, H, W are batch size, height and width.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["CROP_DRAWS", "Box", "centre_box", "crop_to_array", "normalize", "random_box", "shift_and_flip", "to_rgb"]

CROP_TRIES = 10
"""Random crops that are tried until one fits, as in torchvision."""

CROP_DRAWS = 2 + 2 * CROP_TRIES
"""Random numbers that a crop takes."""


class Box(NamedTuple):
    """A rectangle of an image, in pixels; edges may lie between pixels."""

    left: float
    upper: float
    right: float
    lower: float


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the image with three channels of 8 bits, whatever its mode; transparency is dropped.

    Numbers of 16 and 32 bits and floats have no range of their own. That of an image is the least that holds its
    values: up to 1 (floats), 255 or 65,535.

    Raises:
        ValueError: If values are negative or greater.
    """
    if image.mode.startswith("I") or image.mode == "F":  # `convert` would clip them at 255
        image = PIL.Image.fromarray(_to_8_bits(image))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # else PIL warns
    return image.convert("RGB")


def _to_8_bits(image: PIL.Image.Image) -> NDArray[np.uint8]:
    values = np.asarray(image).astype(np.float64)
    largest, is_float = float(values.max()), image.mode == "F"
    if not (values.min() >= 0 and largest <= 65_535):  # NaN, too
        raise ValueError(
            f"its values of mode {image.mode!r} are in [{values.min():g}, {largest:g}], of which nothing tells what is"
            " white. Save it with 8 bits a channel."
        )
    if is_float and largest <= 1:
        return np.rint(values * 255).astype(np.uint8)
    # A PNG of more than 8 bits has 16, however dark it is.
    has_16_bits = largest > 255 or image.mode.startswith("I;16") or image.format == "PNG"
    return (values // 256 if has_16_bits else np.rint(values)).astype(np.uint8)


def centre_box(width: int, height: int, ratio: float = 1.0) -> Box:
    """Return the central square whose side is the image's shorter side divided by `ratio`.

    Resized to s × s it is what resizing the shorter side to ratio · s and cropping the central s × s gives.
    """
    side = min(width, height) / ratio
    left, upper = (width - side) / 2, (height - side) / 2
    return Box(left, upper, left + side, upper + side)


def random_box(width: int, height: int, draws: NDArray[np.float64]) -> Box:
    """Return torchvision's `RandomResizedCrop`: 8 % to 100 % of the area [0], at aspect ratios from 3:4 to 4:3.

    Ten pairs of area and ratio are tried, the ratio log-uniform, and the first that fits is placed uniformly. If none
    fits, it is the largest central box with an allowed ratio.

    Args:
        width: of the image.
        height: of the image.
        draws: (22,), uniform in [0, 1): two for the place, ten for areas, ten for ratios.

    Returns:
        A box with whole edges.

    References:
        [0]: Inception, Szegedy et al., 2014, arXiv 1409.4842, section 6.
    """
    areas = width * height * (0.08 + 0.92 * draws[2 : 2 + CROP_TRIES])
    ratios = np.exp(math.log(3 / 4) + math.log(16 / 9) * draws[2 + CROP_TRIES : CROP_DRAWS])
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    if fits.any():
        first = int(fits.argmax())
        w, h = int(widths[first]), int(heights[first])
        left, upper = int(draws[0] * (width - w + 1)), int(draws[1] * (height - h + 1))
    else:
        ratio = min(max(width / height, 3 / 4), 4 / 3)
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, upper = (width - w) // 2, (height - h) // 2
    return Box(left, upper, left + w, upper + h)


def crop_to_array(image: PIL.Image.Image, box: Box, size: int) -> NDArray[np.uint8]:
    """Resize a box of an RGB image, bilinearly and without aliasing, to an array of shape (3, size, size)."""
    resized = image.resize((size, size), PIL.Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized).transpose(2, 0, 1)


def shift_and_flip(
    images: Tensor, shifts: Tensor, *, flips: Tensor, padding_mode: Literal["zeros", "reflect"] = "zeros"
) -> Tensor:
    """Crop each image at its own place from a padded copy of itself and mirror some left to right.

    `out[b, :, y, x] = images[b, :, y + shifts[b, 0], x' + shifts[b, 1]]`, where x' = W − 1 − x if `flips[b]`, else x:
    the field's random crop with padding p, for shifts in [−p, p]. One gather, and the padding is never stored.

    Args:
        images: (B, C, H, W), of any type.
        shifts: (B, 2), down and right, integers of a magnitude below H and W.
        flips: (B,), bool.
        padding_mode: beyond the edge are `"zeros"`, or the image mirrored at its edge pixel, which is not repeated.

    Returns:
        (B, C, H, W), of the images' type.

    Example:
        >>> images = torch.arange(1, 7).view(1, 1, 2, 3)
        >>> shift_and_flip(images, torch.tensor([[0, 1]]), flips=torch.tensor([False])).tolist()
        [[[[2, 3, 0], [5, 6, 0]]]]
        >>> shift_and_flip(images, torch.tensor([[1, 0]]), flips=torch.tensor([True]), padding_mode="reflect").tolist()
        [[[[6, 5, 4], [3, 2, 1]]]]
    """
    height, width = images.shape[-2:]
    columns = torch.arange(width, device=images.device).expand(len(images), -1)
    columns = torch.where(flips[:, None], width - 1 - columns, columns) + shifts[:, 1:]
    rows = torch.arange(height, device=images.device) + shifts[:, :1]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    rows, columns = _reflect(rows, height), _reflect(columns, width)
    index = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)[:, None]
    picked = images.flatten(2).gather(2, index.expand(-1, images.shape[1], -1)).view_as(images)
    return picked if padding_mode == "reflect" else picked * inside[:, None]


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return `(images / 255 − mean) / std` in float32.

    Args:
        images: (B, 3, H, W), uint8.
        mean: (3,), of values in [0, 1].
        std: (3,), positive.
    """
    return images.float().sub_(mean[:, None, None] * 255).div_(std[:, None, None] * 255)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Mirror indices that are at most size − 1 beyond an edge back into [0, size)."""
    return (size - 1) - ((size - 1) - index.abs()).abs()
