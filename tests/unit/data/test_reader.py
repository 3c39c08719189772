"""Images are the bytes that webdataset reads; what is not as indexed is named."""

import hashlib
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsb_cluster.data.image_files import IMAGE_EXTENSIONS
from rsb_cluster.data.index import load_index
from rsb_cluster.data.indexing import build_index
from rsb_cluster.data.reader import MERGE_BYTES, ShardReader
from rsb_cluster.errors import DataError, MissingError
from rsb_cluster.storage.store import Store
from rsb_cluster.storage.transfer import Transfer, TransferCancelled
from tests.servers.web import WebServer
from tests.unit.tars import FORMATS, ODD, image, pair, read_by_webdataset, samples_of, store_of, tar_of


def everything(index):
    return np.arange(index.num_samples)


TOO_LONG_FOR_USTAR = "names around 100 bytes"


@pytest.mark.parametrize(
    ("kind", "format"), [(k, f) for k in ODD for f in FORMATS if (k, f) != (TOO_LONG_FOR_USTAR, "ustar")]
)
def test_images_are_those_that_webdataset_reads(tmp_path, kind, format):
    store = store_of(tmp_path, a=tar_of(ODD[kind], FORMATS[format]), b=tar_of(samples_of(3), FORMATS[format]))
    index = build_index(store)
    expected = read_by_webdataset(store, index.shards)
    images = ShardReader(store, index).read(everything(index))
    assert list(images) == list(range(index.num_samples)) == list(range(len(expected)))
    for number, sample in enumerate(expected):
        assert index.key(number) == sample["__key__"]
        assert images[number] == next(sample[name] for name in sample if name in IMAGE_EXTENSIONS)


def test_a_tar_without_magic_is_read(tmp_path):
    content = bytearray(tar_of(samples_of(4)))
    index = build_index(store_of(tmp_path, s=content))
    for number in range(4):
        for start in (int(index.image_offsets[number]) - 512, int(index.stops[number]) - 1024):
            header = content[start : start + 512]
            header[257:265] = bytes(8)
            header[148:156] = b"        "
            header[148:156] = b"%06o\0 " % sum(header)
            content[start : start + 512] = header
    store = store_of(tmp_path, s=content)
    index = build_index(store)
    expected = read_by_webdataset(store, index.shards)
    images = ShardReader(store, index).read(everything(index))
    assert list(images.values()) == [sample["jpg"] for sample in expected]


@given(st.lists(st.integers(0, 69), max_size=30))
def test_any_samples_in_any_order(two_shards, numbers):
    store, index, expected = two_shards
    reader = ShardReader(store, index)
    images = reader.read(np.array(numbers, dtype=np.int64))
    assert sorted(images) == sorted(set(numbers))
    assert all(images[number] == expected[number] for number in images)
    assert reader.bytes_used == sum(len(expected[number]) for number in set(numbers)) <= reader.bytes_read


def test_shards_on_a_web_server_are_read(two_shards, tmp_path):
    made, index, expected = two_shards
    here = Store(tmp_path)
    for name in made.files():
        here.write_bytes(name, made.read_bytes(name))
    with WebServer(tmp_path) as web:
        web.listings = False
        store = Store(web.url)
        assert load_index(store).digest == index.digest
        reader = ShardReader(store, load_index(store))
        some = [3, 4, 5, 39, 40, 69]
        assert reader.read(np.array(some)) == {number: expected[number] for number in some}
        assert (reader.requests, reader.retries) == (4, 0), "for each of two shards its size, and a range"
        assert list(reader.read(everything(index)).values()) == expected
        here.write_bytes(index.shards[1], here.read_bytes(index.shards[1])[:5000])
        with pytest.raises(DataError, match=r"http://.*b\.tar was replaced or damaged.*it ends at byte 5000"):
            reader.read(everything(index))


