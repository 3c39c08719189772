"""The fast pixel pipeline against timm's transforms on PIL."""

from __future__ import annotations

import io
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms, features
from sklearn.datasets import load_sample_images
from timm.data import RandomResizedCropAndInterpolation
from timm.data import auto_augment as timm_augment

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.errors import ConfigError
from rsb_cluster.train.augment import EvalTransform, TrainTransform, seed_everything
from rsb_cluster.train.input.pixels import randaugment, tolerances
from rsb_cluster.train.input.pixels.crop import eval_crop, random_box, resize
from rsb_cluster.train.input.pixels.decode import BadImageError, Source
from rsb_cluster.train.input.pixels.draws import draws_of
from rsb_cluster.train.input.pixels.jpeg import cut_to_rows, read_headers
from rsb_cluster.train.input.pixels.randaugment import AFFINE, COLOUR, LEVELS, RandAugment
from rsb_cluster.train.input.pixels.transforms import FastEval, FastTrain

Pixels = NDArray[np.uint8]

FILL = (124, 116, 104)
NOTATIONS = [
    "rand-m7-mstd0.5-inc1",
    "rand-m9-mstd0.5-inc1",
    "rand-m6",
    "rand-m9-n3-mstd1-tweights",
    "rand-m8-mstd101-p0.8-inc1",
    "rand-m15-mmax20-mstd2-n4",
]


def a_recipe(**changes: object) -> Recipe:
    """A2 with other values; ``augment__resolution=160`` and the like."""
    return load_recipe("a2", assignments=[f"{k.replace('__', '.')}={v}" for k, v in changes.items()]).recipe


@lru_cache
def photographs() -> list[Image.Image]:
    return [Image.fromarray(image) for image in load_sample_images().images]


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@lru_cache
def jpegs() -> list[bytes]:
    sizes = [(500, 375), (333, 500), (640, 427), (180, 120)]
    return [encoded(p.resize(s, Image.Resampling.LANCZOS), quality=95) for p in photographs() for s in sizes]


def by_pil(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def by_timm(transform: TrainTransform | EvalTransform, data: bytes, seed: int) -> Pixels:
    result: Pixels = transform(by_pil(data), seed).permute(1, 2, 0).numpy()
    return result


def fast(transform: FastTrain | FastEval, data: bytes | memoryview, seed: int, side: int) -> Pixels:
    out = np.zeros((side, side, 3), np.uint8)
    transform(Source(data), seed, out)
    return out


def decode(data: bytes | memoryview) -> Pixels:
    source = Source(data)
    return source.rows(source.height)


def difference(one: Pixels, other: Pixels) -> NDArray[np.int64]:
    assert one.shape == other.shape
    assert one.dtype == other.dtype == np.uint8
    return np.abs(one.astype(np.int64) - other)


# Operations


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
    random.seed(seed)
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


# Draws


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
        ours(np.zeros((2, 2, 3), np.uint8), draws_of(seed))
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


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (40, 600), (600, 40), (9, 9), (224, 224)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.7, 1.0), (0.9, 1.0)])
def test_a_seed_draws_the_same_crop_as_in_timm(height: int, width: int, scale: tuple[float, float]) -> None:
    image, ratio = Image.new("L", (width, height)), (3 / 4, 4 / 3)
    for seed in range(200):
        random.seed(seed)
        want = RandomResizedCropAndInterpolation.get_params(image, scale, ratio)
        assert tuple(random_box(height, width, random.Random(seed), scale=scale, ratio=ratio)) == want


def test_flips_come_with_the_recipes_probability() -> None:
    for probability in (0.0, 0.3, 1.0):
        share = np.mean([draws_of(seed).flips(probability) for seed in range(4000)])
        assert share == pytest.approx(probability, abs=0.03)


# Whole images


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


# One function of bytes and seed


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
    ours(Source(jpegs()[0]), 5, planar.transpose(1, 2, 0))
    assert np.array_equal(planar.transpose(1, 2, 0), want)
    png = encoded(photographs()[0], "PNG")
    assert np.array_equal(fast(ours, memoryview(png), 5, 224), fast(ours, png, 5, 224))


