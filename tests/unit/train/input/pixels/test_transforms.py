"""The fast pixel pipeline against timm's transforms on PIL: the same image for a seed, wherever it is made."""

from __future__ import annotations

import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from rsb_cluster.errors import ConfigError
from rsb_cluster.train.augment import EvalTransform, TrainTransform, seed_everything
from rsb_cluster.train.input.pixels import tolerances
from rsb_cluster.train.input.pixels.decode import EncodedImage
from rsb_cluster.train.input.pixels.transforms import FastEval, FastTrain
from tests.unit.train.input.pixels.images import a_recipe, by_timm, difference, encoded, fast, jpegs, photographs


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("side", [160, 224])
def test_a_seed_gives_timms_training_image(side: int, interpolation: str) -> None:
    recipe = a_recipe(augment__resolution=side, augment__interpolation=interpolation)
    stock, ours = TrainTransform(recipe), FastTrain(recipe)
    means = []
    for seed in range(100):
        data = jpegs()[seed % 8]
        means.append(difference(fast(ours, data, seed, side), by_timm(stock, data, seed)).mean())
    assert np.mean(means) < tolerances.TRAIN_MEAN
    assert max(means) < tolerances.TRAIN_MEAN_WORST


@pytest.mark.parametrize(
    ("interpolation", "most"), [("bicubic", tolerances.CROP_BICUBIC), ("bilinear", tolerances.CROP_BILINEAR)]
)
def test_without_randaugment_only_the_resize_differs(interpolation: str, most: int) -> None:
    recipe = a_recipe(augment__rand_augment='""', augment__interpolation=interpolation)
    stock, ours = TrainTransform(recipe), FastTrain(recipe)
    for seed in range(60):
        data = jpegs()[seed % 8]
        assert difference(fast(ours, data, seed, 224), by_timm(stock, data, seed)).max() <= most


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("side", "crop"), [(160, 0.95), (224, 0.95), (224, 1.0), (32, 0.875)])
def test_evaluation_gives_timms_image(side: int, crop: float, interpolation: str) -> None:
    recipe = a_recipe(eval__resolution=side, eval__crop=crop, eval__interpolation=interpolation)
    stock, ours = EvalTransform(recipe.eval), FastEval(recipe.eval)
    exact = FastEval(recipe.eval.model_copy(update={"exact": True}))
    odd_sizes = [encoded(photographs()[0].resize(size)) for size in ((235, 235), (236, 240), (30, 31), (301, 97))]
    for data in jpegs() + odd_sizes:
        want = by_timm(stock, data, 0)
        off = difference(fast(ours, data, 0, side), want)
        assert off.max() <= tolerances.EVAL_MOST
        assert off.mean() <= tolerances.EVAL_MEAN
        assert np.array_equal(fast(exact, data, 0, side), want)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("side", "size"), [(32, (97, 301)), (32, (100, 1500)), (224, (300, 1000))])