def test_one_request_for_each_contiguous_piece(tmp_path):
    big = [pair(f"k{i}", image(i, MERGE_BYTES // 2), i) for i in range(12)]
    store = store_of(tmp_path, a=tar_of([m for p in big[:8] for m in p]), b=tar_of([m for p in big[8:] for m in p]))
    index = build_index(store)

    def requests(*numbers):
        reader = ShardReader(store, index)
        reader.read(np.array(numbers, dtype=np.int64))
        return reader.requests, reader.bytes_read - reader.bytes_used

    header = 512
    step = int(index.offsets[1])
    assert requests(3) == (1, header)
    assert requests(2, 3, 4) == (1, header + 2 * (step - MERGE_BYTES // 2))
    assert requests(2, 4)[0] == 1, "a gap of one image is read over"
    assert requests(2, 4)[1] > MERGE_BYTES // 2
    assert requests(2, 5)[0] == 2, "a gap of two images is not"
    assert requests(7, 8)[0] == 2, "in two shards"
    assert requests(*range(12)) == (2, int(index.shard_bytes.sum()) - 12 * (MERGE_BYTES // 2)), "whole shards"
    assert requests() == (0, 0)


def test_images_are_read_only_views_of_one_buffer(two_shards):
    store, index, _ = two_shards
    images = ShardReader(store, index).read(np.arange(10, 20))
    assert len({id(view.obj) for view in images.values()}) == 1
    assert all(view.readonly for view in images.values())


def test_threads_share_a_reader(two_shards):
    store, index, expected = two_shards
    reader = ShardReader(store, index)
    wrong = []

    def work(seed):
        for _ in range(30):
            numbers = np.random.default_rng(seed).choice(70, 20, replace=False)
            images = reader.read(numbers)
            wrong.extend(n for n in images if images[n] != expected[n])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    alone = ShardReader(store, index)
    for seed in range(6):
        alone.read(np.random.default_rng(seed).choice(70, 20, replace=False))
    for counter in ("bytes_read", "bytes_used", "requests"):
        assert getattr(reader, counter) == 30 * getattr(alone, counter)


# --- what is not as indexed -----------------------------------------------------------------------------------------


AFTER = "was replaced or damaged after indexing: "
NEXT = r"\. Run 'rsb-cluster shards verify' on its folder\."


def fixed(keys, size=700):
    return tar_of([member for key in keys for member in pair(key, image(sum(key.encode()), size), 0)])


DAMAGE = {
    "another size": (lambda _: fixed("abcde", 800), r"sample 'b' .*there is a file of 800 bytes, not of 700"),
    "another order": (lambda _: fixed("acbde"), r"sample 'b' should be at byte \d+, but there is 'c\.jpg'"),
    "shifted": (lambda c: bytes(512) + c, r"sample 'b' .*there is no tar header"),
    "zeros": (lambda c: bytes(len(c)), r"sample 'b' .*there is no tar header"),
    "cut": (lambda c: c[:5000], r"sample 'c' .*it ends at byte 5000"),
    "empty": (lambda c: b"", r"sample 'b' .*it ends before"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_shard_that_is_not_as_indexed_is_named_with_the_key(tmp_path, kind):
    store = store_of(tmp_path, s=fixed("abcde"))
    index = build_index(store)
    damage, message = DAMAGE[kind]
    store.write_bytes("s.tar", damage(store.read_bytes("s.tar")))
    with pytest.raises(DataError, match=rf"^{tmp_path}/s\.tar {AFTER}{message}{NEXT}$"):
        ShardReader(store, index).read(np.array([1, 2, 3]))


def test_a_cut_shard_names_the_first_sample_that_is_not_whole(tmp_path):
    store = store_of(tmp_path, s=fixed("abcde"))
    index = build_index(store)
    store.write_bytes("s.tar", store.read_bytes("s.tar")[: int(index.offsets[3]) + 600])
    reader = ShardReader(store, index)
    reader.read(np.array([1, 2]))
    with pytest.raises(DataError, match=r"sample 'd' .*it ends at byte"):
        reader.read(np.array([1, 2, 3, 4]))


def test_a_missing_shard_is_missing(two_shards, tmp_path):
    _, index, _ = two_shards
    with pytest.raises(MissingError, match=r"nothing at .*/a\.tar"):
        ShardReader(store_of(tmp_path), index).read(np.arange(3))


def test_a_whole_shard_is_hashed_once(tmp_path, monkeypatch):
    store = store_of(tmp_path, s=fixed("abcde"))
    index = build_index(store)
    hashed = []
    real = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda content: hashed.append(len(content)) or real(content))
    reader = ShardReader(store, index)
    for _ in range(3):
        reader.read(np.arange(1, 5))
    assert hashed == []
    for _ in range(3):
        reader.read(np.arange(5))
    assert hashed == [index.shard_bytes[0]]


def test_a_changed_byte_of_an_image_is_found_when_the_shard_is_read_whole(tmp_path):
    store = store_of(tmp_path, s=fixed("abcde"))
    index = build_index(store)
    content = bytearray(store.read_bytes("s.tar"))
    content[int(index.image_offsets[2]) + 5] ^= 1
    store.write_bytes("s.tar", content)
    reader = ShardReader(store, index)
    reader.read(np.arange(1, 5))
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(DataError, match=rf"s\.tar {AFTER}the SHA-256 .*'a' to 'e' is now {found}{NEXT}"):
        reader.read(np.arange(5))


def test_a_cancelled_transfer_reads_no_more(two_shards):
    store, index, _ = two_shards
    transfer = Transfer()
    transfer.cancel()
    with pytest.raises(TransferCancelled):
        ShardReader(store, index).read(np.arange(3), transfer)
