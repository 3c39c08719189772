"""Ranks of a node that decode for each other: the same batches, each image read and decoded once, no end unnoticed."""

import contextlib
import json
import os
import signal
import socket
import threading
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsb_cluster.data.index import load_index
from rsb_cluster.data.order import groups_of
from rsb_cluster.storage.store import Store
from rsb_cluster.train.input import neighbours
from rsb_cluster.train.input.decoder import HELLO
from rsb_cluster.train.input.decoder_process import DecoderDiedError, DecoderServer
from rsb_cluster.train.input.loader import ThreadedBatches
from rsb_cluster.train.input.neighbours import Neighbours
from rsb_cluster.train.input.pixels.decode import BadImageError, EncodedImage, Pixels
from rsb_cluster.train.input.pixels.transforms import FastTrain, Transform
from rsb_cluster.train.input.sharing import Sharing
from rsb_cluster.train.lost_peer import LostPeerError
from tests.servers.daemons import poll
from tests.unit.train.input.node import (
    Meeting,
    close,
    decoders,
    iterate_all,
    meet,
    shared_batches,
    shares_of,
    wait_until_gone,
)  # fmt: skip
from tests.unit.train.input.part import Part, recipe_of


@pytest.fixture(scope="module")
def server() -> Iterator[DecoderServer]:
    made = DecoderServer.start()
    yield made
    made.close()


