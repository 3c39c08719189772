"""A shard is stored once for all, whole and checked or not at all; the cache keeps to its limit and does no harm."""

import fcntl
import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rsb_cluster.data.cache import ShardCache
from rsb_cluster.data.indexing import build_index
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.errors import DataError, MissingError
from rsb_cluster.storage.store import Store
from rsb_cluster.storage.transfer import Transfer, TransferCancelled
from tests.command import ROOT
from tests.servers.daemons import GUARD_S, poll
from tests.unit.tars import pair, store_of, tar_of

MIB = 1 << 20


class Counted(Store):
    """A store that notes which files are streamed from it."""

    def __init__(self, url):
        super().__init__(url)
        self.streamed = []

    def stream(self, path, *args, **kwargs):
        self.streamed.append(path)
        return super().stream(path, *args, **kwargs)


@pytest.fixture
def store(tmp_path):
    return Counted(tmp_path / "store")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def put(store, name, content):
    """Write a shard and return what `ShardCache.open` wants to know of it."""
    store.write_bytes(name, content)
    return name, hashlib.sha256(content).hexdigest(), len(content)


def content_of(cache, store, shard):
    file = cache.open(store, *shard)
    if file is None:
        return None
    with file:
        return file.read()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def held(folder, shards):
    return [key for key, shard in shards.items() if (folder / f"{shard[1]}.shard").exists()]


def test_a_shard_is_read_from_the_store_once(store, folder):
    shard = put(store, "a.tar", os.urandom(3 * MIB + 7))
    for cache in (ShardCache(folder, 9 * MIB), ShardCache(folder, 9 * MIB)):
        for _ in range(2):
            assert content_of(cache, store, shard) == store.read_bytes("a.tar")
    assert store.streamed == ["a.tar"]
    assert names(folder) == [f"{shard[1]}.shard"]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_replaced_shard_and_one_of_another_set_are_not_taken_for_it(store, folder):
    cache = ShardCache(folder, 9 * MIB)
    old = put(store, "a.tar", b"old" * 1000)
    content_of(cache, store, old)
    new = put(store, "a.tar", b"new" * 1000)
    assert content_of(cache, store, new) == b"new" * 1000
    assert content_of(cache, store, old) == b"old" * 1000, "who has the old index gets the old shard"


def test_a_shard_that_is_not_what_the_index_says_is_refused_and_not_kept(store, folder):
    cache = ShardCache(folder, 9 * MIB)
    name, sha256, size = put(store, "a.tar", b"old" * 1000)
    message = rf"^{store.url}/a\.tar was replaced or damaged after indexing: its SHA-256 is"
    for content in (b"new" * 1000, b"old" * 999, b""):
        store.write_bytes("a.tar", content)
        with pytest.raises(DataError, match=message):
            cache.open(store, name, sha256, size)
    with pytest.raises(MissingError):
        cache.open(store, "b.tar", sha256, size)
    assert names(folder) == []


def test_what_was_used_longest_ago_goes_first(store, folder):
    cache = ShardCache(folder, 3 * MIB)
    shards = {key: put(store, f"{key}.tar", key.encode() * MIB) for key in "abcdef"}
    for key in "abc":
        content_of(cache, store, shards[key])
        time.sleep(0.02)  # a file's time is as fine as the kernel's tick
    content_of(cache, store, shards["a"])
    time.sleep(0.02)
    content_of(cache, store, shards["d"])
    assert held(folder, shards) == ["a", "c", "d"]
    time.sleep(0.02)
    content_of(cache, store, shards["e"])
    assert held(folder, shards) == ["a", "d", "e"]
    large = put(store, "large.tar", b"L" * (2 * MIB + 1))
    content_of(cache, store, large)
    assert held(folder, shards | {"large": large}) == ["large"]


def test_a_shard_that_is_too_large_is_left_in_the_store(store, folder):
    cache = ShardCache(folder, MIB)
    kept = put(store, "a.tar", b"a" * MIB)
    content_of(cache, store, kept)
    assert cache.open(store, *put(store, "b.tar", b"b" * (MIB + 1))) is None
    assert content_of(cache, store, kept) == b"a" * MIB
    assert store.streamed == ["a.tar"], "and has not driven out the others"


def test_who_reads_a_shard_goes_on_when_it_is_removed(store, folder):
    cache = ShardCache(folder, MIB)
    with cache.open(store, *put(store, "a.tar", b"a" * MIB)) as file:
        content_of(cache, store, put(store, "b.tar", b"b" * MIB))
        assert len(names(folder)) == 1
        assert file.read() == b"a" * MIB


