"""Blocks come ahead, in order, bounded; an error comes at its place."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from rsb_cluster.data.ahead import ReadAhead
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.errors import StorageError
from tests.command import ROOT
from tests.servers.daemons import GUARD_S, poll
from tests.unit.threads import threads_named


def blocks_of(index, size=10):
    starts = range(0, index.num_samples, size)
    return [(start // size, np.arange(start, min(start + size, index.num_samples))) for start in starts]


@pytest.mark.parametrize("depth", [1, 2, 20])
@pytest.mark.parametrize("threads", [1, 4])
def test_blocks_come_in_order_and_whole(two_shards, depth, threads):
    store, index, expected = two_shards
    reader = ShardReader(store, index)
    with ReadAhead(reader, iter(blocks_of(index)), depth, threads) as ahead:
        for key, samples in blocks_of(index):
            images = ahead.get(key)
            assert ahead.get(key) is images, "until it is released"
            assert sorted(images) == samples.tolist()
            assert all(images[n] == expected[n] for n in images)
            ahead.release(key)
        with pytest.raises(LookupError, match="block 7 was requested, but there are no more"):
            ahead.get(7)
    assert threads_named("read-ahead") == []


class Gate(ShardReader):
    """A reader that notes what it reads and waits to be let through; its waiting can be cancelled."""

    def __init__(self, store, index, errors=()):
        super().__init__(store, index)
        self.begun, self.open, self.errors = [], threading.Event(), dict(errors)

    def read_piece(self, piece, transfer=None):
        self.begun.append(piece.samples[0])
        while not self.open.is_set():
            transfer.sleep(0.01)
        if piece.samples[0] in self.errors:
            raise self.errors[piece.samples[0]]
        return super().read_piece(piece, transfer)


def test_no_more_than_the_depth_is_read_ahead(two_shards):
    store, index, _ = two_shards
    reader = Gate(store, index)
    reader.open.set()
    taken = []
    blocks = (taken.append(block[0]) or block for block in blocks_of(index))
    with ReadAhead(reader, blocks, 2, threads=4) as ahead:
        for key in range(5):
            assert poll(lambda key=key: len(taken) == key + 2, interval=0.005)
            time.sleep(0.03)
            assert taken == list(range(key + 2))
            ahead.get(key)


def test_the_threads_share_the_pieces_of_a_block(two_shards):
    store, index, expected = two_shards
    reader = Gate(store, index)
    with ReadAhead(reader, iter([("both", np.arange(70))]), 1, threads=2) as ahead:
        assert poll(lambda: sorted(reader.begun) == [0, 40], interval=0.005)
        reader.open.set()
        assert [bytes(v) for _, v in sorted(ahead.get("both").items())] == expected


def test_a_block_out_of_turn_is_refused(two_shards):
    store, index, _ = two_shards
    with ReadAhead(ShardReader(store, index), iter(blocks_of(index)), 2) as ahead:
        ahead.get(0)
        with pytest.raises(LookupError, match="block 2 was requested, but the next one is 1"):
            ahead.get(2)
        ahead.release(0)
        with pytest.raises(LookupError):
            ahead.get(0)
        ahead.get(1)
    with pytest.raises(ValueError, match="0 blocks"):
        ReadAhead(ShardReader(store, index), iter([]), 0)


def test_an_error_surfaces_at_its_block_with_its_cause(two_shards):
    store, index, _ = two_shards
    error = StorageError("broken wire")
    error.__cause__ = OSError("the cause")
    reader = Gate(store, index, {20: error})
    reader.open.set()
    with ReadAhead(reader, iter(blocks_of(index)), 5) as ahead:
        ahead.get(0)
        ahead.get(1)
        for _ in range(2):
            with pytest.raises(StorageError, match="broken wire") as caught:
                ahead.get(2)
            assert caught.value is error and str(caught.value.__cause__) == "the cause"
        ahead.get(3)


def test_an_error_of_the_iterator_surfaces_after_its_blocks(two_shards):
    store, index, _ = two_shards

    def blocks():
        yield from blocks_of(index)[:2]
        raise ZeroDivisionError("in the order")

    with ReadAhead(ShardReader(store, index), blocks(), 5) as ahead:
        ahead.get(0)
        ahead.get(1)
        with pytest.raises(ZeroDivisionError, match="in the order"):
            ahead.get(2)


def test_close_ends_threads_and_a_waiting_get(two_shards):
    store, index, _ = two_shards
    reader = Gate(store, index)
    ahead = ReadAhead(reader, iter(blocks_of(index)), 3)
    said = []

    def wait():
        try:
            ahead.get(0)
        except RuntimeError as error:
            said.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert poll(lambda: reader.begun, interval=0.005)
    ahead.close()  # while the reader stands still
    waiting.join(GUARD_S)
    assert said == ["the read-ahead is closed"]
    assert threads_named("read-ahead") == []
    with pytest.raises(RuntimeError, match="closed"):
        ahead.get(0)
    ahead.close()


STUCK = """
import signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
import numpy as np
from rsb_cluster.data.ahead import ReadAhead
from rsb_cluster.data.index import load_index
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.storage.store import Store
class Stuck(ShardReader):
    def read_piece(self, piece, transfer=None):
        print("up", flush=True)
        time.sleep(60)
store = Store(sys.argv[1])
index = load_index(store)
ahead = ReadAhead(Stuck(store, index), iter([(0, np.arange(3))]), 1)
if sys.argv[2] == "get":
    try:
        ahead.get(0)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
while sys.argv[2] == "end" and not sys.stdin.readline():
    pass
"""


@pytest.mark.parametrize("how", ["get", "end"])
def test_a_stuck_thread_holds_up_neither_ctrl_c_nor_the_end(two_shards, how):
    store, _, _ = two_shards
    argv = [sys.executable, "-c", STUCK, store.url, how]
    with subprocess.Popen(
        argv, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        try:
            assert child.stdout.readline() == "up\n"
            time.sleep(0.1)
            if how == "get":
                child.send_signal(signal.SIGINT)
                out, err = child.communicate(timeout=GUARD_S)
                assert out == "interrupted\n"
            else:
                out, err = child.communicate("go\n", timeout=GUARD_S)
            assert (child.returncode, err) == (0, "")
        finally:
            child.kill()
