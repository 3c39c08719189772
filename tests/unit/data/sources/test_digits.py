"""scikit-learn's digits: its pixels, split alike by class."""

import io

import numpy as np
import pytest
from PIL import Image

from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.data.sources.digits import digits
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store


def test_digits_are_split_alike_by_class(tmp_path):
    steps = []
    indices = make_set(open_set("digits"), Store(tmp_path), progress=lambda *step: steps.append(step))
    assert indices["train"].num_samples == 1438
    assert indices["val"].num_samples == 359
    assert steps == [(1000, 1797), (1438, 1797), (1797, 1797)]
    keys = {split: {index.key(i) for i in range(index.num_samples)} for split, index in indices.items()}
    assert keys["train"] | keys["val"] == {f"digits-{i:04d}" for i in range(1797)}
    assert not keys["train"] & keys["val"]
    train, val = (np.bincount(indices[split].labels, minlength=10) for split in ("train", "val"))
    assert (abs(val - (train + val) * 359 / 1797) <= 1).all()
    assert len(np.unique(indices["train"].labels[:100])) == 10
    with pytest.raises(ConfigError, match="no split 'test'"):
        digits("test")


def test_digits_are_the_pixels_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = load_digits()
    for key, content, extension, label in digits("val"):
        number = int(key.removeprefix("digits-"))
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        assert extension == "png"
        assert pixels.shape == (8, 8)
        assert pixels.dtype == np.uint8
        assert np.abs(pixels - data.images[number] * 255 / 16).max() <= 0.5
        assert label == data.target[number]
