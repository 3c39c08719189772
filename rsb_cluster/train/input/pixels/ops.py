"""RandAugment's operations on colours: images of shape (H, W, 3), uint8, in and out.

The results are PIL's, up to ``tolerances``; the arguments are those of timm's functions of the same names.
"""

from __future__ import annotations

import cv2
import numpy as np

from rsb_cluster.train.input.pixels.decode import Pixels

# PIL truncates, OpenCV rounds. A little less than half, so integers do not change.
TRUNCATE = -0.4999

# PIL's ImageFilter.SMOOTH
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def auto_contrast(image: Pixels) -> Pixels:
    """Stretch each channel to the full range."""
    channels = []
    for channel in cv2.split(image):
        low, high, _, _ = cv2.minMaxLoc(channel)
        if high > low:
            scale = 255.0 / (high - low)
            levels = np.clip((np.arange(256) * scale - low * scale).astype(np.int64), 0, 255)
            channel = cv2.LUT(channel, levels.astype(np.uint8))
        channels.append(channel)
    return _pixels(cv2.merge(channels))  # faster than an operation on three channels at once


def equalize(image: Pixels) -> Pixels:
    """Make each channel's histogram flat."""
    channels = []
    for channel in cv2.split(image):
        histogram = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        used = np.flatnonzero(histogram)
        step = int(histogram.sum() - histogram[used[-1]]) // 255
        if len(used) > 1 and step:
            below = np.cumsum(histogram) - histogram
            levels = np.minimum((step // 2 + below) // step, 255)
            channel = cv2.LUT(channel, levels.astype(np.uint8))
        channels.append(channel)
    return _pixels(cv2.merge(channels))


def invert(image: Pixels) -> Pixels:
    """Return the negative."""
    return _pixels(cv2.bitwise_not(image))


def posterize(image: Pixels, bits: int) -> Pixels:
    """Keep the leading bits of each sample; 0 bits give black, which Pillow 13 rejects."""
    if bits >= 8:
        return image
    return image & np.uint8(256 - (1 << min(8, 8 - bits)))


def solarize(image: Pixels, threshold: int) -> Pixels:
    """Invert the samples from a threshold on."""
    if threshold > 255:
        return image
    above: Pixels = (image >= np.uint8(threshold)).view(np.uint8)
    return image ^ (np.uint8(0) - above)  # x ^ 255 = 255 - x


def solarize_add(image: Pixels, add: int) -> Pixels:
    """Add to the samples below 128."""
    levels = np.arange(256)
    return _map(image, np.where(levels < 128, np.minimum(levels + add, 255), levels).astype(np.uint8))


def color(image: Pixels, factor: float) -> Pixels:
    """Blend with grey: 0 is grey, 1 is the image."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _pixels(cv2.addWeighted(image, factor, grey, 1 - factor, TRUNCATE))


def contrast(image: Pixels, factor: float) -> Pixels:
    """Blend with the image's mean grey."""
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _pixels(cv2.addWeighted(image, factor, image, 0, (1 - factor) * mean + TRUNCATE))


def brightness(image: Pixels, factor: float) -> Pixels:
    """Blend with black."""
    return _pixels(cv2.addWeighted(image, factor, image, 0, TRUNCATE))


def sharpness(image: Pixels, factor: float) -> Pixels:
    """Blend with a smoothed image, whose outermost pixels are not smoothed."""
    smooth = cv2.filter2D(image, -1, _SMOOTH)
    smooth[[0, -1]] = image[[0, -1]]
    smooth[:, [0, -1]] = image[:, [0, -1]]
    return _pixels(cv2.addWeighted(image, factor, smooth, 1 - factor, TRUNCATE))


def _map(image: Pixels, lut: Pixels) -> Pixels:
    return _pixels(cv2.LUT(image, lut))


def _pixels(image: cv2.typing.MatLike) -> Pixels:
    """Tell the type checker what OpenCV returns for uint8."""
    return image  # type: ignore[return-value]
