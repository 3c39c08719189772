"""Reading from a real S3 server through a proxy that breaks the connection: the right bytes, or a clear error soon.

By https, as from most servers: a connection that breaks does so within TLS, too. By http the same code reads.
"""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from rsb_cluster.data.ahead import ReadAhead
from rsb_cluster.data.cache import ShardCache
from rsb_cluster.data.image_files import IMAGE_EXTENSIONS
from rsb_cluster.data.indexing import build_index
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.errors import DataError, MissingError, StorageError
from rsb_cluster.storage import s3 as s3_module
from rsb_cluster.storage.store import Store
from rsb_cluster.storage.transfer import Transfer
from tests.command import ROOT
from tests.servers.daemons import GUARD_S, poll
from tests.servers.proxy import Fault, FaultyProxy
from tests.unit.tars import FORMATS, ODD, image, pair, tar_of
from tests.unit.threads import threads_named
from tests.unit.train.input.node import children, decoders, wait_until_gone
from tests.unit.train.input.part import Part, recipe_of

pytestmark = pytest.mark.s3

MIB = 1 << 20
IMAGE_BYTES = 250_000
PER_SHARD = 20  # 5 MB


@pytest.fixture
def environment(s3, monkeypatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3_module, "FIRST_BACKOFF_S", 0.02)


@pytest.fixture(scope="module")
def shards():
    """Two shards, and the images in them."""
    images = [image(i, IMAGE_BYTES) for i in range(2 * PER_SHARD)]
    members = [pair(f"k{i:02d}", images[i], i % 5) for i in range(len(images))]
    return {
        name: tar_of([m for sample in members[start : start + PER_SHARD] for m in sample])
        for name, start in (("a.tar", 0), ("b.tar", PER_SHARD))
    }, images


def upload(store, shards):
    for name, content in shards[0].items():
        store.write_bytes(name, content)
    return store, build_index(store), shards[1]


@pytest.fixture(scope="module")
def uploaded(s3, shards):
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in s3.env.items():
            monkeypatch.setenv(name, value)
        return upload(Store(f"s3://{s3.make_bucket('reading')}/a set"), shards)


@pytest.fixture
def data_set(environment, uploaded):
    """A store with the two shards, their index, and the images; shared by tests."""
    return uploaded


@pytest.fixture
def own_set(environment, s3_bucket, shards):
    """The same, for one test, which may change it."""
    return upload(Store(f"s3://{s3_bucket}/own"), shards)


@pytest.fixture
def proxy(s3, environment, uploaded, monkeypatch):
    """The proxy through which stores connect."""
    with FaultyProxy(s3.plain_endpoint, matching=".tar", certificate=s3.certificate) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def read_all(data_set, reader=None):
    store, index, images = data_set
    reader = reader or ShardReader(store, index)
    read = reader.read(np.arange(index.num_samples))
    assert [read[number] for number in range(index.num_samples)] == images
    return reader


def test_samples_are_those_that_webdataset_reads(environment, s3_bucket):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    store = Store(f"s3://{s3_bucket}/odd")
    for kind, members in ODD.items():
        for format in ("gnu", "pax"):
            store.write_bytes(f"{kind} {format}.tar", tar_of(members, FORMATS[format]))
    index = build_index(store)
    expected = []
    for name in index.shards:
        expected += group_by_keys(tar_file_expander([{"url": name, "stream": io.BytesIO(store.read_bytes(name))}]))
    reader = ShardReader(store, index)
    images = reader.read(np.arange(index.num_samples))
    assert len(expected) == len(images) == index.num_samples
    for number, sample in enumerate(expected):
        assert index.key(number) == sample["__key__"]
        assert images[number] == next(sample[name] for name in sample if name in IMAGE_EXTENSIONS)
    some = np.random.default_rng(0).choice(index.num_samples, 20, replace=False)
    assert reader.read(some) == {number: images[number] for number in some.tolist()}


