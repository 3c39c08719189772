"""Which folders are splits: by the names that data sets give them, or refused with the choice."""

import pytest

from rsb_cluster.data.sources import open_set
from rsb_cluster.errors import ConfigError
from tests.unit import formats


def split_folders(path, *names):
    for name in names:
        for i, label in enumerate(("cat", "dog")):
            formats.write(path / name / label / "0.jpg", formats.picture(i))
    return str(path)


def folders_of(sources):
    return {name: str(source.folder.name) for name, source in sources.items()}


@pytest.mark.parametrize(
    ("names", "val"),
    [
        (("train", "valid"), "valid"),
        (("train", "validation"), "validation"),
        (("train", "test"), "test"),
        (("training", "testing"), "testing"),
        (("training", "evaluation"), "evaluation"),
        (("Train", "Val"), "Val"),
        (("train", "valid", "test"), "valid"),
        (("train", "val", "valid"), "val"),
    ],
)
@pytest.mark.parametrize("extra", [(), ("notes/about",)])
def test_splits_are_found_by_their_usual_names(tmp_path, names, val, extra):
    opened = open_set(split_folders(tmp_path, *names, *extra))
    assert folders_of(opened) == {"train": names[0], "val": val}
    assert opened["train"].classes == opened["val"].classes == ("cat", "dog")
    assert any("read from" in note for note in opened["val"].notes) == (val != "val")
    beside = {*names, *(name.split("/")[0] for name in extra)} - {names[0], val}
    assert [note for note in opened["train"].notes if "beside" in note] == (
        [f"left out, beside the splits: {len(beside)} ({', '.join(sorted(beside))})"] if beside else []
    )
    for split, name in (("train", names[0]), ("val", val)):
        assert folders_of(open_set(str(tmp_path), split=split)) == {split: name}


def test_a_folder_of_one_split_is_that_split(tmp_path):
    assert open_set(split_folders(tmp_path / "a", "val"), split="val")["val"].classes == ("cat", "dog")
    assert open_set(split_folders(tmp_path / "b", "train"), split="train")["train"].classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (("train",), None, "no folder for val, .*To make train alone, add --split train"),
        (("train",), "val", "no folder for val, .*To make train alone, add --split train"),
        (("test",), None, "no folder for train, .*To make val alone, add --split val"),
        (("train", "valid", "dev"), None, "2 folders that may be val: dev, valid. Call the one to use val"),
        (("train", "training", "test"), None, None),
        (("Train", "training", "test"), None, "2 folders that may be train"),
        (("images/cats", "images/dogs"), "train", r"has one folder, images, .*: cats, dogs\. .* give .*/images\."),
    ],
)
def test_what_is_unclear_is_refused_with_the_choice(tmp_path, names, split, message):
    split_folders(tmp_path, *names)
    if message is None:
        assert folders_of(open_set(str(tmp_path), split=split))["train"] == "train"
        return
    with pytest.raises(ConfigError, match=message):
        open_set(str(tmp_path), split=split)


def test_folders_of_images_that_are_called_like_splits_are_no_classes(tmp_path):
    for name in ("train", "valid"):
        formats.write(tmp_path / name / "0.jpg", formats.picture(0))
    for split in (None, "train"):
        with pytest.raises(ConfigError, match=r"train has no sub-folders.*\n.*in no class folder: 1 \(0\.jpg\)"):
            open_set(str(tmp_path), split=split)


def test_an_image_beside_the_classes_does_not_make_a_split_a_class(tmp_path):
    split_folders(tmp_path, "train", "valid")
    formats.write(tmp_path / "train" / "loose.jpg", formats.picture(9))
    opened = open_set(str(tmp_path))
    assert opened["train"].classes == ("cat", "dog")
    assert opened["train"].notes == ("left out, in no class folder: 1 (loose.jpg)",)


@pytest.mark.parametrize("wrapper", ["set", "a/b"])
def test_a_folder_around_the_splits_is_entered(tmp_path, wrapper):
    split_folders(tmp_path / wrapper, "train", "val")
    (tmp_path / "__MACOSX").mkdir()
    opened = open_set(str(tmp_path))
    assert len(opened["train"]) == len(opened["val"]) == 2
    assert opened["val"].notes == (f"read from {tmp_path / wrapper / 'val'}",)


def test_a_class_may_be_called_like_a_split(tmp_path):
    for name in ("bus", "train"):
        formats.write(tmp_path / name / "0.jpg", formats.picture(0))
    for split in ("train", "val"):
        assert open_set(str(tmp_path), split=split)[split].classes == ("bus", "train")


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("training_set", "test_set"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("Training Data", "Validation Data"),
        ("TrainImages", "TestImages"),
        ("trainset", "valset"),
        ("train2017", "val2017"),
    ],
)
def test_folders_with_the_words_of_splits_are_no_classes(tmp_path, train, val):
    split_folders(tmp_path, train, val)
    for split in (None, "train", "val"):
        with pytest.raises(ConfigError, match=r"have the names of splits.*DEST --split train; .*DEST --split val"):
            open_set(str(tmp_path), split=split)
    for split, folder in (("train", train), ("val", val)):  # as it says
        assert open_set(str(tmp_path / folder), split=split)[split].classes == ("cat", "dog")
    chosen = [train.split("/")[0], val.split("/")[0]]
    assert len(open_set(str(tmp_path), split="train", classes=chosen)["train"]) == 4


def test_splits_in_the_classes_are_not_made_one(tmp_path):
    for name in ("cat/train", "cat/Test", "dog/train", "dog/Test"):
        formats.write(tmp_path / name / "0.jpg", formats.picture(0))
    for split in (None, "train"):
        with pytest.raises(ConfigError, match=r"hold splits, .*: cat/train, cat/Test\. Put the splits above"):
            open_set(str(tmp_path), split=split)


def test_shards_in_place_of_images_say_which_command_takes_them(tmp_path):
    formats.write(tmp_path / "a.tar", b"x")
    with pytest.raises(ConfigError, match=r"has no sub-folders.* run: rsb-cluster shards index "):
        open_set(str(tmp_path), split="train")


def test_a_path_that_is_no_folder_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no folder .*/nowhere"):
        open_set(f"{tmp_path}/nowhere")
    formats.write(tmp_path / "images.zip", b"PK")
    with pytest.raises(ConfigError, match=r"images\.zip is no folder.* unpack it"):
        open_set(f"{tmp_path}/images.zip")
