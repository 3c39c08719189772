"""What tools leave beside images is known by name, in folders and in tars; and what is left out is counted."""

import pytest

from rsb_cluster.data.left_out import LeftOut, is_debris, is_debris_member, printable


@pytest.mark.parametrize("name", [".DS_Store", "._a.jpg", "Thumbs.db", "THUMBS.DB", "@eaDir", "__MACOSX", "Icon\r"])
def test_debris_is_known_by_its_name(name):
    assert is_debris(name)
    assert is_debris_member(f"./train/{name}")


@pytest.mark.parametrize("name", ["__meta__", "____", "thumbs", "@home", "lost", "cat.jpg"])
def test_other_names_are_the_users(name):
    assert not is_debris(name)
    assert not is_debris_member(f"./.cache/{name}")


def test_what_is_left_out_is_counted_with_the_first_names():
    found, more = LeftOut(), LeftOut()
    found.add("small", "a")
    for name in "bcde":
        more.add("small", name)
    more.add("large", "line\nbreak")
    found.merge(more, "s.tar: ")
    assert list(found.notes()) == [
        "left out, small: 5 (a, s.tar: b, s.tar: c and 2 more)",
        r"left out, large: 1 (s.tar: line\nbreak)",
    ]
    assert printable("caf\xe9") == "caf\xe9"
    assert printable("\udcff") == r"\udcff"
