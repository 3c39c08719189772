"""Lists of classes: in a text, in a file of lines, in a JSON list."""

import pytest

from rsb_cluster.config.class_list import read_class_list


def test_names_and_files_are_read(tmp_path):
    (tmp_path / "lines").write_text("a b\n\nc\r\n")
    (tmp_path / "list.json").write_text('["a b", "c"]')
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfa b\r\nc\r\n")
    for text in (tmp_path / "windows.txt", "a b,c", " a b , c,", tmp_path / "lines", tmp_path / "list.json"):
        assert read_class_list(str(text)) == ("a b", "c")


def test_many_names_are_no_path():
    names = [f"n{number:08d}" for number in range(1000)]
    assert read_class_list(",".join(names)) == tuple(names)


def test_what_is_no_list_is_said(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "dict.json").write_text("{}")
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    for text, message in (
        (tmp_path / "none.txt", "there is no file"),
        ("./none", "there is no file none"),
        (tmp_path / "empty.txt", "names no class"),
        (",", "names no class"),
        (tmp_path / "dict.json", "is not a list of names"),
        (tmp_path / "bytes.txt", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            read_class_list(str(text))
