"""Names that look the same are found to be, and are shown with the bytes in which they differ."""

from rsb_cluster.data.spelling import same_name, spelled


def test_accents_in_two_spellings_are_one_name():
    assert same_name("cafe\u0301") == same_name("caf\xe9") != same_name("cafe")
    assert same_name("caf\udce9") == "caf\udce9"  # not UTF-8
    assert [spelled("cat"), spelled("\xe9")] == ["cat", "\xe9 (b'\\xc3\\xa9')"]
