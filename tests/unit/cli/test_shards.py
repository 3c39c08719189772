"""The commands that verify, count and index shards, as a user calls them."""

import json
import shutil
from pathlib import Path

import pytest

from rsb_cluster.cli import main
from rsb_cluster.data.datasets import known_data_sets
from tests.unit.tars import pair, tar_of


def test_a_folder_becomes_shards_that_are_verified_and_counted(shards, images, tmp_path):
    made = shards("make", images, "data", "--shard-samples", 4, "--max-side", 8, "--workers", 1)
    assert made == "train: 40 samples of 2 classes in 10 shards\nval: 7 samples of 2 classes in 2 shards\n"
    assert shards("make", images, "data", "--shard-samples", 4, "--max-side", 8) == made
    assert "train already holds" in shards("make", images, "data", code=2)
    assert shards("verify", "data", "--decode", "--workers", 1).splitlines() == [
        "data/train: 40 samples in 10 shards, 0 problems",
        "  2 classes, with 20 images each",
        "data/val: 7 samples in 2 shards, 0 problems",
        "  2 classes, with 3 to 4 images (mean 3.5)",
        "images in both data/train and data/val: 1",
    ]
    found = json.loads(shards("stats", "data", "--json"))
    assert found["data/val"]["samples"] == 7
    assert found["data/train"]["data_set"] == ""
    assert "one class shards" in shards("stats", "data")
    classes = {"cat": {"data/train": 20, "data/val": 4}, "dog": {"data/train": 20, "data/val": 3}}
    assert json.loads(shards("stats", "data", "--classes", "--json")) == classes
    counted = [line.split() for line in shards("stats", "data/val", "--classes").splitlines()]
    assert counted[1:] == [["cat", "4"], ["dog", "3"]]
    assert shards("index", "data/val") == "7 samples of 2 classes in 2 shards\n"
    (tmp_path / "data" / "val" / "shard-000001.tar").unlink()
    said = shards("verify", "data", "--workers", 1, code=1)
    assert "shard-000001.tar is missing. Copy it again." in said
    assert "Copy them again" in said


def test_a_part_without_an_index_is_not_silently_left_out(shards, tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / "my set" / part).mkdir(parents=True)
        (tmp_path / "my set" / part / "a.tar").write_bytes(tar_of(pair("a", b"a", 0)))
    shards("index", tmp_path / "my set" / "train")
    for command in ("verify", "stats"):
        with pytest.raises(SystemExit):
            main(["shards", command, f"{tmp_path}/my set"], prog_name="rsb-cluster")
        said = capsys.readouterr().err
        assert f"val has no index, and is left out. Make it: rsb-cluster shards index '{tmp_path}/my set/val'" in said


def test_classes_of_one_name_are_counted_apart(shards, tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of(pair("a", b"a", 0) + pair("b", b"b", 1) + pair("c", b"c", 1)))
    (tmp_path / "classes.json").write_text('["crane", "crane"]')
    shards("index", tmp_path)
    counts = {"crane (0)": {str(tmp_path): 1}, "crane (1)": {str(tmp_path): 2}}
    assert json.loads(shards("stats", tmp_path, "--classes", "--json")) == counts


def test_one_folder_of_two_splits_is_indexed_elsewhere(shards, images):
    shards("make", images, "made", "--workers", 1)
    for part, count in (("train", 1), ("val", 1)):
        for number in range(count):
            shutil.copy(f"made/{part}/shard-{number:06d}.tar", f"set-{part}-{number}.tar")
    assert shards("index", ".", "-o", "mine", "--workers", 1) == (
        "train: 40 samples of 2 classes in 1 shard\nval: 7 samples of 2 classes in 1 shard\n"
    )
    assert "mine/val: 7 samples in 1 shard, 0 problems" in shards("verify", "mine", "--workers", 1)
    assert shards("info", "made").endswith("made/_info.json\n")
    assert json.loads(Path("made/_info.json").read_text())["splits"]["validation"]["filenames"] == [
        "val/shard-000000.tar"
    ]


def test_known_data_sets_are_listed(shards):
    listed = shards("list")
    assert all(name in listed for name in known_data_sets())
    assert "1,281,167" in listed and "label set top1" in listed
    assert json.loads(shards("list", "--json"))[0]["samples"] == {"train": 1_281_167, "val": 50_000}


def test_the_splits_of_a_set_are_indexed_together_and_what_is_left_out_is_said(shards, tmp_path):
    littered = [*pair("k", b"x", 1), ("d/._k.jpg", b"x")]
    for split in ("train", "val"):
        (tmp_path / "set" / split).mkdir(parents=True)
        (tmp_path / "set" / split / "s.tar").write_bytes(tar_of(littered))
    (tmp_path / "set" / "val" / "classes.json").write_text('["one"]')
    made = shards("index", "set")
    assert made == "train: 1 sample of 2 classes in 1 shard\nval: 1 sample of 2 classes in 1 shard\n"
    counted = shards("stats", "set", "--classes", "--json")  # of two classes one has a name
    assert json.loads(counted) == {"0": {"set/train": 0, "set/val": 0}, "1": {"set/train": 1, "set/val": 1}}
    assert "one" in shards("stats", "set/val", "--classes")


def test_the_image_of_a_sample_with_two_is_named(shards, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "s.tar").write_bytes(tar_of([*pair("k", b"x", 1), ("k.png", b"mask")]))
    assert "has 2 images: jpg, png" in shards("index", "t", code=1)
    assert shards("index", "t", "--image-key", "png") == "1 sample of 2 classes in 1 shard\n"
