"""RandAugment's affine operations: images of shape (H, W, 3), uint8, in and out.

PIL samples at ``A (x + 0.5, y + 0.5)``, repeats the outermost pixels if a filter reaches over the edge, uses the fill
colour if the centre is outside, truncates fractions, and has bicubic with a = -1. OpenCV differs in all of this, except
in bilinear on floats; its bicubic has a = -0.75.

A translation is a filter of two or four taps along one axis, a shear one whose weights differ from line to line. A
rotation goes through OpenCV's remap.

Source: Pillow 13.0.0, ``libImaging/Geometry.c``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from rsb_cluster.train.input.pixels.decode import Pixels
from rsb_cluster.train.input.pixels.ops import TRUNCATE

Colour = tuple[int, int, int]
Floats = NDArray[np.floating[Any]]


def shear_x(image: Pixels, factor: float, *, cubic: bool, fill: Colour) -> Pixels:
    """Move each row by ``factor`` times its height."""
    return _shift_rows(image, factor * (np.arange(image.shape[0]) + 0.5), cubic, fill)


def shear_y(image: Pixels, factor: float, *, cubic: bool, fill: Colour) -> Pixels:
    """Move each column by ``factor`` times its position."""
    return _transpose(shear_x(_transpose(image), factor, cubic=cubic, fill=fill))


def translate_x(image: Pixels, shift_px: float, *, cubic: bool, fill: Colour) -> Pixels:
    """Move the image to the left."""
    return _translate(image, shift_px, 1, cubic, fill)


def translate_y(image: Pixels, shift_px: float, *, cubic: bool, fill: Colour) -> Pixels:
    """Move the image up."""
    return _translate(image, shift_px, 0, cubic, fill)


def rotate(image: Pixels, degrees: float, *, cubic: bool, fill: Colour) -> Pixels:
    """Turn around the centre, counter-clockwise."""
    height, width = image.shape[:2]
    if degrees % 360 == 0:
        return image
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = np.arange(width) + 0.5 - width / 2, (np.arange(height) + 0.5 - height / 2)[:, None]
    at_x = (cos * x + width / 2).astype(np.float32) - (sin * y).astype(np.float32)
    at_y = (sin * x + height / 2).astype(np.float32) + (cos * y).astype(np.float32)
    outside = (at_x < 0) | (at_x >= width) | (at_y < 0) | (at_y >= height)
    at_x -= 0.5
    at_y -= 0.5
    source = image.astype(np.float32)
    if cubic:
        # Along one axis PIL's bicubic is 4/3 of OpenCV's, less 1/3 of the cubic with a = 0, which is bilinear at a
        # position mapped by smoothstep. Along both axes a small mixed term is left over.
        steep = cv2.remap(source, at_x, at_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        flat = cv2.remap(source, _smooth(at_x), _smooth(at_y), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        result = cv2.addWeighted(steep, 4 / 3, flat, -1 / 3, TRUNCATE, dtype=cv2.CV_8U)
    else:
        result = _to_uint8(cv2.remap(source, at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
    return _paint(result, outside, fill)


def _translate(image: Pixels, shift_px: float, axis: int, cubic: bool, fill: Colour) -> Pixels:
    """Sample each position of an axis at ``position + shift``, with one filter for the whole image."""
    length, floor = image.shape[axis], math.floor(shift_px)
    weights_1T = _weights(np.array([shift_px - floor]), cubic).astype(np.float32)
    taps = weights_1T.shape[1]
    # First tap of the first position. Beyond the image's length there is only fill.
    first = max(-length - 2, min(floor, length + 2)) + 1 - taps // 2
    before, after = max(0, -first), max(0, first + taps - 1)
    top, bottom, left, right = (0, 0, before, after) if axis else (before, after, 0, 0)
    padded = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_REPLICATE).swapaxes(0, axis)
    source = padded[first + before :][: length + taps - 1].swapaxes(0, axis)
    kernel = weights_1T if axis else weights_1T.T
    result = cv2.filter2D(source, -1, kernel, anchor=(0, 0), delta=TRUNCATE).swapaxes(0, axis)[:length]
    # Inside where 0 <= position + 0.5 + shift < length.
    start, stop = (math.ceil(max(-1.0, min(edge - 0.5 - shift_px, length))) for edge in (0, length))
    result[: max(0, start)] = fill
    result[max(0, stop) :] = fill
    return result.swapaxes(0, axis)  # type: ignore[return-value]


def _shift_rows(image: Pixels, shifts_H: Floats, cubic: bool, fill: Colour) -> Pixels:
    """Sample each row at ``x + shift``."""
    height, width = image.shape[:2]
    taps = 4 if cubic else 2
    first = 1 - taps // 2  # the first tap, relative to the pixel at or left of the position
    # Beyond the image's width there is only fill.
    whole_H = np.clip(np.floor(shifts_H), -width - 2, width + 2).astype(np.intp)
    left, right = max(0, -(int(whole_H.min()) + first)), max(0, int(whole_H.max()) + first + taps - 1)
    padded = cv2.copyMakeBorder(image, 0, 0, left, right, cv2.BORDER_REPLICATE)
    samples = (width + taps - 1) * 3
    starts = as_strided(padded, (height, left + right + 2 - taps, samples), (padded.strides[0], 3, 1), writeable=False)
    rows = starts[np.arange(height), whole_H + first + left].astype(np.float32)
    windows = as_strided(rows, (height, taps, width * 3), (rows.strides[0], 12, 4), writeable=False)
    weights_HT = _weights(shifts_H - np.floor(shifts_H), cubic).astype(np.float32)
    result = _to_uint8(np.einsum("htw,ht->hw", windows, weights_HT)).reshape(image.shape)
    x = np.arange(width, dtype=np.int32)
    # Inside where 0 <= x + 0.5 + shift < width.
    starts_H = np.ceil(np.clip(-0.5 - shifts_H, -1, width)).astype(np.int32)[:, None]
    stops_H = np.ceil(np.clip(width - 0.5 - shifts_H, -1, width)).astype(np.int32)[:, None]
    return _paint(result, (x < starts_H) | (x >= stops_H), fill)


def _weights(d: Floats, cubic: bool) -> Floats:
    """Return the weights of the taps, shape (H, 2) or (H, 4), for positions ``d`` right of a pixel."""
    if not cubic:
        return np.stack([1 - d, d], axis=-1)
    e, a = 1 - d, -1.0
    inner = [((a + 2) * t - (a + 3)) * t * t + 1 for t in (d, e)]
    return np.stack([a * d * e * e, *inner, a * d * d * e], axis=-1)


def _smooth(at: NDArray[np.float32]) -> NDArray[np.float32]:
    whole = np.floor(at)
    d = at - whole
    result: NDArray[np.float32] = whole + d * d * (3 - 2 * d)
    return result


def _to_uint8(values: cv2.typing.MatLike) -> Pixels:
    result: Pixels = cv2.add(values, TRUNCATE, dtype=cv2.CV_8U)  # type: ignore[call-overload]
    return result


def _transpose(image: Pixels) -> Pixels:
    return cv2.transpose(image)  # type: ignore[return-value]


def _paint(image: cv2.typing.MatLike, where: NDArray[np.bool_], fill: Colour) -> Pixels:
    """Set pixels to a colour, in place."""
    return cv2.copyTo(_plain(*image.shape[:2], fill), where.view(np.uint8), image)  # type: ignore[return-value]


@lru_cache(maxsize=8)
def _plain(height: int, width: int, fill: Colour) -> Pixels:
    return np.full((height, width, 3), fill, np.uint8)
