"""Files are decoded as by PIL, whatever they are; what PIL refuses is a bad image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms, features

from rsb_cluster.train.augment import EvalTransform
from rsb_cluster.train.input.pixels.decode import BadImageError, EncodedImage
from rsb_cluster.train.input.pixels.jpeg import cut_to_rows, read_headers
from rsb_cluster.train.input.pixels.transforms import FastEval, FastTrain
from tests.unit.train.input.pixels.images import (
    a_recipe,
    by_pil,
    by_timm,
    decode,
    difference,
    encoded,
    fast,
    jpegs,
    photographs,
)


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
            transform(EncodedImage(data), 0, out)
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
            assert np.array_equal(EncodedImage(bytes(data)).rows(rows)[:rows], want[:rows])
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
        EncodedImage(bytes(data)).rows(10)


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
        got = EncodedImage(PLAIN[kind]).rows(rows)
        assert np.array_equal(got[:rows], want[:rows])
        saved += len(got) < 150
    assert saved > 120


def test_what_is_decoded_is_kept_and_more_is_decoded_when_asked_for() -> None:
    source = EncodedImage(PLAIN["4:2:0"])
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
