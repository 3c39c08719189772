"""Which ranks are presumed dead, by heartbeats alone; and what the heartbeats of many ranks cost the store."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rsb_cluster.train.heartbeats import Heartbeats, PeerMonitor, RankHeartbeat


def beats(*counts: int, **of: RankHeartbeat) -> list[RankHeartbeat]:
    return [RankHeartbeat(count, 7, "computing", 1) for count in counts]


def monitor(rank: int = 1) -> PeerMonitor:
    return PeerMonitor(rank, 3)


def test_a_heartbeat_that_stands_still_for_so_long_is_that_of_a_dead_rank():
    seen = monitor()
    assert [seen.observe(beats(n, 1, 5), 2, 10) for n in range(1, 6)] == [[]] * 5
    assert [seen.observe(beats(n, 1, 5), 2, 10) for n in range(6, 9)] == [[], [2], [2]]
    assert seen.observe(beats(9, 1, 6), 2, 10) == [], "it was only slow"


def test_an_observer_that_was_suspended_accuses_nobody():
    """Its machine slept for an hour, and all others with it; only what it ran counts."""
    seen = monitor()
    seen.observe(beats(1, 1, 5), 2, 10)
    seen.observe(beats(2, 1, 5), 2, 10)  # an hour by the clock
    assert seen.observe(beats(3, 1, 6), 2, 10) == []


def test_nobody_is_accused_for_the_time_in_which_nobody_looked():
    seen = monitor()
    seen.observe(beats(1, 1, 5), 2, 10)
    for _ in range(100):
        seen.pause()
    assert seen.observe(beats(2, 1, 5), 2, 10) == []


@pytest.mark.parametrize("heard", [None, "stale"])
def test_where_rank_0_does_not_answer_or_gathers_no_more_it_alone_is_accused(heard):
    seen = monitor()
    seen.observe(last := beats(1, 1, 5), 2, 10)
    found = [seen.observe(None if heard is None else last, 2, 10) for _ in range(8)]
    assert found[:4] == [[]] * 4 and found[5:] == [[0]] * 3


def test_rank_0_looks_for_itself():
    seen = monitor(rank=0)
    assert [seen.observe(beats(1, n, 5), 4, 10) for n in range(5)] == [[], [], [], [2], [2]]


def test_a_rank_that_failed_is_lost_at_once_and_one_that_exits_in_order_is_not():
    seen = monitor()
    orderly = replace(beats(5)[0], exited=True)
    assert seen.observe([*beats(1, 1), replace(orderly, failure="the loss became nan")], 2, 10) == [2]
    seen = monitor()
    assert [seen.observe([*beats(n, 1), orderly], 5, 10) for n in range(9)] == [[]] * 9


class Store:
    """A common store that counts requests."""

    def __init__(self):
        self.values: dict[str, bytes] = {}
        self.requests = 0

    def set(self, name, value):
        self.requests += 1
        self.values[name] = value.encode()

    def compare_set(self, name, expected, value):
        self.values.setdefault(name, value.encode())

    def get(self, name):
        self.requests += 1
        return self.values[name]

    def multi_get(self, names):
        self.requests += 1
        return [self.values[name] for name in names]

    def check(self, names):
        self.requests += 1
        return all(name in self.values for name in names)


def test_a_thousand_ranks_that_wait_for_one_make_three_requests_each_and_not_a_thousand():
    store, world_size = Store(), 1024
    ranks = [Heartbeats(store, rank, world_size) for rank in range(world_size)]
    monitors = [PeerMonitor(rank, world_size) for rank in range(world_size)]
    dead = 700
    for count in range(1, 9):
        store.requests = 0
        for rank in range(world_size):
            if rank != dead or count == 1:
                ranks[rank].send(RankHeartbeat(count, 5, "computing", 1))
        gathered = ranks[0].gather()
        assert gathered is not None and len(gathered) == world_size
        for rank in range(0, world_size, 64):
            found = monitors[rank].observe(ranks[rank].read(), 2, 10)
            assert found == ([dead] if count > 6 else [])
        assert store.requests <= 3 * world_size
    assert len(json.dumps([content.decode() for content in store.values.values()])) < 1 << 20
