"""An index is the same whoever builds it; a damaged one is refused."""

import hashlib
import json
import zipfile

import numpy as np
import pytest

from rsb_cluster.data.index import INDEX_NAME, ShardIndex, build_index, load_index
from rsb_cluster.errors import DataError
from rsb_cluster.storage.store import Store
from tests.unit.tars import WHOLE, pair, store_of, tar_of


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


def equal(one: ShardIndex, other: ShardIndex):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ShardIndex.__dataclass_fields__)


def test_the_index_is_loaded_as_it_was_built_and_cannot_be_changed(tmp_path):
    store = store_of(tmp_path, a=tar_of(pair("a", b"a", 1) + pair("b", b"b", 0)), b=tar_of(pair("c", b"c", 2)))
    built, loaded = build_index(store), load_index(store)
    assert equal(built, loaded)
    assert loaded.digest == hashlib.sha256((tmp_path / INDEX_NAME).read_bytes()).hexdigest()
    for array in (loaded.labels, loaded.offsets, loaded.image_sizes, loaded.shard_start):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_the_same_shards_give_the_same_index_file(tmp_path):
    content = tar_of(pair("a", b"a", 1))
    first, second = store_of(tmp_path / "1", s=content), store_of(tmp_path / "2", s=content)
    assert build_index(first).digest == build_index(second).digest
    assert first.read_bytes(INDEX_NAME) == second.read_bytes(INDEX_NAME)
    with zipfile.ZipFile(tmp_path / "1" / INDEX_NAME) as file:
        # A zip entry's time has steps of two seconds: comparing two files made at once would not show it.
        assert {info.date_time for info in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
    # The digest is in the name of every run, so the file's format must not change unnoticed.
    assert first.read_bytes(INDEX_NAME).count(b"PK\x03\x04") == 10


def test_several_processes_give_the_same_index_and_report_progress(tmp_path):
    store = store_of(tmp_path, **{f"s{i}": tar_of(pair(f"k{i}", b"x" * i + b"y", i)) for i in range(5)})
    alone, steps = build_index(store), []
    together = build_index(store, workers=2, progress=lambda done, total: steps.append((done, total)))
    assert equal(alone, together)
    assert steps == [(i, 5) for i in range(1, 6)]
    store.write_bytes("s3.tar", b"junk" * 500)
    with pytest.raises(DataError, match=r"s3\.tar is not a complete tar"):
        build_index(store, workers=2)


def test_a_folder_without_shards_is_refused_with_a_hint(tmp_path):
    store = Store(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no \*\.tar files in .*nowhere.*shards make"):
        build_index(store)
    store.write_bytes("a.tar.gz", b"")
    with pytest.raises(DataError, match=r"Unpack a\.tar\.gz"):
        build_index(store)


def test_a_missing_index_says_how_to_make_it(tmp_path):
    with pytest.raises(DataError, match=rf"no index.*rsb-cluster shards index {tmp_path}"):
        load_index(Store(tmp_path))
    build_index(store_of(tmp_path / "train", s=WHOLE))
    with pytest.raises(DataError, match=rf"did you mean {tmp_path}/train\?"):
        load_index(Store(tmp_path))


def test_an_index_damaged_anywhere_is_refused_or_unchanged(tmp_path):
    store = store_of(tmp_path, s=WHOLE)
    before = build_index(store)
    content = store.read_bytes(INDEX_NAME)
    refused = 0
    for position in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[position] ^= 0x41
        store.write_bytes(INDEX_NAME, damaged)
        try:
            after = load_index(store)
        except DataError as error:
            refused += 1
            assert "index.npz is damaged" in str(error)
        else:  # a byte that has no meaning, as in a zip entry's date; the digest still differs
            assert after.digest != before.digest
            assert all(
                np.array_equal(getattr(before, name), getattr(after, name))
                for name in ShardIndex.__dataclass_fields__
                if name != "digest"
            )
    assert refused > len(content) / 5 / 2
    for stop in (0, 10, len(content) // 2, len(content) - 1):
        store.write_bytes(INDEX_NAME, content[:stop])
        with pytest.raises(DataError, match=r"index\.npz is damaged"):
            load_index(store)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("offsets", [1, 3072]),
        ("offsets", [0]),
        ("stops", [3072, 1 << 40]),
        ("image_sizes", [0, 1]),
        ("image_offsets", [0, 3584]),
        ("labels", [0, 7]),
        ("labels", [0, -1]),
        ("shard_start", [0, 1]),
        ("key_starts", [0, 2, 1]),
        ("shard_bytes", [1, 2]),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(tmp_path, name, value):
    store = store_of(tmp_path, s=WHOLE)
    build_index(store)
    with np.load(tmp_path / INDEX_NAME) as file:
        arrays = {key: file[key] for key in file.files}
    arrays[name] = np.array(value, dtype=arrays[name].dtype)
    np.savez(tmp_path / INDEX_NAME, **arrays)
    with pytest.raises(DataError, match=r"index\.npz is damaged"):
        load_index(store)


@pytest.mark.parametrize(
    "change",
    [{"shards": ["../s.tar"]}, {"shards": ["/etc/s.tar"]}, {"sha256": ["../../" + "0" * 64]}, {"sha256": ["0" * 63]}],
    ids=str,
)
def test_an_index_whose_names_leave_the_folder_is_refused(tmp_path, change):
    """The checksum is the name of the shard's copy in a node's cache."""
    store = store_of(tmp_path, s=WHOLE)
    build_index(store)
    with np.load(tmp_path / INDEX_NAME) as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(arrays["meta"].tobytes()) | change
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    np.savez(tmp_path / INDEX_NAME, **arrays)
    with pytest.raises(DataError, match=r"index\.npz is damaged: it names a shard in another folder"):
        load_index(store)


def test_a_pickle_in_the_index_is_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    np.savez(tmp_path / INDEX_NAME, meta=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match=r"index\.npz is damaged.*allow_pickle"):
        load_index(Store(tmp_path))


def test_an_index_of_imagenets_size_loads_in_a_second(tmp_path):
    from rsb_cluster.data.index import _pack
    from rsb_cluster.data.scan import ShardScan

    n, per_shard = 1_281_167, 10_000
    scans = []
    for start in range(0, n, per_shard):
        count = min(per_shard, n - start)
        at = np.arange(count, dtype=np.int64) * 120_320
        spans = np.stack([at, at + 120_320, at + 512, np.full(count, 110_000)], axis=1)
        keys = tuple(b"n%08d/n%08d_%05d" % (i % 1000, i % 1000, i) for i in range(start, start + count))
        scans.append(
            ShardScan(count * 120_320 + 1024, "0" * 64, keys, (np.arange(count) % 1000).astype(np.int32), spans)
        )
    content = _pack([f"{i:06d}.tar" for i in range(len(scans))], scans, ())
    (tmp_path / INDEX_NAME).write_bytes(content)
    assert len(content) < 100e6
    index = load_index(Store(tmp_path))
    assert index.num_samples == n
    assert index.key(n - 1) == "n00000166/n00000166_1281166"
