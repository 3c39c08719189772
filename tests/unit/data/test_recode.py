"""Larger images are made smaller, and all others kept."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from rsb_cluster.data.make import make_shards
from rsb_cluster.data.recode import Recode
from rsb_cluster.data.split_folder import read_source_record
from rsb_cluster.data.verify import verify
from rsb_cluster.errors import DataError
from rsb_cluster.storage.store import Store
from tests.unit.samples import source_with
from tests.unit.tars import image_slice


def photo(width, height, mode="RGB", format="JPEG", **how):
    noise = random.Random(width).randbytes(width * height * len(mode))
    buffer = io.BytesIO()
    Image.frombytes(mode, (width, height), noise).save(buffer, format, **how)
    return buffer.getvalue()


def test_larger_images_are_made_smaller_and_all_others_kept(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    images = {
        "small": photo(64, 40),
        "wide": photo(200, 100),
        "tall": photo(90, 300, exif=exif),
        "grey": photo(128, 128, "L"),
        "cmyk": photo(100, 70, "CMYK"),
        "png": photo(300, 3, "RGBA", "PNG"),
    }
    source = source_with(
        [(key, content, "png" if key == "png" else "jpg", 0) for key, content in images.items()],
    )
    store = Store(tmp_path)
    index = make_shards(source, store, recode=Recode(64, quality=90))
    stored = {index.key(i): image_slice(store, index, i) for i in range(len(images))}
    assert stored["small"] == images["small"]
    opened = {key: Image.open(io.BytesIO(content)) for key, content in stored.items()}
    assert {key: (image.format, image.mode, image.size) for key, image in opened.items() if key != "small"} == {
        "wide": ("JPEG", "RGB", (64, 32)),
        "tall": ("JPEG", "RGB", (19, 64)),
        "grey": ("JPEG", "L", (64, 64)),
        "cmyk": ("JPEG", "RGB", (64, 45)),
        "png": ("JPEG", "RGB", (64, 1)),
    }
    expected = Image.open(io.BytesIO(images["grey"])).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(opened["grey"], float) - np.asarray(expected, float)).mean() < 5
    assert read_source_record(store)["max_side"] == 64
    assert verify(store, decode=True).problems == []
    with pytest.raises(DataError, match="the image 'bad' cannot be decoded"):
        make_shards(source_with([("bad", b"text", "jpg", 0)]), Store(tmp_path / "bad"), recode=Recode(64))
