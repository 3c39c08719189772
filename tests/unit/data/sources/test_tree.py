"""Folders are walked once each, whatever links there are; nothing that a tool left there is a class or a sample."""

import os
import socket
import unicodedata

import pytest

from rsb_cluster.data.sources.folder import image_folder
from rsb_cluster.data.sources.tree import ImageTree
from rsb_cluster.errors import ConfigError
from tests.unit import formats


def keys(path):
    return sorted(entry[0] for entry in image_folder(path).entries)


@pytest.fixture
def folder(tmp_path):
    formats.class_folders(tmp_path / "in", ("cat", "dog"), 2, seed=0, suffix="jpg")
    return tmp_path / "in"


ALL = ["cat/cat_0", "cat/cat_1", "dog/dog_0", "dog/dog_1"]


def test_the_order_is_that_of_a_walk_by_name(folder):
    for name in ("cat/b/2.jpg", "cat/b/a/1.jpg", "cat/a.jpg", "cat/z.jpg", "cat/c/0.jpg"):
        formats.write(folder / name, b"x")
    walked = [
        os.path.relpath(f"{parent}/{file}", folder)
        for parent, folders, files in os.walk(folder / "cat")
        if folders.sort() is None
        for file in sorted(files)
    ]
    assert [file for file, _ in ImageTree(folder).images("cat")] == walked


@pytest.mark.parametrize("target", [".", "..", "../..", "../dog"])
def test_a_link_to_a_folder_that_is_read_anyway_is_not_followed(folder, target):
    (folder / "cat" / "self").symlink_to(target)
    assert keys(folder) == ALL
    assert image_folder(folder).notes == ("left out, a link to a folder that is read anyway: 1 (cat/self)",)


def test_folders_elsewhere_are_followed_once(folder, tmp_path):
    formats.write(tmp_path / "more" / "3.jpg", formats.picture(3))
    (tmp_path / "more" / "loop").symlink_to("..")
    for name in ("a", "b"):
        (folder / "cat" / name).symlink_to(tmp_path / "more")
    (folder / "bird").symlink_to(formats.folder_of(tmp_path / "birds", ["4.jpg"]))
    (folder / "dog" / "5.jpg").symlink_to(tmp_path / "birds" / "4.jpg")
    assert keys(folder) == ["bird/4", "cat/a/3", *ALL[:2], "dog/5", *ALL[2:]]
    (note,) = image_folder(folder).notes
    assert note == "left out, a link to a folder that is read anyway: 2 (cat/a/loop, cat/b)"


def test_images_behind_a_hidden_folder_are_read_through_a_link(folder):
    formats.folder_of(folder / ".store", ["1.jpg"])
    (folder / "cat" / "linked").symlink_to("../.store")
    assert keys(folder) == [ALL[0], ALL[1], "cat/linked/1", *ALL[2:]]


def test_one_folder_is_not_two_classes(folder, tmp_path):
    (folder / "kitty").symlink_to("cat")
    with pytest.raises(ConfigError, match=r"class folders cat and kitty .* are the same folder"):
        image_folder(folder)
    (folder / "kitty").unlink()
    formats.write(folder / "cat" / "young" / "0.jpg", b"x")
    (folder / "kitty").symlink_to("cat/young")
    with pytest.raises(ConfigError, match=r"kitty is a link to .*young, .* would have two classes"):
        image_folder(folder)


def test_names_that_look_the_same_are_refused_with_their_bytes(tmp_path):
    for form in ("NFC", "NFD"):
        formats.write(tmp_path / unicodedata.normalize(form, "caf\xe9") / "0.jpg", b"x")
    with pytest.raises(ConfigError, match=r"look the same.*b'cafe\\xcc\\x81'\) and .*b'caf\\xc3\\xa9'\)"):
        image_folder(tmp_path)


DEBRIS = ["__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", ".git", "System Volume Information", "#recycle"]


def test_what_tools_leave_is_neither_a_class_nor_a_sample(folder):
    for name in DEBRIS:
        formats.write(folder / name / "cat" / "0.jpg", formats.picture(1))
        formats.write(folder / "cat" / name / "x.jpg" / "SYNOPHOTO_THUMB_M.jpg", formats.picture(1))
    for name in ("Thumbs.db", ".DS_Store", "._cat_0.jpg", "desktop.ini"):
        formats.write(folder / name, b"x")
        formats.write(folder / "dog" / name, b"x")
    source = image_folder(folder)
    assert source.classes == ("cat", "dog")
    assert keys(folder) == ALL
    (note,) = source.notes
    assert f"hidden, or of a system or tool: {2 * (len(DEBRIS) + 4)} (" in note


def test_only_regular_files_are_opened(folder, monkeypatch):
    os.mkfifo(folder / "cat" / "pipe.jpg")
    os.mkfifo(folder / "cat" / "pipe")
    (folder / "dog" / "loop.txt").symlink_to("loop.txt")
    (folder / "dog" / "folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as opened:
        monkeypatch.chdir(folder / "dog")  # a socket's path is short
        opened.bind("s.jpg")
        assert keys(folder) == ALL
    notes = image_folder(folder).notes
    assert "left out, no regular file: 3 (cat/pipe, cat/pipe.jpg, dog/s.jpg)" in notes
    assert "left out, .txt: 1 (dog/loop.txt)" in notes


def test_a_folder_that_cannot_be_listed_is_an_error(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(ConfigError, match=r"cannot list the folder .*Permission denied"):
        ImageTree(folder).classes()