def test_one_streaming_request_for_each_piece(data_set, proxy):
    _, index, _ = data_set
    reader = read_all(data_set)
    whole = [(0, int(size) - 1) for size in index.shard_bytes]
    assert [(r.first, r.last) for r in proxy.gets()] == whole
    assert (reader.requests, reader.retries, reader.bytes_read) == (2, 0, index.shard_bytes.sum())
    reader.read(np.array([3, 4, 22]))
    assert [(r.first, r.last) for r in proxy.gets()[2:]] == [
        (index.image_offsets[3] - 512, index.image_offsets[4] + IMAGE_BYTES - 1),
        (index.image_offsets[22] - 512, index.image_offsets[22] + IMAGE_BYTES - 1),
    ]
    assert proxy.body_bytes == reader.bytes_read


@pytest.mark.parametrize(
    ("start", "stop"), [(0, None), (0, 10), (7, 5 * MIB), (4 * MIB, None), (5, 5), (9 * MIB, None)]
)
def test_a_stream_is_the_range(data_set, shards, start, stop):
    store, _, _ = data_set
    content = shards[0]["a.tar"]
    pieces = list(store.stream("a.tar", start, stop, chunk=300_000))
    assert b"".join(pieces) == content[start:stop]
    assert max(map(len, pieces), default=0) <= 300_000


def test_an_empty_object_is_empty(environment, s3_bucket):
    store = Store(f"s3://{s3_bucket}/own")
    store.write_bytes("empty.tar", b"")
    assert list(store.stream("empty.tar")) == []


# --- transient faults -----------------------------------------------------------------------------------------------

PASSING = {
    "closed in mid-body": [Fault(cut=2_000_000)],
    "reset in mid-body": [Fault(cut=2_000_000, reset=True)],
    "closed after the first byte": [Fault(cut=1)],
    "closed instead of an answer": [Fault(cut=0)],
    "slow down": [Fault(status=503), Fault(status=503)],
    "internal error": [Fault(status=500, code="InternalError")],
    "gateway error": [Fault(status=502, code="BadGateway")],
    "broken repeatedly": [Fault(cut=1_300_000)] * 3,
    "all of it": [Fault(status=503), Fault(cut=0), Fault(cut=1_500_000), Fault(status=500), Fault(cut=2_000_000)],
}


NOTHING_CAME = ("closed instead of an answer", "slow down", "internal error", "gateway error")


@pytest.mark.parametrize("kind", PASSING)
def test_reading_resumes_where_it_broke(data_set, proxy, kind, caplog):
    _, index, _ = data_set
    proxy.break_next(*PASSING[kind])
    reader = read_all(data_set)
    assert reader.retries == len(PASSING[kind]) == len(caplog.records)
    assert reader.requests == len(proxy.gets()) == 2 + reader.retries
    assert reader.bytes_read == index.shard_bytes.sum()
    firsts = [r.first for r in proxy.gets() if "/a.tar" in r.path]
    assert firsts == sorted(firsts)
    if kind != "reset in mid-body":  # a reset takes with it what has come and was not yet read
        assert proxy.body_bytes <= reader.bytes_read + reader.retries * (1 << 18), "nothing is asked for twice"
        assert (firsts[-1] > 0) == (kind not in NOTHING_CAME)


def test_retries_start_over_as_long_as_bytes_arrive(data_set, proxy, monkeypatch):
    monkeypatch.setattr(s3_module, "MAX_ATTEMPTS", 3)
    proxy.break_next(*[Fault(cut=1_100_000)] * 4)
    assert read_all(data_set).retries == 4


def test_a_request_to_a_silent_server_is_retried(data_set, proxy, monkeypatch):
    monkeypatch.setattr(s3_module, "READ_TIMEOUT_S", 0.5)
    proxy.break_next(Fault(wait_s=30), Fault(cut=2_000_000, stall_s=30))
    assert read_all(data_set).retries == 2


def test_a_slow_answer_is_awaited(data_set, proxy):
    proxy.break_next(Fault(wait_s=0.5), Fault(cut=1_000_000, stall_s=0.5))
    assert read_all(data_set).retries == 0