@pytest.mark.parametrize("transform", [FastTrain(a_recipe()), FastEval(a_recipe().eval)], ids=["train", "eval"])
def test_an_output_of_another_shape_or_type_is_refused(transform: FastTrain | FastEval) -> None:
    for out in (np.zeros((3, 224, 224), np.uint8), np.zeros((224, 224, 3), np.float32)):
        with pytest.raises(ValueError, match=r"must be uint8 of shape \(224, 224, 3\)"):
            transform(jpegs()[0], 0, out)  # type: ignore[arg-type]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_resized_crop_stays_interleaved(interpolation: str) -> None:
    pixels = decode(jpegs()[0])
    assert pixels.flags.c_contiguous
    part = pixels[20:200, 30:330]
    resized = resize(part, 96, 160, interpolation)
    assert resized.strides == (160 * 3, 3, 1)  # planar memory would be (160, 1, 96 * 160)
    assert np.array_equal(resized, resize(np.ascontiguousarray(part), 96, 160, interpolation))


def test_opencv_starts_no_threads() -> None:
    FastTrain(a_recipe())
    assert cv2.getNumThreads() == 1


# Files


def odd_files() -> Iterator[tuple[str, bytes]]:
    photo = photographs()[0].resize((200, 150))
    grey = photo.convert("L")
    yield "grey jpeg", encoded(grey)
    yield "cmyk jpeg", encoded(photo.convert("CMYK"))
    yield "rgb jpeg", encoded(photo, keep_rgb=True)
    yield "progressive jpeg", encoded(photo, progressive=True)
    yield "jpeg 4:4:4", encoded(photo, subsampling=0)
    yield "jpeg 4:2:2", encoded(photo, subsampling=1)
    yield "jpeg with restart markers", encoded(photo, restart_marker_rows=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    yield "jpeg with exif orientation", encoded(photo, exif=exif)
    yield (
        "jpeg with a profile",
        encoded(photo, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    )
    yield "jpeg and rubbish after it", encoded(photo) + b"rubbish" * 9
    yield "jpeg of one pixel", encoded(photo.resize((1, 1)))
    yield "jpeg of one column", encoded(photo.resize((1, 300)))
    yield "jpeg with two pictures", encoded(photo, "MPO", save_all=True, append_images=[grey.convert("RGB")])
    yield "png", encoded(photo, "PNG")
    yield "png of one pixel", encoded(photo.resize((1, 1)), "PNG")
    yield "png with alpha", encoded(photo.convert("RGBA"), "PNG")
    yield "grey png with alpha", encoded(photo.convert("LA"), "PNG")
    yield "png with a palette", encoded(photo.quantize(16), "PNG")
    yield "png of one bit", encoded(photo.convert("1"), "PNG")
    yield "png of 16 bits", encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG")
    yield "gif", encoded(photo, "GIF")
    yield "bmp", encoded(photo, "BMP")
    yield "tiff", encoded(photo, "TIFF")
    yield "cmyk tiff", encoded(photo.convert("CMYK"), "TIFF")
    yield "float tiff", encoded(grey.convert("F"), "TIFF")
    if features.check("webp"):
        yield "webp", encoded(photo, "WEBP")


@pytest.mark.parametrize(("name", "data"), [pytest.param(n, d, id=n) for n, d in odd_files()])
def test_odd_files_decode_as_with_pil(name: str, data: bytes) -> None:
    want = np.asarray(by_pil(data))
    got = decode(data)
    assert np.array_equal(got, want)
    assert got.flags.writeable
    assert got.flags.c_contiguous
    for seed in range(4):
        fast(FastTrain(a_recipe(augment__resolution=32)), data, seed, 32)
    fast(FastEval(a_recipe(eval__resolution=32).eval), data, 0, 32)


def test_twenty_megapixels_decode_as_with_pil() -> None:
    data = encoded(photographs()[1].resize((5472, 3648)), quality=90)
    assert np.array_equal(decode(data), np.asarray(by_pil(data)))
    recipe = a_recipe()
    assert (
        difference(fast(FastEval(recipe.eval), data, 0, 224), by_timm(EvalTransform(recipe.eval), data, 0)).max() <= 2
    )


def with_precision(data: bytes, bits: int) -> bytes:
    at = data.index(b"\xff\xc0") + 4
    return data[:at] + bytes([bits]) + data[at + 1 :]


def bad_files() -> Iterator[tuple[str, bytes]]:
    jpeg, png = jpegs()[0], encoded(photographs()[0], "PNG")
    for cut in (1, 2, 3, 30, len(jpeg) // 2, len(jpeg) - 700, len(jpeg) - 20, len(jpeg) - 3):
        yield f"jpeg without its last {cut} bytes", jpeg[:-cut]
    yield "png cut in half", png[: len(png) // 2]
    yield "jpeg of 12 bits", with_precision(jpeg, 12)
    yield "no bytes", b""
    yield "zeros", bytes(1000)
    yield "a text", b"<html>404 not found</html>"
    yield "noise", np.random.default_rng(0).bytes(3000)
    yield "noise that begins like a jpeg", b"\xff\xd8\xff" + np.random.default_rng(0).bytes(3000)
    yield "noise that begins like a png", b"\x89PNG\r\n\x1a\n" + np.random.default_rng(0).bytes(3000)


@pytest.mark.parametrize("data", [pytest.param(d, id=n) for n, d in bad_files()])
def test_what_pil_refuses_is_a_bad_image(data: bytes) -> None:
    with pytest.raises(Exception):  # noqa: B017 - whatever PIL raises
        by_pil(data)
    transforms = FastTrain(a_recipe()), FastEval(a_recipe().eval), FastEval(a_recipe(eval__exact=True).eval)
    for transform in transforms:
        out = np.full((224, 224, 3), 7, np.uint8)
        with pytest.raises(BadImageError, match=r"\w"):
            transform(Source(data), 0, out)
        assert (out == 7).all()


def test_damage_inside_a_jpeg_is_read_or_refused_as_by_pil() -> None:
    rng, counts = np.random.default_rng(0), Counter[str]()
    for _ in range(120):
        data = bytearray(jpegs()[0])
        for at in rng.integers(150, len(data) - 10, 3):
            data[at] = rng.integers(256)
        try:
            want = np.asarray(by_pil(bytes(data)))
        except Exception:
            with pytest.raises(BadImageError):
                decode(bytes(data))
            counts["refused"] += 1
        else:
            assert np.array_equal(decode(bytes(data)), want)
            counts["read"] += 1
            rows = int(rng.integers(1, 150))
            assert np.array_equal(Source(bytes(data)).rows(rows)[:rows], want[:rows])
            headers = read_headers(data)
            counts["read in part"] += headers is not None and cut_to_rows(data, headers, rows) is not None
    assert min(counts["read"], counts["refused"], counts["read in part"]) > 0


def test_damage_that_pil_refuses_is_refused_whatever_part_is_read() -> None:
    """A stray marker may lie below the rows that are asked for."""
    data = bytearray(jpegs()[0])
    data[-300:-298] = b"\xff\xc4"
    with pytest.raises(Exception):  # noqa: B017 - whatever PIL raises
        by_pil(bytes(data))
    with pytest.raises(BadImageError):
        Source(bytes(data)).rows(10)


PLAIN = {
    "4:2:0": encoded(photographs()[0].resize((101, 150)), quality=95),
    "4:2:2": encoded(photographs()[0].resize((101, 150)), subsampling=1),
    "4:4:4": encoded(photographs()[0].resize((101, 150)), subsampling=0),
    "grey": encoded(photographs()[0].resize((101, 150)).convert("L")),
    "4:4:0": simplejpeg.encode_jpeg(np.asarray(photographs()[0].resize((101, 150))), colorsubsampling="440"),
    "with a profile": encoded(photographs()[0].resize((101, 150)), icc_profile=bytes(1500)),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_the_topmost_rows_are_those_of_the_whole_image(kind: str) -> None:
    want, saved = np.asarray(by_pil(PLAIN[kind])), 0
    for rows in range(1, 151):
        got = Source(PLAIN[kind]).rows(rows)
        assert np.array_equal(got[:rows], want[:rows])
        saved += len(got) < 150
    assert saved > 120


def test_what_is_decoded_is_kept_and_more_is_decoded_when_asked_for() -> None:
    source = Source(PLAIN["4:2:0"])
    few = source.rows(20)
    assert len(few) < 150 and source.rows(10) is few
    assert np.array_equal(source.rows(150), np.asarray(by_pil(PLAIN["4:2:0"])))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_decompression_bomb_is_a_bad_image(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (200, 200)), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 200 // 2 - 1)
    with pytest.raises(BadImageError, match="DecompressionBombError"):
        decode(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(data).shape == (200, 200, 3)


def test_an_image_too_narrow_to_resize_is_a_bad_image() -> None:
    with pytest.raises(BadImageError, match="2 x 60000 pixels become 235 x 7050000"):
        eval_crop(np.zeros((60000, 2, 3), np.uint8), 224, 0.95, "bicubic")


# Settings


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


def test_a_notation_that_timm_cannot_read_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="timm cannot read it: Unknown RandAugment config section"):
        FastTrain(a_recipe(augment__rand_augment="rand-m9-x5"))


def test_colour_jitter_beside_randaugment_is_without_effect_as_in_timm() -> None:
    one, other = FastTrain(a_recipe()), FastTrain(a_recipe(augment__color_jitter=0.4))
    assert np.array_equal(fast(one, jpegs()[0], 1, 224), fast(other, jpegs()[0], 1, 224))
