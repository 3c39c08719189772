"""Illusions are drawn alike each time, and the authors' own are read."""

import io

import numpy as np
import pytest
from PIL import Image

from rsb_cluster.data.sources import open_set
from rsb_cluster.data.sources.illusions import SETS, indl
from rsb_cluster.errors import ConfigError
from tests.unit import formats


def test_illusions_are_drawn_alike_each_time_and_say_what_they_show(tmp_path):
    for name in SETS:
        parts = {split: indl(name, split) for split in ("train", "val")}
        assert {split: len(part) for split, part in parts.items()} == {"train": 8000, "val": 2000}
        some = [parts["val"].sample(i) for i in range(40)]
        assert some == [indl(name, "val").sample(i) for i in range(40)]
        assert len({image for _, image, _, _ in some}) > 30  # lines of whole pixels: a few are alike
        assert 8 < sum(label for *_, label in some) < 32
        image = Image.open(io.BytesIO(some[0][1]))
        assert image.size == (128, 128)
        assert image.mode == ("RGB" if name == "hering" else "L")
        assert name == "hering" or set(np.unique(np.asarray(image))) == {0, 255}
    with pytest.raises(ConfigError, match="InDL has no split 'test'"):
        indl("zollner", "test")


def test_illusions_of_one_length_are_of_one_length():
    """Read from the pixels: the standing line of the vertical and horizontal illusion, 0.5 of a square of 2."""
    lengths = {0: set(), 1: set()}
    for i in range(40):
        _, image, _, label = indl("vertical-horizontal", "train").sample(i)
        column = np.asarray(Image.open(io.BytesIO(image)))[:, 48]
        lengths[label].add(int((column == 0).sum()))
    assert max(lengths[1]) - min(lengths[1]) == 0
    assert max(lengths[1]) in (32, 33)
    assert max(lengths[0]) > 36


def test_the_authors_own_illusions_are_read_and_split(tmp_path):
    wanted = formats.indl(tmp_path)["all"]
    parts = open_set("indl-zollner", root=tmp_path, any_count=True)
    assert {split: len(part) for split, part in parts.items()} == {"train": 16, "val": 4}
    assert {image: label for part in parts.values() for _, image, _, label in part} == wanted