def test_a_restarting_server_is_awaited(data_set, proxy, monkeypatch):
    monkeypatch.setattr(s3_module, "FIRST_BACKOFF_S", 0.1)
    read_all(data_set)  # it takes a while to make a client
    proxy.refuse()
    threading.Timer(0.4, proxy.accept_again).start()
    assert read_all(data_set).retries >= 2


# --- permanent faults ---------------------------------------------------------------------------------------------


def test_a_server_that_stays_broken_is_an_error_after_some_retries(data_set, proxy):
    store, _, _ = data_set
    proxy.break_next(*[Fault(status=503)] * 100)
    transfer = Transfer()
    with pytest.raises(StorageError) as caught:
        list(store.stream("a.tar", transfer=transfer))
    assert str(caught.value) == f"cannot use {store.url}/a.tar: [Errno 16] broken by the proxy. Try again later."
    assert len(proxy.gets()) == transfer.requests == s3_module.MAX_ATTEMPTS
    proxy.faults.clear()
    proxy.break_next(*[Fault(cut=10)] * 100)
    with pytest.raises(StorageError, match=r"cannot use .*a\.tar: .*(10 read|Connection).* Check AWS_ENDPOINT_URL"):
        list(store.stream("a.tar"))


def test_a_server_that_is_gone_is_an_error_after_some_retries(data_set, proxy):
    proxy.refuse()
    with pytest.raises(StorageError, match=r"cannot use s3://.*/a\.tar: .*onnect.* Check AWS_ENDPOINT_URL"):
        read_all(data_set)
    proxy.accept_again()
    read_all(data_set)


@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (404, "NoSuchKey", MissingError, "there is nothing at"),
        (404, "NoSuchBucket", MissingError, "there is nothing at"),
        (403, "AccessDenied", StorageError, "not allowed to use"),
        (403, "SignatureDoesNotMatch", StorageError, "not allowed to use"),
        (400, "ExpiredToken", StorageError, "not allowed to use"),
        (409, "Odd", StorageError, "cannot use"),
    ],
)
def test_a_refusal_is_an_error_at_once(data_set, proxy, status, code, error, message):
    store, _, _ = data_set
    proxy.break_next(Fault(status=status, code=code))
    with pytest.raises(error, match=f"^{message} {store.url}/a.tar"):
        read_all(data_set)
    assert len(proxy.gets()) == 1


def test_a_missing_shard_and_a_truncated_one_are_named(own_set, shards):
    store, index, images = own_set
    store.write_bytes("a.tar", shards[0]["a.tar"][: int(index.image_offsets[7]) + 9])
    store.delete("b.tar")
    reader = ShardReader(store, index)
    assert reader.read(np.array([2, 3])) == {2: images[2], 3: images[3]}
    for numbers in (range(20), [7], [6, 7, 8], [12]):
        with pytest.raises(DataError, match=r"/a\.tar was replaced or damaged .*'k(07|12)' .* it ends.* shards verify"):
            reader.read(np.array(numbers))
    with pytest.raises(MissingError, match=r"there is nothing at s3://.*/b\.tar"):
        reader.read(np.array([30]))


def test_a_replaced_shard_is_named(own_set, shards):
    store, index, _ = own_set
    store.write_bytes("a.tar", shards[0]["b.tar"])
    for numbers in ([3], [4, 5], range(20)):
        with pytest.raises(DataError, match=r"/a\.tar was replaced .*'k0\d' .* but there is 'k2\d\.jpg'"):
            ShardReader(store, index).read(np.array(numbers))


def test_an_object_that_is_replaced_while_it_is_read_is_detected(own_set, shards, proxy):
    store, _, _ = own_set
    proxy.break_next(Fault(cut=2 * MIB))
    stream = store.stream("a.tar")
    assert next(stream) == shards[0]["a.tar"][:MIB]
    store.write_bytes("a.tar", shards[0]["b.tar"])
    with pytest.raises(StorageError, match=r"/a\.tar was replaced while it was read"):
        list(stream)
    proxy.break_next(Fault(cut=2 * MIB))
    stream = store.stream("a.tar")
    next(stream)
    store.write_bytes("a.tar", b"short")
    with pytest.raises(StorageError, match=r"/a\.tar was replaced while it was read"):
        list(stream)


