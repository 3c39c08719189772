"""An index is the same whoever makes it, and none is made of what is not whole."""

import os
import socket
from pathlib import Path

import pytest

from rsb_cluster.data.index import INDEX_NAME, load_index
from rsb_cluster.data.indexing import build_index
from rsb_cluster.errors import DataError, StorageError
from rsb_cluster.storage.store import Store
from tests.unit.tars import pair, store_of, tar_of


def test_class_names_come_from_the_argument_or_the_folder(tmp_path):
    store = store_of(tmp_path, s=tar_of(pair("a", b"a", 1)))
    store.write_json("classes.json", ["cat", "dog", "ü"])
    index = build_index(store)
    assert index.classes == ("cat", "dog", "ü")
    assert index.num_classes == 3
    assert load_index(store).classes == index.classes
    named = build_index(store, classes=["only"])
    assert named.classes == ("only",)
    assert named.num_classes == 2
    store.write_json("classes.json", {"0": "cat"})
    with pytest.raises(DataError, match=r"classes\.json is not a list"):
        build_index(store)


def test_several_processes_give_the_same_index_and_report_progress(tmp_path):
    store = store_of(tmp_path, **{f"s{i}": tar_of(pair(f"k{i}", b"x" * i + b"y", i)) for i in range(5)})
    build_index(store)
    alone, steps = store.read_bytes(INDEX_NAME), []
    store.delete_file(INDEX_NAME)
    build_index(store, workers=2, progress=lambda done, total: steps.append((done, total)))
    assert store.read_bytes(INDEX_NAME) == alone
    assert steps == [(i, 5) for i in range(1, 6)]
    store.write_bytes("s3.tar", b"junk" * 500)
    with pytest.raises(DataError, match=r"s3\.tar is not a complete tar"):
        build_index(store, workers=2)


def test_a_folder_without_shards_is_refused_with_what_to_do(tmp_path):
    def hint(path: Path) -> str:
        with pytest.raises(DataError, match=r"there are no \*\.tar files in ") as caught:
            build_index(Store(path))
        return str(caught.value).partition(str(path))[2]

    assert hint(tmp_path / "no" / "where") == ". There is no such folder: check the path."
    assert hint(tmp_path) == ". Make shards: rsb-cluster shards make"
    assert hint(tmp_path / "{0..3}.tar") == f". Name their folder: {tmp_path}"
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "a.tar.gz").touch()
    assert hint(tmp_path).startswith(". Unpack valid/a.tar.gz to a plain .tar first")
    (tmp_path / "b.tgz").touch()
    assert hint(tmp_path).startswith(". Unpack b.tgz to a plain .tar first")
    assert hint(tmp_path / "b.tgz") == f". Name their folder: {tmp_path}"
    (tmp_path / "b.tgz").rename(tmp_path / "A.TAR")
    assert hint(tmp_path) == ". Call A.TAR so: shards are files whose names end with .tar."


@pytest.mark.parametrize("kind", ["pipe", "loop", "socket", "folder", "nowhere"])
def test_what_is_called_like_a_shard_and_is_no_file_is_never_waited_for(tmp_path, kind):
    store, odd = store_of(tmp_path, a=tar_of(pair("a", b"a", 1))), tmp_path / "b.tar"
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(odd))
    elif kind == "folder":
        odd.mkdir()
        assert build_index(store).shards == ("a.tar",)
        return
    else:
        odd.symlink_to("b.tar" if kind == "loop" else "/nowhere.tar")
    with pytest.raises(StorageError, match=r"b\.tar.*(remove it|Check the path)"):
        build_index(store)
