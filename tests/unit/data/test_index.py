"""An index is loaded as it was written; a damaged one is refused."""

import hashlib
import io
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from rsb_cluster.data.index import INDEX_NAME, ShardIndex, content_digest, load_index
from rsb_cluster.data.indexing import build_index, write_index
from rsb_cluster.data.scan import ShardScan
from rsb_cluster.errors import DataError
from rsb_cluster.storage.store import Store
from tests.unit.tars import WHOLE, pair, store_of, tar_of


def equal(one: ShardIndex, other: ShardIndex):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ShardIndex.__dataclass_fields__)


def test_the_index_is_loaded_as_it_was_built_and_cannot_be_changed(tmp_path):
    store = store_of(tmp_path, a=tar_of(pair("a", b"a", 1) + pair("b", b"b", 0)), b=tar_of(pair("c", b"c", 2)))
    built, loaded = build_index(store), load_index(store)
    assert equal(built, loaded)
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


def of_format_1(store) -> bytes:
    """Rewrite an index as a version wrote it whose digest was that of the file; return the bytes."""
    with np.load(io.BytesIO(store.read_bytes(INDEX_NAME))) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(arrays["meta"].tobytes()) | {"format": 1}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays | {"meta": np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)})
    store.write_bytes(INDEX_NAME, buffer.getvalue())
    return buffer.getvalue()


def test_the_digest_is_of_the_data_and_not_of_their_names_or_the_file_s_format(tmp_path):
    """It is in the id of every run: it must not change unnoticed, so it is written down here."""
    content = tar_of(pair("a", b"a", 1) + pair("b", b"bb", 0))
    index = build_index(store_of(tmp_path / "1", s=content))
    assert index.digest == "c943c47e0cd5ae63be2d35f748ec220802c717b7e92ce95a9403eeec0a0003f1"
    assert build_index(store_of(tmp_path / "2", renamed=content)).digest == index.digest
    differing = [
        replace(index, labels=index.labels[::-1]),
        replace(index, num_classes=3),
        replace(index, classes=("cat", "dog")),
        replace(index, key_bytes=b"ax"),
        replace(index, image_sizes=index.image_sizes + 1),
        replace(index, image_offsets=index.image_offsets + 512),
        replace(index, shard_sha256=("0" * 64,)),
    ]
    assert len({index.digest, *map(content_digest, differing)}) == 8
    assert content_digest(replace(index, labels=index.labels.astype("<i8"))) == index.digest


def test_a_digest_of_an_earlier_format_stays_valid(tmp_path):
    content = tar_of(pair("a", b"a", 1) + pair("b", b"bb", 0))
    store = store_of(tmp_path / "1", s=content)
    new = build_index(store)
    old = of_format_1(store)
    earlier = load_index(store)
    assert earlier.digest == hashlib.sha256(old).hexdigest() != new.digest
    assert new.has_digest(earlier.digest) and earlier.has_digest(new.digest)
    assert not new.has_digest("0" * 64)
    # Indexed again, it stays as it is, and with it the ids of runs; where the data differ, it is another one.
    assert build_index(store).digest == earlier.digest
    assert store.read_bytes(INDEX_NAME) == old
    other = build_index(store_of(tmp_path / "1", t=content))
    assert other.num_samples == 4 and not other.has_digest(earlier.digest) and not earlier.has_digest(other.digest)


def test_a_missing_index_says_how_to_make_it(tmp_path):
    with pytest.raises(DataError, match=rf"no index.*rsb-cluster shards index {tmp_path}"):
        load_index(Store(tmp_path))
    build_index(store_of(tmp_path / "train", s=WHOLE))
    with pytest.raises(DataError, match=rf"did you mean {tmp_path}/train or {tmp_path}/val\?"):
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
        else:  # a byte that has no meaning, as in a zip entry's date
            assert equal(before, after)
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


def test_an_index_of_imagenets_size(tmp_path):
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
    write_index(Store(tmp_path), [f"{i:06d}.tar" for i in range(len(scans))], scans, ())
    assert (tmp_path / INDEX_NAME).stat().st_size < 100e6
    index = load_index(Store(tmp_path))
    assert index.num_samples == n
    assert index.key(n - 1) == "n00000166/n00000166_1281166"


def test_a_pickle_in_the_index_is_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    np.savez(tmp_path / INDEX_NAME, meta=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match=r"index\.npz is damaged.*allow_pickle"):
        load_index(Store(tmp_path))


@pytest.mark.parametrize("content", [b"x\n", b"", b"\x80\x04K\x01."])
def test_what_is_no_index_is_not_called_one_to_be_unpickled(tmp_path, content):
    (tmp_path / INDEX_NAME).write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged: it is no \.npz file \(\d bytes\)\. Remove it"):
        load_index(Store(tmp_path))
