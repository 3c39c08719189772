"""Looks at some of a data set's images: their sizes, and the mean and standard deviation of their pixels."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from rsb_cluster.data.index import ShardIndex
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.storage.store import Store

SIZES_OF = 64  # images of which the size is read
PIXELS_OF = 2048  # images of which the pixels are; with so many the third digit of a mean stands
_SIDE = 224  # px; the pixels of a training image are those of a scaled one
_READERS = 16

Triple = tuple[float, float, float]


def shorter_sides(store: Store, index: ShardIndex) -> NDArray[np.int64]:
    """Return the shorter sides of some images in px, sorted; an image that cannot be read is left out.

    Raises:
        DataError: A shard does not match the index.
        StorageError: A shard could not be read.
    """
    from PIL import Image

    sides = []
    for content in _some_images(store, index, SIZES_OF):
        try:
            with Image.open(io.BytesIO(content)) as image:  # reads the header only
                sides.append(min(image.size))
        except Exception:  # Pillow's readers raise nearly anything on damaged files; 'shards verify' names them
            continue
    return np.sort(np.array(sides, dtype=np.int64))


def pixel_statistics(store: Store, index: ShardIndex) -> tuple[Triple, Triple]:
    """Return mean and standard deviation of the red, green and blue pixels of some images, of values in [0, 1].

    The images lie evenly spread in the shards, which are shuffled, so that the same shards always give the same values
    (rounded to three digits). Each image counts the same, whatever its size.

    Raises:
        DataError: A shard does not match the index.
        StorageError: A shard could not be read.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # Pillow decodes without the GIL
        moments = [found for found in pool.map(_moments, _some_images(store, index, PIXELS_OF)) if found is not None]
    first, second = np.mean(moments, axis=0)
    red, green, blue = np.round(first, 3).tolist()
    deviation = np.sqrt(np.maximum(second - first**2, 1e-6))  # a data set of one colour must not divide by zero
    red_std, green_std, blue_std = np.round(deviation, 3).tolist()
    return (red, green, blue), (red_std, green_std, blue_std)


def _moments(content: bytes) -> NDArray[np.float64] | None:
    """Return the means of the pixels and of their squares, shape (2, 3); None for an image that cannot be decoded."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft("RGB", (_SIDE, _SIDE))
            scale = min(1.0, _SIDE / min(image.size))
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            small = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    except Exception:  # as above
        return None
    pixels = np.asarray(small, dtype=np.float64).reshape(-1, 3) / 255
    return np.stack([pixels.mean(axis=0), (pixels**2).mean(axis=0)])


def _some_images(store: Store, index: ShardIndex, count: int) -> Iterator[bytes]:
    """Yield the files of up to so many images that lie evenly spread, in the order of the shards."""
    chosen = np.unique(np.linspace(0, index.num_samples - 1, min(count, index.num_samples)).astype(np.int64))
    reader = ShardReader(store, index)
    pieces = reader.plan(chosen)
    with ThreadPoolExecutor(_READERS) as pool:
        for images in pool.map(lambda piece: [bytes(image) for image in reader.read_piece(piece).values()], pieces):
            yield from images
