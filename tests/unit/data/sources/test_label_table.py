"""Tables of labels: which columns are meant, and what is no label."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rsb_cluster.data.sources.label_table import read_labels
from rsb_cluster.errors import ConfigError


def written(folder, text, name="labels.csv"):
    (folder / name).write_text(text)
    return folder / name


def test_numbers_stay_numbers_and_names_are_numbered_in_their_order(tmp_path):
    found = read_labels(written(tmp_path, "\ufeffPath,Label,x\na.jpg,3,\nb.jpg,0.0,\nc.jpg,,\n,1,\n\n"))
    assert (found.column, found.labels, found.classes, found.unlabelled) == ("Path", {"a.jpg": 3, "b.jpg": 0}, (), 2)
    found = read_labels(written(tmp_path, 'url\tclass\nhttp://x/"a\towl\nhttp://x/b\tcat, big\n', "labels.tsv"))
    assert found.labels == {'http://x/"a': 1, "http://x/b": 0} and found.classes == ("cat, big", "owl")
    columns = {"key": ["000", "001", "002"], "label": [2.0, None, 1.0], "jpg": [b"", b"", b""]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = read_labels(tmp_path / "t.parquet")
    assert (found.labels, found.unlabelled) == ({"000": 2, "002": 1}, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key,url,label\n0,http://x,1\n", r"several columns that may be the key: key, url;.*--key-column NAME"),
        ("key,label,class\n0,1,1\n", r"several columns that may be the label: label, class;.*--label-column NAME"),
        (
            "a,b\n0,1\n",
            r"no column of a key; its columns are a, b \(its first line\)\. Choose one",
        ),
        ("key,label\n", r"has no row with 'key' and 'label'"),
        ("", r"is empty\. Its first line has the names of the columns"),
        ("key,label\na,1\na,1\na,2\n", r"'a' has two labels, '1' and '2'"),
        ("key,label\na,1\nb,-1\n", r"'b' has the label -1; classes are numbered from 0"),
        ("key,label\na,1\nb,1500000000\n", r"'b' has the label 1500000000; .* 9,999,999 at most"),
        ("key,label\na,1\nb,0.5\n", r"'b' has the label 0\.5"),
        ('key,label\n"' + "a" * 200_000 + "\n", r"is not a table of comma-separated values"),
    ],
)
def test_what_is_unclear_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_labels(written(tmp_path, text))


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        (b"path;label\na.jpg;cat\n", "csv"),
        (b"path\tlabel\na.jpg\tcat\n", "csv"),
        (b"path,label\ra.jpg,cat\r", "csv"),
        (b"path,label\na.jpg,cat\n", "tsv"),
        ("path\tlabel\na.jpg\tcat\n".encode("utf-16"), "csv"),
        ("path,label\r\na.jpg,cat\r\n".encode("utf-8-sig"), "csv"),
    ],
)
def test_tables_of_other_programs_are_read(tmp_path, content, suffix):
    (tmp_path / f"t.{suffix}").write_bytes(content)
    found = read_labels(tmp_path / f"t.{suffix}")
    assert (found.labels, found.classes) == ({"a.jpg": 0}, ("cat",))


def test_a_label_is_never_changed_or_swallowed(tmp_path):
    (tmp_path / "latin.csv").write_bytes("path,label\na,caf\xe9\nb,caf\xe8\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"the label of 'a' is not UTF-8: caf\\udce9\. Save it as UTF-8"):
        read_labels(tmp_path / "latin.csv")
    for text in ('path,label\na,"cat\nb,dog\n', 'path,label\n"a,cat\nb,dog\n'):
        with pytest.raises(ConfigError, match=r"a line break is in .*Is a quote \(\"\) not closed"):
            read_labels(written(tmp_path, text))
    with pytest.raises(ConfigError, match=r"the row of b has more values than there are columns\. Put quotes"):
        read_labels(written(tmp_path, "path,label\na,cat,\nb,owl, big\n"))
    for value in ([0], {"x": 1}):
        pq.write_table(pa.table({"path": ["a"], "label": [value]}), tmp_path / "t.parquet")
        with pytest.raises(ConfigError, match=r"'label' holds .*, which is neither a number nor a name"):
            read_labels(tmp_path / "t.parquet")
    pq.write_table(pa.table({"path": ["a"], "label": [b"cat"]}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"no column of a label; its columns are path\. Choose"):
        read_labels(tmp_path / "t.parquet")
    for name in ("./a", "/a"):
        with pytest.raises(ConfigError, match=f"'{name}' has two labels, 'cat' and 'dog'"):
            read_labels(written(tmp_path, f"path,label\na,cat\n{name},dog\n"))


def test_the_user_chooses_columns(tmp_path):
    file = written(tmp_path, "key,url,label,class\n0,http://x,1,cat\n")
    found = read_labels(file, "url", "class")
    assert (found.labels, found.classes) == ({"http://x": 0}, ("cat",))
    with pytest.raises(ConfigError, match=r"has no column 'link'; its columns are key, url, label, class"):
        read_labels(file, "link")
    with pytest.raises(ConfigError, match=r"there is no file"):
        read_labels(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match=r"is no \.csv, \.tsv or \.parquet"):
        read_labels(written(tmp_path, "x", "labels.txt"))
    with pytest.raises(ConfigError, match=r"no complete parquet file"):
        read_labels(written(tmp_path, "x", "labels.parquet"))