def test_an_error_in_the_middle_of_an_opened_file_is_translated(environment, s3_bucket, proxy):
    store = Store(f"s3://{s3_bucket}/own")
    store.write_bytes("long.tar", bytes(20 * MIB))
    with store.open("long.tar") as file:
        assert file.read(10) == bytes(10)
        proxy.break_next(Fault(status=403, code="AccessDenied"))
        with pytest.raises(StorageError, match=rf"not allowed to use {store.url}/long.tar"):
            while file.read(MIB):
                pass


# --- on threads -----------------------------------------------------------------------------------------------------

STUCK = {
    "for an answer": [Fault(wait_s=120)] * 4,
    "for a body": [Fault(cut=1_000_000, stall_s=120)] * 4,
    "for the next try": [Fault(status=503)] * 100,
}


@pytest.mark.parametrize("kind", STUCK)
def test_close_ends_threads_that_wait_for_the_network(data_set, proxy, kind, monkeypatch):
    store, index, _ = data_set
    monkeypatch.setattr(s3_module, "FIRST_BACKOFF_S", 120)
    proxy.break_next(*STUCK[kind])
    ahead = ReadAhead(ShardReader(store, index), iter([(0, np.arange(20)), (1, np.arange(20, 40))]), 2)
    assert poll(lambda: len(proxy.gets()) == 2, interval=0.005)
    time.sleep(0.2)
    begun = time.monotonic()
    ahead.close()
    assert time.monotonic() - begun < 60, "it waits for none of these"
    assert threads_named("read-ahead") == []
    proxy.faults.clear()
    read_all(data_set)


def test_threads_read_ahead_through_faults(data_set, proxy):
    store, index, images = data_set
    faults = [Fault(status=503), Fault(cut=300_000), Fault(), Fault(cut=0), Fault(), Fault(cut=100_000, reset=True)]
    proxy.break_next(*faults * 2)
    blocks = [(start, np.arange(start, start + 5)) for start in range(0, 40, 5)]
    reader = ShardReader(store, index)
    with ReadAhead(reader, iter(blocks), 3, threads=4) as ahead:
        for start, samples in blocks:
            assert ahead.get(start) == {n: images[n] for n in samples.tolist()}
            ahead.release(start)
    assert reader.retries == 8


# --- in a decoding process ------------------------------------------------------------------------------------------

# A rank that iterates over the same batches once for each line, in a decoding process that is as patient as it says.
RANK = """
import json, os, sys
from rsb_cluster.storage import s3
from rsb_cluster.train.input.decoder_process import DecoderServer, ProcessBatches, Split
s3.FIRST_BACKOFF_S = 0.02
patience = {"asks again": (1, 9), "gives up": (1, 2), "waits": (600, 9)}
servers = {}
for name, (s3.READ_TIMEOUT_S, s3.MAX_ATTEMPTS) in patience.items():
    servers[name] = DecoderServer.start()
from rsb_cluster.data.index import load_index
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.data.shared_index import SharedIndex
from rsb_cluster.errors import StorageError
from rsb_cluster.storage.store import Store
from rsb_cluster.train.input.pixels.transforms import FastTrain
from rsb_cluster.train.input.streams import TrainStream
from tests.unit.train.input.part import recipe_of
store, recipe = Store(sys.argv[1]), recipe_of()
index = SharedIndex(load_index(store))
stream = TrainStream(
    ShardReader(store, index.index), recipe, index.index, seed=0, virtual_ranks=4, local_virtual_ranks=range(4),
    start_step=0, stop_step=2,
)
for line in sys.stdin:
    batches = ProcessBatches(
        servers[line.strip()], Split(store.url, index), stream, FastTrain(recipe), side=32, threads=1, pin=False
    )
    try:
        found = [batch.samples.tolist() for batch in batches]
    except StorageError as error:
        found = str(error)
    print(json.dumps(found), flush=True)
"""


