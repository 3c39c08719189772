"""Each known data set, in a small copy of its own layout on disk, and which source a name opens."""

import errno
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rsb_cluster.data.datasets import known_data_sets
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set, read_labels
from rsb_cluster.data.sources.vision import data_set_names, torchvision_dataset
from rsb_cluster.data.split_folder import read_source_record
from rsb_cluster.data.verify import stats, verify
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store
from tests.unit import formats
from tests.unit.tars import read_back


@pytest.mark.usefixtures("unchecked_hashes")
@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_small_copy_comes_back_with_its_bytes_and_classes(tmp_path, name):
    root = tmp_path / "in"
    root.mkdir()
    wanted = formats.FORMATS[name](root)
    sources = open_set(name, root=root, any_count=True)
    dest = Store(tmp_path / "out")
    made = make_set(sources, dest, shard_samples=4)
    assert set(made) == set(wanted) == set(known_data_sets()[name].samples)
    for part, images in wanted.items():
        found = read_back(dest.child(part))
        if name.startswith("cifar"):  # pixels are all there is
            found = {np.asarray(Image.open(io.BytesIO(image))).tobytes(): label for image, label in found.items()}
        assert found == images
        report = verify(dest.child(part), decode=True)
        assert (report.problems, report.samples) == ([], len(images))
        assert read_source_record(dest.child(part))["data_set"] == stats(dest.child(part)).data_set == name
        assert made[part].num_classes == len(sources[part].classes)


@pytest.mark.parametrize("name", ["imagenet-1k", "inat2019", "nct-crc-he", "stanford-cars"])
def test_a_wrong_count_says_what_was_expected(tmp_path, name):
    formats.FORMATS[name](tmp_path)
    part = next(iter(known_data_sets()[name].samples))
    expected = f"{known_data_sets()[name].samples[part]:,}"
    with pytest.raises(ConfigError, match=rf"found \d+ images, but {part} of {name} has {expected}.*--any-count"):
        open_set(name, root=tmp_path)


def test_a_wrong_number_of_classes_is_refused_too(monkeypatch, tmp_path):
    formats.class_folders(tmp_path / "NCT-CRC-HE-100K", ("ADI", "BACK"), 2, seed=0, suffix="tif")
    known = dict(known_data_sets())
    known["nct-crc-he"] = known["nct-crc-he"].model_copy(update={"samples": {"train": 4}})
    monkeypatch.setattr("rsb_cluster.data.sources.known_data_sets", lambda: known)
    with pytest.raises(ConfigError, match=r"found 2 classes, but train of nct-crc-he has 9"):
        open_set("nct-crc-he", root=tmp_path)


def test_a_known_data_set_without_its_folder_says_what_is_needed(tmp_path):
    with pytest.raises(ConfigError, match=r"--root FOLDER, a folder with .*ILSVRC2012_img_train\.tar.*image-net\.org"):
        open_set("imagenet-1k")
    with pytest.raises(ConfigError, match=r"imagenet-v2 has no train: it has val only"):
        open_set("imagenet-v2", root=tmp_path, split="train")
    for name in ("inat2019", "vizwiz-classification"):
        with pytest.raises(ConfigError, match=r"cannot read .*\.json: No such file.*Check --root"):
            open_set(name, root=tmp_path / "nowhere")
    (tmp_path / "annotations.json").write_text('{"images": ["a.jpg"]}')
    with pytest.raises(ConfigError, match=r"annotations\.json is not in the format .* KeyError 'categories'"):
        open_set("vizwiz-classification", root=tmp_path)


def test_nct_is_numbered_by_the_folders_of_train(tmp_path):
    formats.nct_crc_he(tmp_path)
    for file in (tmp_path / "CRC-VAL-HE-7K" / "BACK").iterdir():
        file.unlink()
    (tmp_path / "CRC-VAL-HE-7K" / "BACK").rmdir()
    val = open_set("nct-crc-he", root=tmp_path, split="val", any_count=True)["val"]
    assert {key.split("/")[0]: label for key, _, _, label in val}["TUM"] == 8
    assert {extension for _, _, extension, _ in val} == {"tif"}