def test_unfinished_files_of_the_dead_are_removed_and_those_of_the_living_are_not(store, folder):
    folder.mkdir()
    shard = put(store, "a.tar", b"a" * MIB)
    dead, alive, late = (f"{letter * 64}.part" for letter in "def")
    (folder / dead).write_bytes(b"x" * MIB)
    (folder / f"{shard[1]}.part").write_bytes(b"b" * MIB)
    (folder / alive).write_bytes(b"x")
    with (folder / alive).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cache = ShardCache(folder, 2 * MIB)
        assert names(folder) == [alive]
        (folder / late).write_bytes(b"x" * MIB)
        (folder / f"{shard[1]}.part").write_bytes(b"b" * (3 * MIB))
        assert content_of(cache, store, shard) == b"a" * MIB
        assert set(names(folder)) == {f"{shard[1]}.shard", alive}


def test_files_of_others_in_its_folder_are_not_its_own(store, folder):
    """A download of a browser is called so, too; and a folder may be one that others use."""
    folder.mkdir()
    theirs = {"film.part": b"f" * MIB, "sea.shard": b"s" * MIB, f"{'a' * 63}.part": b"x"}
    for name, content in theirs.items():
        (folder / name).write_bytes(content)
    cache = ShardCache(folder, MIB)
    for name in ("a.tar", "b.tar"):
        assert content_of(cache, store, put(store, name, name.encode() * 1000)) is not None
    assert {name: (folder / name).read_bytes() for name in theirs} == theirs


PROCESS = """
import sys, time
from pathlib import Path
from rsb_cluster.data.cache import ShardCache
from rsb_cluster.storage.store import Store
url, folder, log, pause_s, name, sha256, size = sys.argv[1:]
class Slow(Store):
    def stream(self, path, *args, **kwargs):
        for content in super().stream(path, *args, chunk=1 << 16, **kwargs):
            with open(log, "a") as file:
                file.write(f"{len(content)}\\n")
            yield content
            time.sleep(float(pause_s))
cache = ShardCache(Path(folder), 1 << 30)
print("up", flush=True)
sys.stdin.readline()
with cache.open(Slow(url), name, sha256, int(size)) as file:
    print(file.read(4).decode(), flush=True)
"""


