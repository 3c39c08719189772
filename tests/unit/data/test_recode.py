"""Larger images are made smaller, and all others kept."""

import io
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rsb_cluster.data.make import make_shards, plan_set
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
    with pytest.raises(DataError, match=r"the image 'bad' \(given\) cannot be decoded.*its first bytes are b'text'"):
        make_shards(source_with([("bad", b"text", "jpg", 0)]), Store(tmp_path / "bad"), recode=Recode(64))


def test_images_whose_values_are_cut_off_are_kept_and_said(tmp_path):
    grey = np.linspace(0, 65535, 90 * 90, dtype=np.uint16).reshape(90, 90)
    wide = {}
    for name, pixels, format in (("p", grey, "PNG"), ("t", (grey / 65535).astype(np.float32), "TIFF")):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format)
        wide[name] = buffer.getvalue()
    source = source_with([("p", wide["p"], "png", 0), ("t", wide["t"], "tif", 0), ("web", b"<html>", "jpg", 0)])
    for recode, said in ((None, "store 8 bits"), (Recode(64), "store 8 bits; not downscaled")):
        store = Store(tmp_path / str(bool(recode)))
        if recode:
            source = replace(source, entries=source.entries[:2])
        plan = plan_set({"train": source}, store, recode=recode)
        index = plan.make()["train"]
        where = store.child("train")
        stored = {index.key(i): image_slice(where, index, i) for i in range(index.num_samples)}
        assert {key: stored[key] for key in wide} == wide
        notes = plan.notes("train")
        assert any(note.startswith("stored, 16-bit grey") and f"{said}: 2 (" in note for note in notes)
        assert any("no image by its first bytes" in note for note in notes) == (recode is None)
        assert verify(where, decode=True).notes[0].startswith("images, 16-bit grey or floating point")