def test_val_is_numbered_by_the_classes_of_train(tmp_path):
    formats.folder_of(
        tmp_path / "in", ["train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/1.jpg", "val/a/1.jpg"]
    )
    sources = open_set(f"{tmp_path}/in")
    assert list(sources) == ["train", "val"]
    indices = make_set(sources, Store(tmp_path / "out"))
    assert {(indices["val"].key(i), int(indices["val"].labels[i])) for i in range(2)} == {("a/1", 0), ("c/1", 2)}
    assert indices["val"].classes == indices["train"].classes == ("a", "b", "c")
    assert list(open_set(f"{tmp_path}/in", split="val")) == ["val"]
    formats.folder_of(tmp_path / "in", ["val/d/1.jpg"])
    with pytest.raises(ConfigError, match="class folders that are missing in train: d"):
        open_set(f"{tmp_path}/in")


def test_one_part_needs_to_be_told_which_and_must_fit_the_other(tmp_path):
    formats.folder_of(tmp_path / "in", ["a/1.jpg", "b/1.jpg"])
    formats.folder_of(tmp_path / "less", ["b/1.jpg"])
    with pytest.raises(ConfigError, match="--split train or --split val"):
        open_set(f"{tmp_path}/in")
    with pytest.raises(ConfigError, match="'test' is none of: train, val"):
        open_set(f"{tmp_path}/in", split="test")
    dest = Store(tmp_path / "out")
    make_set(open_set(f"{tmp_path}/in", split="train"), dest)
    with pytest.raises(ConfigError, match="val has 1 classes and train has 2; they differ in: a"):
        make_set(open_set(f"{tmp_path}/less", split="val"), dest)
    make_set(open_set(f"{tmp_path}/in", split="val"), dest)
    assert {name.split("/")[0] for name in dest.files()} == {"train", "val"}


def test_an_unknown_data_set_gets_a_suggestion(tmp_path, monkeypatch):
    assert "CIFAR10" in data_set_names()
    with pytest.raises(ConfigError, match="Did you mean 'CIFAR10'"):
        torchvision_dataset("CIFER10", tmp_path, "train")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'digits'"):
        open_set("digit")
    with pytest.raises(ConfigError, match="Did you mean 'imagenet-1k'"):
        open_set("imagenet")
    with pytest.raises(ConfigError, match="Write a folder with a slash"):
        open_set("zzzzzzz")


def test_a_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    formats.folder_of(tmp_path / "digits", ["train/a/1.jpg", "val/a/1.jpg"])
    formats.folder_of(tmp_path / "mine", ["train/a/1.jpg", "val/a/1.jpg"])
    assert len(open_set("digits")["train"]) == 1438
    assert len(open_set("./digits")["train"]) == 1
    assert len(open_set("mine")["train"]) == 1


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["0", "1", "2", "10", "11"], ["class 2 is '10'"]),
        (["7", "8", "11"], ["class 0 is '11'"]),
        (["7", "8", "9"], []),  # no number is right, but none is another one's
        (["00", "01", "10"], []),
        (["1", "2", "10", "cat"], []),
        (["Cat", "cat", "owl"], ["'Cat' and 'cat'"]),
        (["big cat", "big  cat "], ["'big  cat ' and 'big cat'"]),
        (["cafe\u0301", "caf\xe9"], ["cafe\u0301 (b'cafe\\xcc\\x81') and caf\xe9 (b'caf\\xc3\\xa9')"]),
    ],
)
def test_classes_that_may_be_mistaken_are_told(names, said, tmp_path):
    (tmp_path / "in").mkdir()
    columns = {"image": [formats.picture(i) for i in range(len(names))], "label": names}
    pq.write_table(pa.table(columns), tmp_path / "in" / "train-0.parquet")
    notes = open_set(f"{tmp_path}/in", split="train")["train"].notes
    assert [note.rpartition(": ")[2] for note in notes] == said


def test_what_cannot_be_read_is_named_and_no_traceback(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"cannot read .*: File name too long\. Check it"):
        open_set(f"{tmp_path}/{'x' * 300}")
    formats.class_folders(tmp_path / "in", ("cat",), 2, seed=0, suffix="jpg")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        with pytest.raises(ConfigError, match=r"cannot read .*/in: Permission denied\. Check it, and its permissions"):
            open_set(f"{tmp_path}/in", split="train")
    (tmp_path / "l.csv").write_text("path,label\ncat/cat_0.jpg,cat\ncat/cat_1.jpg,cat\n")
    sources = open_set(f"{tmp_path}/in", split="train", table=read_labels(tmp_path / "l.csv"))
    (tmp_path / "in" / "cat" / "cat_1.jpg").unlink()  # while they are read
    with pytest.raises(ConfigError, match=r"cannot read .*cat_1\.jpg: No such file"):
        make_set(sources, Store(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"s3://a/b: images .* rsb-cluster shards index URL -o FOLDER"):
        open_set("s3://a/b")
