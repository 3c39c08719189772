"""The commands for shards, as a user calls them; in this process, for each costs a second of imports otherwise."""

import json
import shutil

import pytest

from rsb_cluster.cli import main
from rsb_cluster.data.datasets import known_data_sets
from tests.unit import formats
from tests.unit.samples import contents


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


def test_a_wrong_count_is_an_error_of_usage(shards, tmp_path):
    formats.imagenet_folders(tmp_path / "ilsvrc")
    command = ("make", "imagenet-1k", "data", "--root", "ilsvrc")
    assert "found 24 images, but train of imagenet-1k has 1,281,167" in shards(*command, code=2)
    assert not (tmp_path / "data").exists()
    assert "val: 12 samples of 4 classes" in shards(*command, "--any-count")
    (tmp_path / "data" / "val" / "labels-real.json").unlink()
    assert shards("labels", "real", "data/val") == "11 of 12 images have labels 'real'\n"
    said = shards("labels", "real", "data/train", code=2)
    assert "does not name an image of ImageNet's validation set" in said


def test_a_quality_without_a_size_is_refused(shards, images):
    assert "--quality needs --max-side" in shards("make", images, "data", "--quality", 90, code=2)


def test_a_changed_image_is_named_and_remade_on_request(shards, images, tmp_path):
    shutil.copytree(images, tmp_path / "in")
    made = shards("make", "./in", "data")
    (tmp_path / "in" / "val" / "cat" / "cat_1.jpg").write_bytes(formats.picture(7, px=24))
    before = contents(tmp_path / "data")
    said = shards("make", "./in", "data", code=2)
    assert "data/val already holds" in said and "images with another size: cat/cat_1.jpg (" in said
    assert "add --remake to 'shards make'" in said
    assert contents(tmp_path / "data") == before
    assert shards("make", "./in", "data", "--remake") == made
    assert shards("make", "./in", "data", "--hash") == made
    assert contents(tmp_path / "data") != before
    assert "use one of them" in shards("make", "./in", "data", "--hash", "--remake", code=2)


def test_overwriting_files_of_others_needs_confirmation(shards, images, tmp_path):
    for name in ("train/own-0.tar", "train/notes.txt", "val/own-0.tar"):
        formats.write(tmp_path / "data" / name, b"x")
    before = contents(tmp_path / "data")
    assert "own-0.tar, which were not made by this command" in shards("make", images, "data", code=2)
    said = shards("make", images, "data", "--overwrite", code=2)
    for part in ("train", "val"):
        assert f"data/{part}: will be deleted, not written by 'shards make': own-0.tar (1 files)" in said
        assert f"own-0.tar in {tmp_path}/data/{part}" in said.splitlines()[-1]
    assert "Add --yes to delete them" in said
    assert contents(tmp_path / "data") == before
    assert "--yes needs --overwrite" in shards("make", images, "data", "--yes", code=2)
    shards("make", images, "data", "--overwrite", "--yes")
    assert {name for name in before if (tmp_path / "data" / name).exists()} == {"train/notes.txt"}
    shards("make", images, "data", "--overwrite", "--shard-samples", 9)  # what was made here needs no second word
