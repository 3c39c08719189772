"""From encoded bytes to RGB pixels.

The reference is PIL's ``Image.open(...).convert("RGB")``. An EXIF orientation is not applied by it, so it is not here.
"""

from __future__ import annotations

import io
import math

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]

# CMYK and YCCK need PIL's conversion to RGB.
_DIRECT = ("YCbCr", "Gray", "RGB")


class BadImageError(ValueError):
    """An image cannot be decoded; the message says why."""


def max_pixels() -> float:
    """Return the number of pixels above which PIL takes an image for a decompression bomb."""
    return Image.MAX_IMAGE_PIXELS or math.inf


def decode(encoded: bytes | memoryview) -> Pixels:
    """Return the pixels, shape (H, W, 3), RGB, writeable and contiguous.

    Raises:
        BadImageError: PIL cannot decode it either.
    """
    if encoded[:3] == b"\xff\xd8\xff":
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
            if colours in _DIRECT and height * width <= max_pixels():
                # Strict: libjpeg only warns of a truncated file and fills the rest with grey.
                pixels: Pixels = simplejpeg.decode_jpeg(encoded, colorspace="RGB", strict=True)
                return pixels
        except ValueError:
            pass  # PIL decides: it accepts most damage inside a file, and refuses a truncated one
    return decode_with_pil(encoded)


def decode_with_pil(encoded: bytes | memoryview) -> Pixels:
    """Decode as the reference does.

    Raises:
        BadImageError: PIL cannot decode it.
    """
    return np.array(open_with_pil(encoded))


def open_with_pil(encoded: bytes | memoryview) -> Image.Image:
    """Return the reference's image.

    Raises:
        BadImageError: PIL cannot decode it.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise BadImageError(f"no known image format in its {len(encoded)} bytes") from error
    except Exception as error:  # a broken file makes PIL raise almost anything: OSError, SyntaxError, struct.error, ...
        raise BadImageError(f"{type(error).__name__}: {error}") from error
