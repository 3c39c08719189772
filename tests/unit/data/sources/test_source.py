"""Keys of samples, images as PNG, and the order in which samples are written."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rsb_cluster.data.scan import split_name
from rsb_cluster.data.sources.source import as_png, safe_keys
from tests.unit.samples import source_with

FILES = st.lists(st.text(st.sampled_from("aA_.+%2E/é \n~"), min_size=1, max_size=8), unique=True, max_size=8)


@given(FILES, st.sampled_from(["jpg", "JPG"]))
def test_keys_are_unique_and_survive_webdataset(stems, extension):
    files = [f"{stem}.{extension}" for stem in stems] + [f"{stem}.png" for stem in stems[:3]]
    keys = safe_keys(files)
    assert len(set(keys)) == len(files)
    for key, file in zip(keys, files, strict=True):
        if not file.rpartition(".")[0].endswith("/"):  # no file has an empty name
            assert split_name(f"{key}.jpg") == (key, "jpg")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_png_keeps_what_it_can(mode):
    image = Image.new(mode, (3, 2))
    back = Image.open(io.BytesIO(as_png(image)))
    assert back.mode == {"CMYK": "RGB"}.get(mode, mode)
    assert np.array_equal(np.asarray(back.convert("RGB")), np.asarray(image.convert("RGB")))


def test_blocks_are_read_together_and_classes_still_mixed():
    source = source_with([(f"{i}", b"x", "jpg", i // 100) for i in range(30_000)], block_samples=(100,) * 300)
    order = source.order()
    assert sorted(order.tolist()) == list(range(30_000))
    shards = order[:20_000].reshape(20, 1000) // 100
    assert all(len(np.unique(blocks)) <= 128 for blocks in shards)  # a shard lies in one window, or in two
    assert all(len(np.unique(blocks)) >= 60 for blocks in shards)
    assert source_with([("a", b"", "jpg", 0)] * 5, block_samples=(2, 3)).order().tolist() != [0, 1, 2, 3, 4]
