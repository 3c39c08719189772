"""The commands for shards, as a user calls them; in this process, for each costs a second of imports otherwise."""

import json

import pytest

from rsb_cluster.cli import main
from rsb_cluster.data.datasets import known_data_sets
from tests.unit import formats


@pytest.fixture
def shards(tmp_path, monkeypatch, capsys):
    """Runs ``rsb-cluster shards ...`` in a folder of its own; gives what it prints, or what it says as it fails."""
    monkeypatch.chdir(tmp_path)

    def run(*args, code=0):
        with pytest.raises(SystemExit) as ended:
            main(["shards", *map(str, args)], prog_name="rsb-cluster")
        out, err = capsys.readouterr()
        assert ended.value.code == code, (out, err)
        return out if code == 0 else out + err

    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with train/ and val/ of two classes; one image of val is also in train."""
    folder = tmp_path_factory.mktemp("images")
    for part, count, seed in (("train", 20, 0), ("val", 3, 500)):
        formats.class_folders(folder / part, ("cat", "dog"), count, seed=seed, suffix="jpg")
    formats.write(folder / "val" / "cat" / "leak.jpg", formats.picture(0))
    return folder


def test_a_folder_becomes_shards_that_are_verified_and_counted(shards, images, tmp_path):
    made = shards("make", images, "data", "--shard-samples", 4, "--max-side", 8, "--workers", 1)
    assert made == "train: 40 samples of 2 classes in 10 shards\nval: 7 samples of 2 classes in 2 shards\n"
    assert shards("make", images, "data", "--shard-samples", 4, "--max-side", 8) == made
    assert "train already holds" in shards("make", images, "data", code=2)
    assert shards("verify", "data", "--decode", "--workers", 1).splitlines() == [
        "data/train: 40 samples in 10 shards, 0 problems",
        "  2 classes, with 20 to 20 images (mean 20.0)",
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


def test_known_data_sets_are_listed(shards):
    listed = shards("list")
    assert all(name in listed for name in known_data_sets())
    assert "1,281,167" in listed and "label set top1" in listed
    assert json.loads(shards("list", "--json"))[0]["samples"] == {"train": 1_281_167, "val": 50_000}


def test_a_wrong_count_is_the_users_mistake(shards, tmp_path):
    formats.imagenet_folders(tmp_path / "ilsvrc")
    command = ("make", "imagenet-1k", "data", "--root", "ilsvrc")
    assert "there are 24 images, and train of imagenet-1k has 1,281,167" in shards(*command, code=2)
    assert not (tmp_path / "data").exists()
    assert "val: 12 samples of 4 classes" in shards(*command, "--any-count")
    (tmp_path / "data" / "val" / "labels-real.json").unlink()
    assert shards("labels", "real", "data/val") == "11 of 12 images have labels 'real'\n"
    said = shards("labels", "real", "data/train", code=2)
    assert "does not name an image of ImageNet's validation set" in said


def test_a_quality_without_a_size_is_refused(shards, images):
    assert "--quality is for --max-side" in shards("make", images, "data", "--quality", 90, code=2)
