"""Crop and resize, for training and for evaluation.

Source: timm 1.0.31, ``RandomResizedCropAndInterpolation`` and ``transforms_imagenet_eval``.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from torch.nn.functional import interpolate

from rsb_cluster.train.input.pixels.decode import BadImageError, Pixels, max_pixels

ATTEMPTS = 10


class Box(NamedTuple):
    """A part of an image, in px."""

    top: int
    left: int
    height: int
    width: int

    def crop(self, pixels: Pixels) -> Pixels:
        """Return this part of an image, as a view."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


def random_box(
    height: int, width: int, rng: random.Random, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Draw a part of random area and aspect ratio; the middle of the image if ten draws do not fit.

    Args:
        height: Height of the image, px.
        width: Width of the image, px.
        rng: The generator; numbers are drawn in timm's order.
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width over height.
    """
    area = width * height
    logs = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(ATTEMPTS):
        target = (scale[0] + (scale[1] - scale[0]) * rng.random()) * area  # uniform()
        aspect = math.exp(logs[0] + (logs[1] - logs[0]) * rng.random())
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if w <= width and h <= height:
            top, left = _below(height - h + 1, rng), _below(width - w + 1, rng)
            # In images of a few pixels the part can be empty, where timm would fail.
            return Box(min(top, height - 1), min(left, width - 1), max(h, 1), max(w, 1))
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _below(stop: int, rng: random.Random) -> int:
    """Draw from ``range(stop)`` as ``randrange`` does, in a third of its time."""
    bits = stop.bit_length()
    while (drawn := rng.getrandbits(bits)) >= stop:
        pass
    return drawn


def resize(pixels: Pixels, height: int, width: int, interpolation: str) -> Pixels:
    """Return the image in another size, antialiased as by PIL; ``bilinear`` or ``bicubic``."""
    # torch recognises this order of view and permute as channels_last if N = 1. With permute(2, 0, 1)[None] the result
    # is planar, and it takes two and a half times as long.
    view_1CHW = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized_1CHW = interpolate(view_1CHW, size=(height, width), mode=interpolation, antialias=True)
    result: Pixels = resized_1CHW[0].permute(1, 2, 0).numpy()
    return result


def eval_crop(pixels: Pixels, resolution: int, crop: float, interpolation: str) -> Pixels:
    """Resize the short side to ``floor(resolution / crop)``, and return the central square.

    Raises:
        BadImageError: The image is so long and narrow that the resized image would be too large.
    """
    short = math.floor(resolution / crop)
    height, width = pixels.shape[:2]
    if width <= height:
        new_height, new_width = int(short * height / width), short
    else:
        new_height, new_width = short, int(short * width / height)
    if new_height * new_width > max_pixels():
        raise BadImageError(f"{width} x {height} pixels become {new_width} x {new_height} when resized")
    resized = resize(pixels, new_height, new_width, interpolation)
    top, left = round((new_height - resolution) / 2), round((new_width - resolution) / 2)
    return Box(top, left, resolution, resolution).crop(resized)
