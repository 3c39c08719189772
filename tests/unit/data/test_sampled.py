"""Sizes, means and standard deviations of some images of a data set."""

import io

import numpy as np
from PIL import Image

from rsb_cluster.data.index import load_index
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sampled import pixel_statistics, shorter_sides
from rsb_cluster.storage.store import Store
from tests.unit.samples import source_with


def png(colours, width=8, height=8):
    """An image whose columns have these colours in turn."""
    pixels = np.array([[colours[x % len(colours)] for x in range(width)]] * height, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def made(folder, *images):
    samples = [(f"k{i}", image, "png", 0) for i, image in enumerate(images)]
    make_set({"train": source_with(samples)}, Store(folder), shard_samples=3)
    store = Store(folder / "train")
    return store, load_index(store)


def test_mean_and_std_are_those_of_all_pixels_and_each_image_counts_the_same(tmp_path):
    black_and_red = png([(0, 0, 0), (255, 0, 51)])
    white = png([(255, 255, 255)], width=64, height=32)
    mean, std = pixel_statistics(*made(tmp_path, black_and_red, white))
    assert mean == (0.75, 0.5, 0.55)
    # Of red: half of the pixels count twice as 1, a quarter each as 0 and 1.
    assert np.allclose(std, (np.sqrt(0.75 - 0.75**2), 0.5, np.sqrt(0.51 - 0.55**2)), atol=1e-3)


def test_a_large_image_is_scaled_and_one_that_cannot_be_decoded_is_left_out(tmp_path):
    stripes = png([(0, 0, 0), (255, 255, 255)], width=900, height=600)
    mean, std = pixel_statistics(*made(tmp_path, stripes, b"no image"))
    assert np.allclose(mean, 0.5, atol=0.02)
    assert max(std) < 0.3, "as a training image sees it, whose pixels are means"


def test_shorter_sides_are_sorted(tmp_path):
    images = [png([(1, 2, 3)], width=w, height=h) for w, h in ((30, 20), (9, 40), (16, 16))]
    assert shorter_sides(*made(tmp_path, *images, b"no image")).tolist() == [9, 16, 20]


def test_many_images_are_sampled_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr("rsb_cluster.data.sampled.SIZES_OF", 3)
    store, index = made(tmp_path, *(png([(0, 0, 0)], width=10 + i, height=99) for i in range(9)))
    assert len(shorter_sides(store, index)) == 3
