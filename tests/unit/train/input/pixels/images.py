"""Photographs as files, and what timm's transforms and the fast ones make of them."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.train.augment import EvalTransform, TrainTransform
from rsb_cluster.train.input.pixels.decode import EncodedImage
from rsb_cluster.train.input.pixels.transforms import FastEval, FastTrain

Pixels = NDArray[np.uint8]


def a_recipe(**changes: object) -> Recipe:
    """A2 with other values; ``augment__resolution=160`` and the like."""
    return load_recipe(
        "a2", overrides=parse_overrides([f"{k.replace('__', '.')}={v}" for k, v in changes.items()])
    ).recipe


@lru_cache
def photographs() -> list[Image.Image]:
    """scikit-learn's two."""
    return [Image.fromarray(image) for image in load_sample_images().images]


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """An image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@lru_cache
def jpegs() -> list[bytes]:
    """Photographs of several sizes."""
    sizes = [(500, 375), (333, 500), (640, 427), (180, 120)]
    return [encoded(p.resize(s, Image.Resampling.LANCZOS), quality=95) for p in photographs() for s in sizes]


def by_pil(data: bytes) -> Image.Image:
    """What PIL makes of a file."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def by_timm(transform: TrainTransform | EvalTransform, data: bytes, seed: int) -> Pixels:
    """What timm's transform makes of it."""
    result: Pixels = transform(by_pil(data), seed).permute(1, 2, 0).numpy()
    return result


def fast(transform: FastTrain | FastEval, data: bytes | memoryview, seed: int, side: int) -> Pixels:
    """What the fast transform makes of it."""
    out = np.zeros((side, side, 3), np.uint8)
    transform(EncodedImage(data), seed, out)
    return out


def decode(data: bytes | memoryview) -> Pixels:
    """All rows, as the fast pipeline decodes them."""
    source = EncodedImage(data)
    return source.rows(source.height)


def difference(one: Pixels, other: Pixels) -> NDArray[np.int64]:
    """How far two images are apart, by value."""
    assert one.shape == other.shape
    assert one.dtype == other.dtype == np.uint8
    return np.abs(one.astype(np.int64) - other)