def test_a_server_that_stalls_costs_a_decoding_process_time_or_is_an_error_and_nothing_is_left(
    environment, s3_bucket, proxy, digits
):
    store = Store(f"s3://{s3_bucket}/digits")
    for path in sorted((digits / "train").iterdir()):
        store.write_bytes(path.name, path.read_bytes())
    with subprocess.Popen(
        [sys.executable, "-c", RANK, store.url], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as rank:

        def iterate(patience):
            rank.stdin.write(f"{patience}\n")
            rank.stdin.flush()

        proxy.break_next(Fault(wait_s=600), Fault(cut=20_000, stall_s=600))
        iterate("asks again")
        drawn = [batch.samples.tolist() for batch in Part(digits, recipe_of()).batches(0, 0, 2)]
        assert json.loads(rank.stdout.readline()) == drawn and not proxy.faults
        proxy.always = Fault(wait_s=600)
        iterate("gives up")
        assert f"cannot use {store.url}" in json.loads(rank.stdout.readline()), "the rank hears of it"
        assert poll(lambda: not decoders(rank.pid) or None, GUARD_S)
        begun = len(proxy.gets())
        iterate("waits")
        assert poll(lambda: len(proxy.gets()) > begun or None, GUARD_S), "it waits for an answer"
        found = [*children(rank.pid), *decoders(rank.pid)]
        assert len(found) == 4, "three that fork, and one that waits"
        rank.kill()
    wait_until_gone(*found)


# --- with a cache ---------------------------------------------------------------------------------------------------

PROCESS = """
import hashlib, sys
from pathlib import Path
import numpy as np
from rsb_cluster.data.cache import ShardCache
from rsb_cluster.data.index import load_index
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.storage.store import Store
store = Store(sys.argv[1])
reader = ShardReader(store, load_index(store), cache=ShardCache(Path(sys.argv[2]), 1 << 30))
print("up", flush=True)
sys.stdin.readline()
print(hashlib.sha256(b"".join(reader.read(np.arange(20)).values())).hexdigest(), flush=True)
"""


def start(store, folder):
    argv = [sys.executable, "-c", PROCESS, store.url, str(folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(*children):
    for child in children:
        assert child.stdout.readline() == "up\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()


def test_processes_of_a_node_download_a_shard_once(data_set, proxy, tmp_path):
    store, index, images = data_set
    proxy.break_next(Fault(cut=2_000_000, stall_s=0.5))  # so that they meet
    children = [start(store, tmp_path / "cache") for _ in range(3)]
    go(*children)
    for child in children:
        out, _ = child.communicate(timeout=GUARD_S)
        assert (child.returncode, out.strip()) == (0, hashlib.sha256(b"".join(images[:20])).hexdigest())
    assert [(r.first, r.last) for r in proxy.gets()] == [(0, index.shard_bytes[0] - 1)]


def test_a_node_continues_if_the_downloading_process_is_killed(data_set, proxy, tmp_path):
    store, index, _ = data_set
    folder = tmp_path / "cache"
    proxy.break_next(Fault(cut=3_000_000, stall_s=60))
    with start(store, folder) as child:
        go(child)
        assert poll(lambda: proxy.body_bytes >= 3_000_000, interval=0.005)
        time.sleep(0.1)
        assert [path.suffix for path in folder.iterdir() if path.suffix] == [".part"]
        child.send_signal(signal.SIGKILL)
    reader = read_all(data_set, ShardReader(store, index, cache=ShardCache(folder, 1 << 30)))
    assert reader.requests == 2
    assert sorted(path.stem for path in folder.iterdir() if path.suffix) == sorted(index.shard_sha256)
    again = read_all(data_set, ShardReader(store, index, cache=ShardCache(folder, 1 << 30)))
    assert (again.requests, again.bytes_read, again.bytes_cached) == (0, 0, index.shard_bytes.sum())


def test_a_download_into_the_cache_resumes_where_it_broke(data_set, proxy, tmp_path):
    store, index, _ = data_set
    proxy.break_next(Fault(cut=2_000_000), Fault(status=503))
    reader = read_all(data_set, ShardReader(store, index, cache=ShardCache(tmp_path / "cache", 1 << 30)))
    assert (reader.requests, reader.retries) == (4, 2)