class Odd:
    """Some images are bad."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def __call__(self, source: EncodedImage, seed: int, out: Pixels) -> None:
        if zlib.crc32(source.encoded) % 5 == 0:
            raise BadImageError("not today")
        self._transform(source, seed, out)


# Virtual ranks, and processes that decode for each other.
SHAPES = [
    *((2, 2), (4, 4), (4, 2), (8, 4), (8, 8), (16, 4), (3, 3), (6, 3), (6, 2)),
    *((1, 2), (1, 4), (2, 4), (2, 8), (4, 8), (4, 12)),  # several share a virtual rank
]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from(SHAPES),
    repeats=st.integers(1, 5),
    threads=st.integers(1, 3),
    start=st.integers(0, 40),
    steps=st.integers(1, 6),
    some_are_bad=st.booleans(),
)
def test_batches_are_those_of_one_process_that_has_them_all(
    server, digits, shape, repeats, threads, start, steps, some_are_bad
):
    virtual_ranks, world_size = shape
    recipe = recipe_of(
        "augment.rand_augment=rand-m7-mstd0.5-inc1", f"augment.repeats={repeats}", "train.global_batch=48",
        "data.shuffle_samples=60",
    )  # fmt: skip
    transform = Odd(FastTrain(recipe)) if some_are_bad else FastTrain(recipe)
    near = meet(recipe, virtual_ranks, world_size)
    made = [
        shared_batches(
            server, digits, recipe, virtual_ranks, rank, world_size, near[rank], threads=threads, start=start,
            stop=start + steps, transform=transform,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    found = iterate_all(list(map(iter, made)))
    part = Part(digits, recipe, tuple(range(virtual_ranks)), virtual_ranks)
    whole = list(ThreadedBatches(part.stream(start, start + steps), transform, side=32, threads=0, pin=False))
    for share, batches in zip(shares_of(recipe, virtual_ranks, world_size), found, strict=True):
        slots = list(share.slots)
        expected = [whole[step * virtual_ranks + v] for step in range(steps) for v in share.virtual_ranks]
        for (images, labels, samples, good, _), one in zip(batches, expected, strict=True):
            assert torch.equal(images, one.images[slots]) and torch.equal(labels, one.labels[slots])
            assert torch.equal(samples, one.samples[slots]) and torch.equal(good, one.good[slots])
    named = [name for batches in found for *_, bad in batches for name in bad]
    assert sorted(named) == sorted(name for one in whole for name in one.bad)
    if all(len(group) <= 4 for group in groups_of(virtual_ranks, repeats)):
        assert sum(each.bytes_read for each in made) <= 1.3 * part.reader.bytes_read, "each image is read once"


RECIPE = recipe_of("augment.repeats=3")  # four virtual ranks: one group


def four(server: DecoderServer, data: Path, *, stop: int, near: list[Neighbours | None], transform=None) -> list:
    return [
        iter(shared_batches(
            server, data, RECIPE, 4, rank, 4, near[rank], threads=1, start=0, stop=stop, transform=transform,
        ))
        for rank in range(4)
    ]  # fmt: skip


def test_a_bad_image_is_replaced_in_each_rank_that_needed_it_and_named_once(server, digits):
    transform = Odd(FastTrain(RECIPE))
    found = iterate_all(four(server, digits, stop=3, near=meet(RECIPE, 4, 4), transform=transform))
    named = []
    for rank, batches in enumerate(found):
        stream = Part(digits, RECIPE, (rank,)).stream(0, 3)
        alone = ThreadedBatches(stream, transform, side=32, threads=0, pin=False)
        for (images, labels, _, good, bad), expected in zip(batches, alone, strict=True):
            assert torch.equal(images, expected.images) and torch.equal(labels, expected.labels)
            assert torch.equal(good, expected.good) and bad == expected.bad
            named += bad
    assert named and len(named) == len(set(named))


def test_who_decodes_what(digits):
    """Each image of a block belongs to one of the ranks that need it, and each has as many bytes."""
    index = load_index(Store(digits / "train"))
    block = np.random.default_rng(0).permutation(index.num_samples)[:500]
    cases = ((8, 4, range(4, 8), 2), (8, 2, range(3, 6), 2), (4, 4, range(4), 4), (2, 8, range(1), 4))
    for virtual_ranks, world_size, group, ranks in cases:
        shares = shares_of(recipe_of(), virtual_ranks, world_size)
        holders = Sharing.among(shares, 0).ranks(group)
        parts = [Sharing.among(shares, rank).part(group, block, index) for rank in holders]
        assert len(parts) == ranks
        assert sorted(np.concatenate(parts).tolist()) == sorted(block.tolist())
        sizes = [index.image_sizes[part].sum() for part in parts]
        assert max(sizes) <= min(sizes) + 2 * index.image_sizes.max()
    alone = Sharing.among(shares_of(recipe_of(), 4, 4), 2)
    assert alone.part(range(2, 3), block, index) is block, "an image that one rank needs is nobody else's work"
    assert alone.peers(groups_of(4, 1)) == [] and alone.peers(groups_of(4, 3)) == [0, 1, 3]
    halves = Sharing.among(shares_of(recipe_of(), 4, 8), 2)
    assert halves.peers(groups_of(4, 1)) == [3], "who shares its virtual rank"


@pytest.mark.parametrize("dies", ["decoder", "rank"])
def test_who_dies_is_a_lost_peer_of_the_others_and_nothing_is_left(server, digits, dies):
    near = meet(RECIPE, 4, 4)
    before = set(decoders(os.getpid()))
    sources = four(server, digits, stop=22, near=near)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(next, sources))
        mine = set(decoders(os.getpid())) - before
        assert len(mine) == 4
        if dies == "decoder":
            os.kill(min(mine), signal.SIGKILL)
        else:
            sources.pop().close()
        found = [pool.submit(deque, source, 0).exception(60) for source in sources]
    kinds = Counter(map(type, found))
    assert kinds == ({LostPeerError: 3, DecoderDiedError: 1} if dies == "decoder" else {LostPeerError: 3})
    wait_until_gone(*mine)


def test_a_decoding_process_that_stands_still_delays_the_batches_and_changes_none(server, digits):
    near = meet(RECIPE, 4, 4)
    before = set(decoders(os.getpid()))
    sources = four(server, digits, stop=8, near=near)
    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(next, sources))
        numbers = [[batch.samples.tolist()] for batch in first]
        stopped = min(set(decoders(os.getpid())) - before)
        os.kill(stopped, signal.SIGSTOP)
        rest = [pool.submit(lambda s: [b.samples.tolist() for b in s], source) for source in sources]
        assert not poll(lambda: any(future.done() for future in rest) or None, 0.3)
        os.kill(stopped, signal.SIGCONT)
        for rank, future in enumerate(rest):
            drawn = [b.samples.tolist() for b in Part(digits, RECIPE, (rank,)).batches(0, 0, 8)]
            assert numbers[rank] + future.result() == drawn


def test_strangers_at_the_socket_are_sent_away(server, digits):
    meeting = Meeting(4)
    near = meet(RECIPE, 4, 4, meeting)
    addresses = [json.loads(meeting.said["decoder", rank])["address"] for rank in range(4)]
    with contextlib.ExitStack() as opened:
        for address in addresses:
            for message in (b"", b"GET / HTTP/1.0", HELLO.pack(0, 1)):
                stranger = opened.enter_context(socket.socket(socket.AF_UNIX))
                stranger.connect(f"\0{address}")
                stranger.sendall(message)  # and no descriptor
                stranger.shutdown(socket.SHUT_WR)
        found = iterate_all(four(server, digits, stop=2, near=near))
    drawn = [[b.samples.tolist() for b in Part(digits, RECIPE, (rank,)).batches(0, 0, 2)] for rank in range(4)]
    assert [[samples.tolist() for _, _, samples, _, _ in batches] for batches in found] == drawn


def test_ranks_of_other_nodes_or_out_of_reach_are_no_neighbours(monkeypatch):
    assert meet(recipe_of(), 4, 4) == [None] * 4, "without repeats nothing is shared"
    nodes = iter(range(4))
    with monkeypatch.context() as patched:
        patched.setattr(neighbours, "_node", lambda: str(next(nodes)))
        assert meet(RECIPE, 4, 4) == [None] * 4
    with monkeypatch.context() as patched:
        patched.setattr(neighbours, "same_user", lambda _: False)
        assert meet(RECIPE, 4, 4) == [None] * 4, "another user's process"
    halves = iter("aabb")
    with monkeypatch.context() as patched:
        lock = threading.Lock()

        def node() -> str:
            with lock:
                return next(halves)

        patched.setattr(neighbours, "_node", node)
        for found in meet(RECIPE, 4, 4):
            assert found is not None and len(found.sharing.virtual_ranks) == 2 and len(found.sockets) == 1
            close(found)