def test_evaluation_of_a_high_and_narrow_image_is_close_to_timms(
    side: int, size: tuple[int, int], interpolation: str
) -> None:
    spec = a_recipe(eval__resolution=side, eval__interpolation=interpolation).eval
    stock, ours, exact = EvalTransform(spec), FastEval(spec), FastEval(spec.model_copy(update={"exact": True}))
    squares = np.random.default_rng(1).integers(0, 2, (size[1] // 3 + 1, size[0] // 3 + 1), dtype=np.uint8) * 255
    pattern = Image.fromarray(np.kron(squares, np.ones((3, 3), np.uint8))).crop((0, 0, *size))
    for image, most, mean in (
        (photographs()[0].resize(size), tolerances.EVAL_NARROW_MOST, tolerances.EVAL_NARROW_MEAN),
        (pattern, tolerances.EVAL_NARROW_MOST_OF_PATTERN, tolerances.EVAL_NARROW_MEAN_OF_PATTERN),
    ):
        data = encoded(image, "PNG")
        want = by_timm(stock, data, 0)
        off = difference(fast(ours, data, 0, side), want)
        assert off.max() <= most and off.mean() <= mean
        assert np.array_equal(fast(exact, data, 0, side), want)


def test_the_same_seed_gives_the_same_pixels_in_eight_threads() -> None:
    ours = FastTrain(a_recipe(augment__interpolation="random"))
    tasks = [(jpegs()[seed % 8], seed) for seed in range(160)]
    alone = [fast(ours, data, seed, 224) for data, seed in tasks]
    with ThreadPoolExecutor(8) as executor:
        together = list(executor.map(lambda task: fast(ours, *task, 224), tasks[::-1]))[::-1]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not np.array_equal(alone[0], alone[8])


def test_the_global_generators_are_neither_read_nor_moved() -> None:
    ours = FastTrain(a_recipe())
    seed_everything(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    first = fast(ours, jpegs()[0], 5, 224)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    seed_everything(2)
    assert np.array_equal(first, fast(ours, jpegs()[0], 5, 224))


def test_a_transform_survives_pickling() -> None:
    for ours in (FastTrain(a_recipe()), FastEval(a_recipe().eval), FastEval(a_recipe(eval__exact=True).eval)):
        again = pickle.loads(pickle.dumps(ours))
        assert np.array_equal(fast(ours, jpegs()[0], 3, 224), fast(again, jpegs()[0], 3, 224))


def test_bytes_and_memoryviews_and_any_strides_of_the_output_will_do() -> None:
    ours = FastTrain(a_recipe())
    want = fast(ours, jpegs()[0], 5, 224)
    view = memoryview(b"xx" + jpegs()[0] + b"yyy")[2:-3]
    assert np.array_equal(fast(ours, view, 5, 224), want)
    planar = np.zeros((3, 224, 224), np.uint8)
    ours(EncodedImage(jpegs()[0]), 5, planar.transpose(1, 2, 0))
    assert np.array_equal(planar.transpose(1, 2, 0), want)
    png = encoded(photographs()[0], "PNG")
    assert np.array_equal(fast(ours, memoryview(png), 5, 224), fast(ours, png, 5, 224))


@pytest.mark.parametrize("transform", [FastTrain(a_recipe()), FastEval(a_recipe().eval)], ids=["train", "eval"])
def test_an_output_of_another_shape_or_type_is_refused(transform: FastTrain | FastEval) -> None:
    for out in (np.zeros((3, 224, 224), np.uint8), np.zeros((224, 224, 3), np.float32)):
        with pytest.raises(ValueError, match=r"must be uint8 of shape \(224, 224, 3\)"):
            transform(jpegs()[0], 0, out)  # type: ignore[arg-type]


def test_opencv_starts_no_threads() -> None:
    FastTrain(a_recipe())
    assert cv2.getNumThreads() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment__color_jitter": 0.4, "augment__rand_augment": '""'}, "augment.color_jitter = 0.4"),
        ({"augment__color_jitter": 0.4, "augment__rand_augment": "rand-m9-t3a"}, "augment.color_jitter = 0.4"),
        ({"augment__rand_augment": "rand-m9-t3a"}, "'Desaturate'"),
        ({"augment__rand_augment": "original-mstd0.5"}, "is not of the form"),
        ({"augment__rand_augment": "augmix-m5"}, "is not of the form"),
    ],
)
def test_what_only_timm_can_do_is_refused_with_the_way_out(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        FastTrain(a_recipe(**changes))
    assert "Set data.pipeline = 'timm'" in str(error.value)


def test_colour_jitter_beside_randaugment_is_without_effect_as_in_timm() -> None:
    one, other = FastTrain(a_recipe()), FastTrain(a_recipe(augment__color_jitter=0.4))
    assert np.array_equal(fast(one, jpegs()[0], 1, 224), fast(other, jpegs()[0], 1, 224))
