"""Crops are timm's, and stay interleaved in memory."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image
from timm.data import RandomResizedCropAndInterpolation

from rsb_cluster.train.augment import seed_everything
from rsb_cluster.train.input.pixels.crop import eval_crop, random_box, resize
from rsb_cluster.train.input.pixels.decode import BadImageError
from tests.unit.train.input.pixels.images import decode, jpegs


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (40, 600), (600, 40), (9, 9), (224, 224)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.7, 1.0), (0.9, 1.0)])
def test_a_seed_draws_the_same_crop_as_in_timm(height: int, width: int, scale: tuple[float, float]) -> None:
    image, ratio = Image.new("L", (width, height)), (3 / 4, 4 / 3)
    for seed in range(200):
        seed_everything(seed)
        want = RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
        assert tuple(random_box(height, width, random.Random(seed), scale=scale, ratio=ratio)) == want


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_resized_crop_stays_interleaved(interpolation: str) -> None:
    pixels = decode(jpegs()[0])
    assert pixels.flags.c_contiguous
    part = pixels[20:200, 30:330]
    resized = resize(part, 96, 160, interpolation)
    assert resized.strides == (160 * 3, 3, 1)  # planar memory would be (160, 1, 96 * 160)
    assert np.array_equal(resized, resize(np.ascontiguousarray(part), 96, 160, interpolation))


def test_an_image_too_narrow_to_resize_is_a_bad_image() -> None:
    with pytest.raises(BadImageError, match="2 x 60000 pixels become 235 x 7050000"):
        eval_crop(np.zeros((60000, 2, 3), np.uint8), 224, 0.95, "bicubic")
