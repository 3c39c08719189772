"""RandAugment's operations and draws are timm's."""

from __future__ import annotations

import random
from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as timm_augment

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.errors import ConfigError
from rsb_cluster.train.augment import seed_everything
from rsb_cluster.train.input.pixels import randaugment, tolerances
from rsb_cluster.train.input.pixels.draws import seeded_draws
from rsb_cluster.train.input.pixels.randaugment import AFFINE, COLOUR, LEVELS, RandAugment
from rsb_cluster.train.input.pixels.transforms import FastTrain
from tests.unit.train.input.pixels.images import Pixels, a_recipe, difference

FILL = (124, 116, 104)
NOTATIONS = [
    "rand-m7-mstd0.5-inc1",
    "rand-m9-mstd0.5-inc1",
    "rand-m6",
    "rand-m9-n3-mstd1-tweights",
    "rand-m8-mstd101-p0.8-inc1",
    "rand-m15-mmax20-mstd2-n4",
]


@lru_cache
def op_images() -> tuple[list[Pixels], list[Pixels]]:
    photos = []
    for image in load_sample_images().images:
        photos += [image[100:324, 100:324], image[30:190, 300:430]]
    rng = np.random.default_rng(0)
    x = np.indices((96, 96)).sum(0)[..., None].repeat(3, 2)
    patterns = [
        rng.integers(0, 256, (120, 90, 3)),
        rng.integers(0, 2, (33, 33, 3)) * 255,
        np.full((64, 64, 3), 77),
        x,
        x // 4 % 2 * 255,
        np.zeros((7, 7, 3)),
        rng.integers(0, 256, (1, 1, 3)),
    ]
    return photos, [np.ascontiguousarray(p, np.uint8) for p in patterns]


def both(name: str, image: Pixels, level: float, seed: int, *, cubic: bool) -> tuple[Pixels, Pixels] | None:
    """Return what is ours and what is timm's; None where timm fails on this Pillow."""
    stock_level, stock_op = timm_augment.LEVEL_TO_ARG[name], timm_augment.NAME_TO_OP[name]
    seed_everything(seed)
    rng, hparams = random.Random(seed), {"translate_const": 100}
    stock = tuple(stock_level(level, hparams)) if stock_level else ()
    ours = (LEVELS[name](level, hparams, rng),) if name in LEVELS else ()
    assert ours == stock
    image = np.ascontiguousarray(image)
    before = image.copy()
    got = COLOUR[name](image, *ours) if name in COLOUR else AFFINE[name](image, *ours, cubic=cubic, fill=FILL)
    assert np.array_equal(image, before)
    if "Posterize" in name and ours[0] < 1:  # Pillow 13 refuses to keep no bit
        assert not got.any()
        return None
    resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    want = stock_op(Image.fromarray(image), *stock, fillcolor=FILL, resample=resample)
    return got, np.asarray(want)


@pytest.mark.parametrize(
    ("name", "cubic"),
    [(name, cubic) for name in sorted(COLOUR | AFFINE) for cubic in (False, True)[: 1 + (name in AFFINE)]],
)
def test_each_operation_gives_pils_pixels_within_its_tolerance(name: str, cubic: bool) -> None:
    bounds = tolerances.OPS.get(name, tolerances.EXACT)
    if name == "Rotate" and cubic:
        bounds = tolerances.ROTATE_BICUBIC
    photos, patterns = op_images()
    for images, most, share in (
        (photos, bounds.most, bounds.share),
        (patterns, bounds.most_of_pattern, bounds.share_of_pattern),
    ):
        for image in images:
            for level in (0.0, 0.3, 3.0, 6.4, 7.0, 10.0, 20.0):
                for seed in (0, 1):
                    pair = both(name, image, level, seed, cubic=cubic)
                    if pair is None:
                        continue
                    off = difference(*pair)
                    assert off.max() <= most, (level, image.shape)
                    assert (off > 0).mean() <= share, (level, image.shape)


def test_both_signs_are_tried_above() -> None:
    assert {random.Random(seed).random() > 0.5 for seed in (0, 1)} == {True, False}


def recorded_by_timm(stock: Any, seeds: range) -> list[list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []
    for op in stock.ops:

        def record(img: object, *args: float, _name: str = op.name, **how: Any) -> object:
            if _name in AFFINE:
                timm_augment._check_args_tf(how)
                args = (*args, how["resample"] == Image.Resampling.BICUBIC, how["fillcolor"])
            calls.append((_name, *args))
            return img

        op.aug_fn = record
    result = []
    for seed in seeds:
        calls.clear()
        seed_everything(seed)
        stock(None)
        result.append(list(calls))
    return result


def recorded_by_us(recipe: Recipe, seeds: range, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []
    for table in (COLOUR, AFFINE):
        for name in table:

            def record(image: Pixels, *args: Any, _name: str = name, **how: Any) -> Pixels:
                calls.append((_name, *args, *how.values()))
                return image

            monkeypatch.setitem(table, name, record)
    ours = RandAugment(recipe)
    result = []
    for seed in seeds:
        calls.clear()
        ours(np.zeros((2, 2, 3), np.uint8), seeded_draws(seed))
        result.append(list(calls))
    return result


@pytest.mark.parametrize("interpolation", ["random", "bicubic"])
@pytest.mark.parametrize("notation", NOTATIONS)
def test_a_seed_draws_the_same_operations_and_arguments_as_in_timm(
    notation: str, interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = a_recipe(augment__rand_augment=notation, augment__interpolation=interpolation)
    seeds = range(3 * 2**40, 3 * 2**40 + 500)
    stock = randaugment._stock(recipe)
    assert recorded_by_us(recipe, seeds, monkeypatch) == recorded_by_timm(stock, seeds)


def test_operations_and_magnitudes_are_as_often_as_the_notation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = a_recipe(augment__rand_augment="rand-m7-mstd0.5-inc1")
    drawn = recorded_by_us(recipe, range(12000), monkeypatch)
    # Two layers with p = 0.5, fifteen operations.
    count = Counter(call[0] for calls in drawn for call in calls)
    assert len(count) == 15
    assert all(abs(n - 800) < 4 * np.sqrt(800) for n in count.values())
    layers = np.bincount([len(calls) for calls in drawn]) / 12000
    assert layers == pytest.approx([0.25, 0.5, 0.25], abs=0.016)
    shears = np.array([call[1] for calls in drawn for call in calls if call[0].startswith("Shear")]) / 0.03
    assert abs(shears).mean() == pytest.approx(7, abs=0.06)
    assert abs(shears).std() == pytest.approx(0.5, abs=0.05)
    assert (shears > 0).mean() == pytest.approx(0.5, abs=0.05)


def test_a_notation_that_timm_cannot_read_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="timm cannot read it: Unknown RandAugment config section"):
        FastTrain(a_recipe(augment__rand_augment="rand-m9-x5"))
