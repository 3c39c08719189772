"""Folders of images: names that come back, bytes that are kept, classes that are there."""

import os
import unicodedata
from urllib.parse import unquote

import pytest

from rsb_cluster.data.make import make_shards
from rsb_cluster.data.sources.folder import file_source, image_folder
from rsb_cluster.data.verify import stats, verify
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
    with pytest.raises(ConfigError, match=r"has no sub-folders\..*--labels FILE\.csv"):
        image_folder(tmp_path / "flat")
    formats.folder_of(tmp_path / "gap", ["a/1.jpg"])
    (tmp_path / "gap" / "b").mkdir()
    with pytest.raises(ConfigError, match="have no image: b"):
        image_folder(tmp_path / "gap")


def test_an_image_that_is_a_link_to_nothing_is_named_before_anything_is_written(tmp_path):
    formats.class_folders(tmp_path / "in", ("cat",), 2, seed=0, suffix="png")
    (tmp_path / "in" / "cat" / "gone.png").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"cannot read the image .*gone\.png: it is a link to nowhere, which"):
        image_folder(tmp_path / "in")


def test_an_empty_file_is_named_before_anything_is_written(tmp_path):
    formats.class_folders(tmp_path / "in", ("cat",), 2, seed=0, suffix="png")
    (tmp_path / "in" / "cat" / "none.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"1 files are empty: cat/none\.png"):
        image_folder(tmp_path / "in")


def test_what_decoders_read_is_taken_and_the_rest_is_counted_by_extension(tmp_path):
    formats.class_folders(tmp_path / "in", ("cat",), 1, seed=0, suffix="jpg")
    for i, name in enumerate(("a.jfif", "b.jpe", "c.JPG", "noext", "noext.jpg")):
        formats.write(tmp_path / "in" / "cat" / name, formats.picture(100 + i))
    formats.write(tmp_path / "in" / "cat" / "d.avif", formats.picture(200, format="AVIF"))
    formats.write(tmp_path / "in" / "cat" / "e.jp2", formats.picture(201, format="JPEG2000"))
    for name in ("f.heic", "g.HEIC", "notes.txt", "README"):
        formats.write(tmp_path / "in" / "cat" / name, b"no image")
    formats.write(tmp_path / "in" / "loose.jpg", formats.picture(300))
    source = image_folder(tmp_path / "in")
    stored = {f"{key}.{extension}" for key, _, extension, _ in source}
    assert stored == {
        "cat/a.jpg", "cat/b.jpg", "cat/c.jpg", "cat/cat_0.jpg", "cat/noext+.jpg", "cat/noext+jpg.jpg",
        "cat/d.avif", "cat/e.jp2",
    }  # fmt: skip
    assert source.notes == (
        "left out, in no class folder: 1 (loose.jpg)",
        "left out, no extension, and no image by their first bytes: 1 (cat/README)",
        "left out, .heic, which is not read: convert them, for example to PNG: 2 (cat/f.heic, cat/g.HEIC)",
        "left out, .txt: 1 (cat/notes.txt)",
    )
    index = make_shards(source, Store(tmp_path / "out"))
    assert verify(Store(tmp_path / "out"), decode=True).problems == []
    assert index.num_samples == 8


def test_a_class_without_an_image_says_what_it_holds(tmp_path):
    formats.class_folders(tmp_path, ("cat",), 1, seed=0, suffix="jpg")
    formats.write(tmp_path / "dog" / "x.heic", b"x")
    with pytest.raises(ConfigError, match=r"have no image: dog\. Remove them.*\n.*\.heic, which is not read"):
        image_folder(tmp_path)


def test_the_name_of_a_class_must_be_text(tmp_path):
    path = formats.folder_of(tmp_path / "in", ["caf\udce9/a.jpg"])
    with pytest.raises(ConfigError, match=r"in: the name of the class folder 'caf\\udce9' is not UTF-8\. Rename it\."):
        image_folder(path)


def test_classes_of_val_are_those_of_train_however_accents_are_spelled(tmp_path):
    for split, form in (("train", "NFC"), ("val", "NFD")):
        for name in ("caf\xe9", "dog"):
            formats.write(tmp_path / split / unicodedata.normalize(form, name) / "0.jpg", formats.picture(0))
    train = image_folder(tmp_path / "train")
    val = image_folder(tmp_path / "val", classes=train.classes)
    assert val.classes == train.classes == ("caf\xe9", "dog")
    assert sorted(label for *_, label in val) == [0, 1]
    formats.write(tmp_path / "val" / "th\xe9" / "0.jpg", formats.picture(0))
    with pytest.raises(ConfigError, match=r"missing in train: th\xe9 \(b'th\\xc3\\xa9'\)"):
        image_folder(tmp_path / "val", classes=train.classes)


def test_listed_files_are_regular_ones(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ConfigError, match=r"pipe\.jpg is no regular file"):
        file_source("listed", ("a",), tmp_path, [("pipe.jpg", 0)])
    with pytest.raises(ConfigError, match=r"cannot read the image .*gone\.jpg: No such file"):
        file_source("listed", ("a",), tmp_path, [("gone.jpg", 0)])
