"""From encoded bytes to RGB pixels.

The reference is PIL's ``Image.open(...).convert("RGB")``, which does not apply the EXIF orientation.
"""

from __future__ import annotations

import contextlib
import io
import math

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rsb_cluster.train.input.pixels.jpeg import cut_to_rows, read_headers

Pixels = NDArray[np.uint8]

# CMYK and YCCK need PIL's conversion to RGB.
_CHANNELS = (1, 3)
_DIRECT = ("YCbCr", "Gray", "RGB")


class BadImageError(ValueError):
    """An image cannot be decoded; the message says why."""


def max_pixels() -> float:
    """Return the number of pixels above which PIL considers an image a decompression bomb."""
    return Image.MAX_IMAGE_PIXELS or math.inf


class EncodedImage:
    """An encoded image, whose rows are decoded on demand, from the top. Not thread-safe.

    Attributes:
        encoded: The file's bytes.
        height: Height, px.
        width: Width, px.

    Raises:
        BadImageError: PIL cannot read the image either.
    """

    def __init__(self, encoded: bytes | memoryview) -> None:
        self.encoded = encoded
        self._pixels: Pixels | None = None
        headers = self._headers = read_headers(encoded)
        if headers and headers.channels in _CHANNELS and 0 < headers.height * headers.width <= max_pixels():
            self.height, self.width = headers.height, headers.width
        elif (size := _jpeg_size(encoded)) is not None:
            self.height, self.width = size
        else:
            self._pixels = decode_with_pil(encoded)
            self.height, self.width = self._pixels.shape[:2]

    def rows(self, stop: int) -> Pixels:
        """Return at least the rows above ``stop``: shape (H, W, 3), RGB, writeable and contiguous.

        Decoded rows are cached: to read several parts of an image, read its whole height first.

        Raises:
            BadImageError: PIL cannot decode the image either.
        """
        if self._pixels is None or len(self._pixels) < stop:
            self._pixels = self._decode_jpeg(stop)
        return self._pixels

    def _decode_jpeg(self, rows: int) -> Pixels:
        cut = cut_to_rows(self.encoded, self._headers, rows) if self._headers is not None else None
        with contextlib.suppress(ValueError):
            # Strict, as libjpeg only warns of a truncated file and fills the rest with grey.
            pixels: Pixels = simplejpeg.decode_jpeg(cut or self.encoded, colorspace="RGB", strict=cut is None)
            return pixels
        # PIL decides: it accepts most damage inside a file, and rejects a truncated one.
        return decode_with_pil(self.encoded)


def _jpeg_size(encoded: bytes | memoryview) -> tuple[int, int] | None:
    """Return height and width of a JPEG that can be decoded without PIL; None for any other image."""
    if encoded[:3] == b"\xff\xd8\xff":
        with contextlib.suppress(ValueError):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
            if colours in _DIRECT and height * width <= max_pixels():
                return int(height), int(width)
    return None


def decode_with_pil(encoded: bytes | memoryview) -> Pixels:
    """Return the pixels as PIL, the reference, decodes them.

    Raises:
        BadImageError: PIL cannot decode the image.
    """
    return np.array(open_with_pil(encoded))


def open_with_pil(encoded: bytes | memoryview) -> Image.Image:
    """Return the image as PIL, the reference, decodes it.

    Raises:
        BadImageError: PIL cannot decode the image.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise BadImageError(f"unknown image format ({len(encoded)} bytes)") from error
    except Exception as error:  # PIL raises many kinds of errors for a broken file: OSError, SyntaxError, ...
        raise BadImageError(f"{type(error).__name__}: {error}") from error
