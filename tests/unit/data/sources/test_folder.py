"""Folders of images: names that come back, bytes that are kept, classes that are there."""

import os
from urllib.parse import unquote

import pytest

from rsb_cluster.data.make import make_shards
from rsb_cluster.data.sources import open_set
from rsb_cluster.data.sources.folder import image_folder
from rsb_cluster.data.verify import stats
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store
from tests.unit import formats
from tests.unit.tars import image_slice

WEIRD = [
    "plain/img_1.JPEG",
    "plain/nested/deep/img_1.png",
    "plain/two.dots.v1.jpg",
    "plain/same.jpg",
    "plain/same.png",
    "plain/same.JPG",
    "plain/same%2Ejpg.png",
    "plain/same.jpg.jpg",
    "plain/same+jpg.png",
    "__meta__/img.jpg",
    "____/img.jpg",
    "__half/img.jpg",
    "with space/a b.jpg",
    "with space/'quote\".jpg",
    "with.dot/x.jpg",
    "with.dot/line\nbreak.jpg",
    "with.dot/-rf *.jpg",
    "ünï/日本語.webp",
    "ünï/100%.jpg",
    "ünï/" + "long" * 50 + ".jpg",
    "ünï/\udcff\udcfe.jpg",  # no UTF-8 on disk
]


def test_weird_file_names_become_keys_that_come_back(tmp_path):
    path = formats.folder_of(tmp_path / "in", WEIRD)
    (path / "plain" / ".hidden.jpg").write_bytes(b"x")
    (path / "plain" / "._img_1.jpg").write_bytes(b"x")
    (path / "plain" / "notes.txt").write_bytes(b"x")
    (path / ".git").mkdir()
    (path / "top.jpg").write_bytes(b"x")
    source = image_folder(path)
    assert source.classes == ("____", "__half", "__meta__", "plain", "with space", "with.dot", "ünï")
    store = Store(tmp_path / "out")
    index = make_shards(source, store, shard_samples=5)
    keys = [index.key(i) for i in range(index.num_samples)]
    assert len(set(keys)) == len(WEIRD) == index.num_samples
    found = {}
    for i, key in enumerate(keys):
        assert key.isascii()
        assert key.isprintable()
        assert not set(key) & set(" .'\"\n*")
        found[image_slice(store, index, i)] = (key, source.classes[index.labels[i]])
    for name in WEIRD:
        key, label = found[(path / name).read_bytes()]
        assert label == name.split("/")[0]
        stem, _, extension = name.rpartition(".")
        back = os.fsdecode(unquote(key.split("+")[0], errors="surrogateescape").encode("utf-8", "surrogateescape"))
        assert back == stem
        assert key.split("+")[1:] == ([extension] if name.startswith("plain/same.") and name.count(".") == 1 else [])


def test_images_in_folders_are_kept_byte_for_byte_and_mixed(tmp_path):
    path = formats.folder_of(tmp_path / "in", [f"c{c}/{i:03d}.png" for c in range(4) for i in range(30)])
    source = image_folder(path)
    assert len(source) == 120
    samples = list(source)
    assert samples == list(image_folder(path))
    assert sorted(sample[0] for sample in samples) == [f"c{c}/{i:03d}" for c in range(4) for i in range(30)]
    for key, content, extension, label in samples:
        assert content == (path / f"{key}.{extension}").read_bytes()
        assert label == int(key[1])
    for start in range(0, 120, 20):
        assert len({label for *_, label in samples[start : start + 20]}) == 4
    store = Store(tmp_path / "out")
    make_shards(source, store, shard_samples=20)
    assert stats(store).one_class_shards == 0


def test_class_folders_must_be_there_and_filled(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        image_folder(tmp_path / "nowhere")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match="has no sub-folders"):
        image_folder(tmp_path / "flat")
    formats.folder_of(tmp_path / "gap", ["a/1.jpg"])
    (tmp_path / "gap" / "b").mkdir()
    with pytest.raises(ConfigError, match="have no image: b"):
        image_folder(tmp_path / "gap")


def test_an_image_that_is_a_link_to_nothing_is_named_before_anything_is_written(tmp_path):
    formats.class_folders(tmp_path / "in", ("cat",), 2, seed=0, suffix="png")
    (tmp_path / "in" / "cat" / "gone.png").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"cannot read the image .*gone\.png: No such file"):
        image_folder(tmp_path / "in")


def split_folders(path, *names):
    for name in names:
        for i, label in enumerate(("cat", "dog")):
            formats.write(path / name / label / "0.jpg", formats.picture(i))
    return str(path)


def test_a_folder_of_one_split_is_that_split(tmp_path):
    assert open_set(split_folders(tmp_path / "a", "val"), split="val")["val"].classes == ("cat", "dog")
    assert open_set(split_folders(tmp_path / "b", "train", "valid"), split="train")["train"].classes == ("cat", "dog")


@pytest.mark.parametrize("names", [("train",), ("train", "valid"), ("training", "test")])
@pytest.mark.parametrize("split", [None, "val"])
def test_splits_are_not_taken_for_classes(tmp_path, names, split):
    with pytest.raises(ConfigError, match=r"are splits and no classes: .*with --split train or --split val"):
        open_set(split_folders(tmp_path, *names), split=split)


def test_a_class_may_be_called_like_a_split(tmp_path):
    for name in ("bus", "train"):
        formats.write(tmp_path / name / "0.jpg", formats.picture(0))
    for split in ("train", "val"):
        assert open_set(str(tmp_path), split=split)[split].classes == ("bus", "train")