def start(store, folder, log, pause_s, shard):
    argv = [sys.executable, "-c", PROCESS, store.url, str(folder), str(log), str(pause_s), *map(str, shard)]
    return subprocess.Popen(
        argv, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def streamed(log):
    return sum(map(int, log.read_text().split())) if log.exists() else 0


def test_processes_and_threads_download_a_shard_once(store, folder, tmp_path):
    shard = put(store, "a.tar", b"good" * (MIB // 4))
    log = tmp_path / "log"
    children = [start(store, folder, log, 0.01, shard) for _ in range(3)]
    for child in children:
        assert child.stdout.readline() == "up\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    assert poll(lambda: streamed(log), interval=0.005)
    cache = ShardCache(folder, 1 << 30)
    contents = []
    threads = [threading.Thread(target=lambda: contents.append(content_of(cache, store, shard))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for child in children:
        assert child.communicate(timeout=GUARD_S)[0] == "good\n"
        assert child.returncode == 0
    for thread in threads:
        thread.join(10)
    assert contents == [b"good" * (MIB // 4)] * 3
    assert streamed(log) == MIB
    assert store.streamed == []


def test_threads_of_one_process_download_a_shard_once(store, folder):
    shard = put(store, "a.tar", b"good" * MIB)
    cache = ShardCache(folder, 1 << 30)
    contents = []
    threads = [threading.Thread(target=lambda: contents.append(content_of(cache, store, shard))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert contents == [b"good" * MIB] * 8
    assert store.streamed == ["a.tar"]


def test_another_takes_over_from_a_process_that_is_killed(store, folder, tmp_path):
    shard = put(store, "a.tar", b"good" * (MIB // 4))
    log = tmp_path / "log"
    with start(store, folder, log, 30, shard) as child:
        child.stdin.write("go\n")
        child.stdin.flush()
        assert poll(lambda: streamed(log), interval=0.005)
        cache = ShardCache(folder, 1 << 30)
        assert names(folder) == [f"{shard[1]}.part"], "it is being written"
        contents = []
        waiting = threading.Thread(target=lambda: contents.append(content_of(cache, store, shard)))
        waiting.start()
        time.sleep(0.2)
        assert store.streamed == contents == [], "who wants it waits"
        child.kill()
    waiting.join(5)
    assert contents == [b"good" * (MIB // 4)]
    assert names(folder) == [f"{shard[1]}.shard"]


def test_who_waits_for_another_can_be_cancelled(store, folder):
    shard = put(store, "a.tar", b"good")
    cache = ShardCache(folder, MIB)
    part = folder / f"{shard[1]}.part"
    with part.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        transfer = Transfer()
        threading.Timer(0.1, transfer.cancel).start()
        with pytest.raises(TransferCancelled):  # the other does not let go of it
            cache.open(store, *shard, transfer)


def test_a_cancelled_download_leaves_nothing(store, folder):
    cache = ShardCache(folder, MIB)
    transfer = Transfer()
    transfer.cancel()
    with pytest.raises(TransferCancelled):
        cache.open(store, *put(store, "a.tar", b"good"), transfer)
    assert names(folder) == []


# --- under a reader -------------------------------------------------------------------------------------------------


@pytest.fixture
def data_set(tmp_path):
    rng = np.random.default_rng(0)
    store = store_of(tmp_path / "set")
    for name in "abc":
        members = [m for i in range(9) for m in pair(f"{name}{i}", rng.bytes(30_000), i)]
        store.write_bytes(f"{name}.tar", tar_of(members))
    index = build_index(store)
    return store, index, ShardReader(store, index).read(np.arange(27))


def test_a_reader_with_a_cache_reads_the_same(data_set, folder):
    store, index, expected = data_set
    cache = ShardCache(folder, 1 << 30)
    first, second = (ShardReader(store, index, cache=cache) for _ in range(2))
    some = np.array([1, 2, 5, 20])
    assert first.read(some) == {n: expected[n] for n in some.tolist()}
    assert (first.requests, first.bytes_read) == (2, index.shard_bytes[0] + index.shard_bytes[2]), "two whole shards"
    assert second.read(np.arange(27)) == expected
    assert (second.requests, second.bytes_read) == (1, index.shard_bytes[1])
    assert second.bytes_cached == index.shard_bytes.sum()


def test_a_copy_that_was_damaged_is_not_used(data_set, folder, caplog):
    store, index, expected = data_set
    reader = ShardReader(store, index, cache=ShardCache(folder, 1 << 30))
    reader.read(np.arange(27))
    copies = [folder / f"{sha256}.shard" for sha256 in index.shard_sha256]
    copies[0].write_bytes(bytes(index.shard_bytes[0]))  # the right size, and zeros: a node that lost power
    copies[1].write_bytes(copies[1].read_bytes()[:1000])
    assert reader.read(np.arange(27)) == expected
    assert "is damaged; reading it from the store instead" in caplog.text
    assert reader.read(np.arange(27)) == expected
    assert all(hashlib.sha256(p.read_bytes()).hexdigest() == p.stem for p in copies), "and they are replaced"


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_a_full_disk_ends_the_cache_with_one_warning(data_set, folder, caplog):
    store, index, expected = data_set
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], check=True)
    try:
        reader = ShardReader(store, index, cache=ShardCache(folder, 1 << 30))
        for _ in range(2):
            assert reader.read(np.arange(27)) == expected
        assert len(warnings_of(caplog)) == 1
        assert f"cannot write to the shard cache {folder}: [Errno 28] No space left" in caplog.text
        assert len(names(folder)) == 1, "what was stored is still used, and nothing half-written is left"
        assert reader.bytes_cached == 2 * index.shard_bytes[0]
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("where", ["a file", "read-only"])
def test_a_folder_that_cannot_be_written_ends_the_cache_with_one_warning(data_set, tmp_path, caplog, where):
    store, index, expected = data_set
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" if where == "a file" else Path("/proc/cache")
    reader = ShardReader(store, index, cache=ShardCache(folder, 1 << 30))
    assert reader.read(np.arange(27)) == reader.read(np.arange(27)) == expected
    assert len(warnings_of(caplog)) == 1


def test_the_folder_may_be_named_by_variables_of_the_node(folder, monkeypatch, caplog):
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    monkeypatch.chdir(folder.parent)
    ShardCache(Path("$TMPDIR/shards"), 1)
    ShardCache(Path("${SLURM_TMPDIR}/shards"), 1)
    assert (folder / "shards").is_dir() and not any(path.name.startswith("$") for path in folder.parent.iterdir())
    assert [record.getMessage() for record in caplog.records] == [
        "cannot write to the shard cache ${SLURM_TMPDIR}/shards: [Errno 2] ${SLURM_TMPDIR} is not set on this node. "
        "Continuing without it."
    ]


def test_a_folder_that_vanishes_ends_the_cache_with_one_warning(data_set, folder, caplog):
    store, index, expected = data_set
    reader = ShardReader(store, index, cache=ShardCache(folder, 1 << 30))
    folder.rmdir()
    assert reader.read(np.arange(27)) == expected
    assert len(warnings_of(caplog)) == 1
