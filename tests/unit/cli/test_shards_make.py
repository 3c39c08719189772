"""`shards make`, as a user calls it."""

import shutil

from tests.unit import formats
from tests.unit.samples import contents


def test_labels_come_from_a_table(shards, images, tmp_path):
    rows = [f"{file.relative_to(images)},{file.parent.name}" for file in images.rglob("*.jpg")]
    (tmp_path / "labels.csv").write_text("\n".join(["id,name,path,label", *(f"0,a,{row}" for row in rows)]))
    command = ("make", images, "data", "--labels", "labels.csv", "--workers", 1)
    assert "Choose one with --key-column NAME" in shards(*command, code=2)
    made = shards(*command, "--key-column", "path")
    assert made == "train: 40 samples of 2 classes in 1 shard\nval: 7 samples of 2 classes in 1 shard\n"
    assert shards(*command, "--key-column", "path") == made
    assert "--key-column needs --labels" in shards("make", images, "data", "--key-column", "path", code=2)


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


def test_what_is_left_out_of_a_folder_is_said_before_shards_are_made(shards, tmp_path):
    formats.class_folders(tmp_path / "in" / "train", ("cat", "Cat", "dog"), 1, seed=0, suffix="jpg")
    formats.class_folders(tmp_path / "in" / "valid", ("cat",), 1, seed=1, suffix="jpg")
    formats.write(tmp_path / "in" / "train" / "cat" / "x.heic", b"x")
    formats.write(tmp_path / "out", b"no folder")
    said = shards("make", "./in", "out", code=2)
    assert "train: left out, .heic, which is not read: convert them, for example to PNG: 1 (cat/x.heic)" in said
    assert "val: read from in/valid" in said
    assert said.count("classes whose names differ only in case") == 1
    assert "case, spaces or accents, and are different classes here: 'Cat' and 'cat'\n" in said
