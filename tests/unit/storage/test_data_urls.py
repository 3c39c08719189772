"""Data at URLs that are only read: what is there, exactly, with few requests; or a sentence."""

import json
import os
import subprocess
import sys

import pytest

from rsb_cluster.errors import MissingError, StorageError
from rsb_cluster.storage import data_urls
from rsb_cluster.storage.store import Store
from tests.command import ROOT
from tests.servers.hub import Hub
from tests.servers.web import WebServer

CONTENT = bytes(range(256)) * 100


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(data_urls, "FIRST_BACKOFF_S", 0.01)


@pytest.fixture
def web(tmp_path):
    (tmp_path / "set" / "a b%20").mkdir(parents=True)
    (tmp_path / "set" / "f.tar").write_bytes(CONTENT)
    (tmp_path / "set" / "x.json").write_text('{"a": 1}')
    with WebServer(tmp_path) as server:
        yield server


def test_what_is_there_is_read(web):
    store = Store(f"{web.url}/set")
    assert store.read_bytes("f.tar") == CONTENT and store.read_json("x.json") == {"a": 1}
    assert store.names() == ["a b%20", "f.tar", "x.json"] and store.entries()["a b%20"] is False
    assert [store.exists(name) for name in ("f.tar", "g", "a b%20")] == [True, False, True]
    assert store.size("f.tar") == len(CONTENT)
    with store.open("f.tar") as file:
        file.seek(250)
        assert file.read(10) == CONTENT[250:260]


def test_ranges_are_exact_and_one_request_each(web):
    store = Store(f"{web.url}/set")
    for start, stop in ((0, 1), (10, 20), (0, 25_600), (5, 5), (25_590, 25_700), (25_600, 25_601), (30_000, 30_001)):
        before = len(web.requests)
        assert b"".join(store.stream("f.tar", start, stop, chunk=999)) == CONTENT[start:stop]
        assert len(web.requests) - before <= 2, "its size, and the range"
    assert b"".join(store.stream("f.tar")) == CONTENT
    for read in (lambda: list(store.stream("g", 0, 1)), lambda: store.read_bytes("g"), lambda: store.open("g")):
        with pytest.raises(MissingError, match=r"there is nothing at http://.*/set/g\. Check the path\."):
            read()


def test_a_connection_that_breaks_is_asked_again(web):
    store = Store(f"{web.url}/set")
    web.broken = 2
    assert b"".join(store.stream("f.tar", 100, 20_000)) == CONTENT[100:20_000]
    web.broken = 1000
    with pytest.raises(StorageError, match=r"cannot read http://.*f\.tar"):
        list(store.stream("f.tar", 100, 20_000))


def test_a_server_without_ranges_is_named(web):
    web.ranges = False
    with pytest.raises(StorageError, match=r"cannot read http://.*f\.tar: .*range requests"):
        list(Store(f"{web.url}/set").stream("f.tar", 100, 200))


def test_a_server_that_forbids_listings_shows_nothing(web):
    web.listings = False
    assert Store(f"{web.url}/set").names() == []


def test_a_server_that_does_not_answer_is_named():
    store = Store("http://127.0.0.1:9/x")
    for action in (lambda: store.exists("f"), store.names, lambda: store.read_bytes("f")):
        with pytest.raises(StorageError, match=r"cannot read http://127\.0\.0\.1:9/x.*Check the URL"):
            action()


def test_memory_is_that_of_a_part(tmp_path):
    (tmp_path / "large").write_bytes(bytes(80 << 20))
    code = (
        "import sys, tracemalloc; from rsb_cluster.storage.store import Store\n"
        "store = Store(sys.argv[1]); store.read_json('warm.json'); tracemalloc.start()\n"
        "total = sum(map(len, store.stream('large')))\n"
        "with store.open('large') as file:\n"
        "    while content := file.read(1 << 20): total += len(content)\n"
        "print(total, tracemalloc.get_traced_memory()[1])"
    )
    (tmp_path / "warm.json").write_text("1")
    with WebServer(tmp_path) as web:
        done = subprocess.run(
            [sys.executable, "-c", code, web.url], cwd=ROOT, capture_output=True, text=True, check=True
        )
    total, peak = map(int, done.stdout.split())
    assert total == 2 * 80 << 20
    assert peak < 40 << 20


def test_what_a_hub_has_is_read(web, tmp_path):
    code = (
        "import json; from rsb_cluster.storage.store import Store\n"
        "store = Store('hf://datasets/someone/set/set'); parts = store.stream('f.tar', 10, 20_000)\n"
        "print(json.dumps({'entries': store.entries(), 'none': store.entries('none'),\n"
        "    'json': store.read_json('x.json'), 'there': [store.exists(name) for name in ('f.tar', 'g', 'a b%20')],\n"
        "    'size': store.size('f.tar'), 'part': b''.join(parts).hex(), 'all': store.read_bytes('f.tar').hex()}))"
    )
    with Hub(tmp_path) as hub:
        # In a process of its own, as its address is read when the package is imported.
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | hub.env, capture_output=True, text=True, check=True
        )
    assert json.loads(done.stdout) == {
        "entries": {"a b%20": False, "f.tar": True, "x.json": True}, "none": {}, "json": {"a": 1},
        "there": [True, False, True], "size": len(CONTENT), "part": CONTENT[10:20_000].hex(), "all": CONTENT.hex(),
    }  # fmt: skip
