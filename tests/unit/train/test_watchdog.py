"""Ranks that die as they do under NCCL: nothing raises in the others, and their main threads wait forever.

Real processes, forked as torch is imported once, with the real store. Their main threads wait for nothing at all, so
that whatever ends them is the watchdog.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from rsb_cluster.train import heartbeats, watchdog
from rsb_cluster.train.watchdog import StalledRank, Watchdog
from tests.servers.daemons import GUARD_S

PROGRAM = """
import json, multiprocessing, os, signal, sys, time
import torch
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.storage.store import Store
from rsb_cluster.train import heartbeats, watchdog
from rsb_cluster.train.distributed import ProcessGroup

heartbeats.INTERVAL_S = watchdog.INTERVAL_S = 0.5
heartbeats.ANSWER_TIMEOUT_S = 1.0
watchdog.WAITING_S = 0.5
WORLD = 3
events = json.loads(sys.argv[2])
# To start 18 processes takes long on a busy machine; the time of none of them runs before all are there.
all_are_there = multiprocessing.get_context("fork").Barrier(WORLD * len(events))

def rank(number, event, folder, stalled_s):
    said = []
    def report(cause, suspects):
        said.append([cause, *([s.rank, s.message] for s in suspects)])
    def leave(cause):
        with open(f"{folder}/end-{number}.json", "w") as file:
            json.dump([cause, said], file)
        os._exit(75)
    group = ProcessGroup(Ranks(number, number, WORLD, "test", 0, WORLD), Store(folder), wait_s=60, collective_s=900)
    dog = watchdog.Watchdog(group, stalled_s=stalled_s, peer_timeout_s=6.0, report=report, exit_rank=leave)
    all_are_there.wait()
    dog.progress(4, "computing")
    dog.progress(5, "computing")
    dog.start()
    victim = 0 if event.endswith("rank 0") else 1
    if number == victim:
        if event.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if event.startswith("stopped"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if event.startswith("failed"):
            dog.close("a shard was replaced")
            os._exit(100)
    time.sleep(10_000)

children = {}
for event, stalled_s in events.items():
    folder = f"{sys.argv[1]}/{event}"
    os.mkdir(folder)
    for number in range(WORLD):
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            rank(number, event, folder, stalled_s)
        children[child] = event, number
codes = {event: {} for event, _ in children.values()}
while children:
    child, status = os.waitpid(-1, os.WUNTRACED)
    event, number = children[child]
    if os.WIFSTOPPED(status):
        codes[event][number] = "stopped"
    else:
        codes[event].setdefault(number, os.waitstatus_to_exitcode(status))
        del children[child]
    for other, (of, who) in children.items():
        if codes[event].get(who) == "stopped" and of == event and len(codes[event]) == WORLD:
            os.kill(other, signal.SIGKILL)
print(json.dumps(codes))
"""

# What happens, and after how many seconds without progress a rank is stalled.
EVENTS = {
    "killed rank 1": 0, "stopped rank 1": 0, "failed rank 1": 0, "killed rank 0": 0, "stopped rank 0": 0, "hang": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[int, object], dict[int, list[Any]]]]:
    """The exit codes of the ranks, and what their watchdogs reported, by event; all happen at once."""
    folder = tmp_path_factory.mktemp("watchdog")
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(EVENTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for event, codes in json.loads(done.stdout.splitlines()[-1]).items():
        said = {int(path.stem[4:]): json.loads(path.read_text()) for path in (folder / event).glob("end-*.json")}
        found[event] = {int(rank): code for rank, code in codes.items()}, said
    return found


@pytest.mark.parametrize(
    ("event", "code", "state"),
    [
        ("killed rank 1", -9, "was killed"),
        ("stopped rank 1", "stopped", "is stopped (SIGSTOP, process "),
        ("failed rank 1", 100, "failed: a shard was replaced"),
    ],
)
def test_a_rank_that_dies_is_named_by_one_of_the_others_and_all_leave(ended, event, code, state):
    codes, said = ended[event]
    assert codes == {0: 75, 1: code, 2: 75}
    assert said[2] == ["lost peer", []], "one rank reports, and that is enough"
    cause, ((reported, (rank, message)),) = said[0]
    assert (cause, reported, rank) == ("lost peer", "lost peer", 1)
    assert message.startswith(f"rank 1 on {os.uname().nodename} {state}")


@pytest.mark.parametrize("event", ["killed rank 0", "stopped rank 0"])
def test_rank_0_is_missed_by_all_others_although_it_keeps_what_they_say(ended, event):
    codes, said = ended[event]
    assert codes[1] == codes[2] == 75
    for rank in (1, 2):
        cause, ((_, (lost, message)),) = said[rank]
        assert (cause, lost) == ("lost peer", 0) and "does not answer" in message


def test_ranks_that_are_alive_and_make_no_progress_are_stalled(ended):
    codes, said = ended["hang"]
    assert codes == {0: 75, 1: 75, 2: 75}
    cause, (report,) = said[0]
    assert cause == "stuck" and [rank for rank, _ in report[1:]] == [0, 1, 2]


class OneStore(dist.HashStore):
    """A common store within this process."""

    def multi_get(self, names: list[str]) -> list[bytes]:
        return [self.get(name) for name in names]


class Ranks:
    """The watchdogs of three ranks that are alive, and of which nothing runs by itself."""

    def __init__(self) -> None:
        self.store, self.left = OneStore(), []
        self.dogs = [self.watchdog(rank) for rank in range(3)]

    def watchdog(self, rank: int) -> Watchdog:
        def report(cause: str, suspects: Sequence[StalledRank]) -> None:
            self.left.append((rank, cause, [suspect.rank for suspect in suspects]))

        group: Any = SimpleNamespace(rank=rank, world_size=3, hosts=("n1", "n1", "n2"), host="n1")
        group.connect = lambda: self.store
        dog = Watchdog(group, stalled_s=600, peer_timeout_s=10, report=report, exit_rank=lambda cause: None)
        dog.progress(4, "computing")
        dog.progress(5, "computing")
        dog._send_heartbeat()
        return dog

    def look(self, rank: int, waiting_s: float = 30.0) -> bool:
        """What a watchdog does every two seconds."""
        self.dogs[rank]._send_heartbeat()
        return self.dogs[rank]._end_if_peers_are_lost(waiting_s, 2.0)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: None)
    return Ranks()


def test_a_rank_that_makes_progress_looks_at_nobody(ranks):
    assert not any(ranks.look(1, waiting_s=1.0) for _ in range(20)) and not ranks.left
    assert not ranks.look(0, waiting_s=1.0)
    assert [ranks.look(1) for _ in range(8)][-1] and ranks.left[-1] == (1, "lost peer", [0]), "rank 0 gathers no more"


def test_a_rank_that_saves_looks_at_nobody_although_the_others_have_exited(ranks):
    ranks.dogs[0].progress(5, "saving")
    ranks.dogs[1].close()
    ranks.dogs[2].close()
    assert not any(ranks.look(0) for _ in range(20)) and not ranks.left


def test_who_has_exited_in_order_is_not_missed(ranks):
    ranks.dogs[1].close()
    ranks.dogs[2].close()
    assert not any(ranks.look(0) for _ in range(20)) and not ranks.left


def test_a_verdict_of_rank_0_is_that_of_all(ranks):
    while not ranks.left:
        ranks.look(1, waiting_s=0.0)
        ranks.look(0)
    assert ranks.left == [(0, "lost peer", [2])]
    left: list[str] = []
    ranks.dogs[1]._exit_rank = left.append
    assert ranks.look(1) and left == ["lost peer"] and len(ranks.left) == 1, "it is reported once"


def test_a_rank_that_still_starts_has_more_time(ranks):
    """Imports, compilation and the first contact of NCCL keep all threads of a process waiting."""
    ranks.dogs[0]._first_step = 5
    for _ in range(100):
        assert not ranks.look(0), "200 s, of the 600 that a step may take"
    ranks.dogs[0].progress(6, "computing")
    assert ranks.look(0) and ranks.left == [(0, "lost peer", [1, 2])]


def test_a_heartbeat_on_its_way_does_not_follow_the_last_one(ranks, monkeypatch):
    """The main thread closes the watchdog when the watchdog's own thread is about to send."""
    send, on_its_way, goes_on = ranks.dogs[1]._heartbeats.send, threading.Event(), threading.Event()

    def slow_send(heartbeat: heartbeats.RankHeartbeat) -> None:
        if not heartbeat.exited:
            on_its_way.set()
            goes_on.wait()
        send(heartbeat)

    monkeypatch.setattr(ranks.dogs[1]._heartbeats, "send", slow_send)
    beating = threading.Thread(target=ranks.dogs[1]._send_heartbeat)
    closing = threading.Thread(target=ranks.dogs[1].close)
    beating.start()
    assert on_its_way.wait(GUARD_S)
    closing.start()
    closing.join(0.2)  # either it waits for the other one, or it has sent already
    goes_on.set()
    beating.join()
    closing.join()
    assert ranks.dogs[0]._heartbeats.gather()[1].exited


def test_its_thread_draws_nothing_from_the_generator_of_the_training_loop(ranks, monkeypatch):
    monkeypatch.setattr(watchdog, "INTERVAL_S", 0.01)
    before, looked, dog = random.getstate(), threading.Event(), ranks.dogs[1]
    monkeypatch.setattr(dog, "_send_heartbeat", looked.set)
    dog.start()
    assert looked.wait(GUARD_S)
    dog._closed.set()
    dog.join()
    assert random.getstate() == before


def test_two_threads_that_ask_at_once_are_both_answered(ranks):
    """The watchdog's thread, and a main thread that fails and asks who is lost."""
    asked = ranks.dogs[1]._heartbeats
    answers: list[object] = []
    threads = [threading.Thread(target=lambda: answers.extend(asked.read() for _ in range(200))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 400 and None not in answers


def test_a_rank_is_reached_before_it_has_looked_at_the_others(ranks):
    assert ranks.dogs[1].reaches_rank_0()


@pytest.mark.parametrize(("stalled_s", "peer_timeout_s", "cause"), [(3, 0, "stuck"), (600, 2, "lost peer")])
def test_a_rank_that_cannot_reach_rank_0_waits_for_its_answers_and_ends_all_the_same(
    monkeypatch, stalled_s, peer_timeout_s, cause
):
    """As one that is cut off from the network: its requests have no end; to wait for them is not to be suspended."""
    for name, value in {"INTERVAL_S": 0.1, "WAITING_S": 0.2, "SUSPENDED_S": 0.5}.items():
        monkeypatch.setattr(watchdog, name, value)
    monkeypatch.setattr(heartbeats, "ANSWER_TIMEOUT_S", 0.6)
    store, cut_off, ended = OneStore(), threading.Event(), threading.Event()
    group: Any = SimpleNamespace(rank=1, world_size=2, hosts=("n1", "n2"), host="n2", connect=lambda: store)
    said: list[tuple[str, list[int]]] = []
    dog = Watchdog(
        group,
        stalled_s=stalled_s,
        peer_timeout_s=peer_timeout_s,
        report=lambda cause, suspects: said.append((cause, [suspect.rank for suspect in suspects])),
        exit_rank=lambda cause: ended.set(),
    )
    for name in ("set", "get", "check"):
        monkeypatch.setattr(store, name, lambda *_: cut_off.wait())
    dog.progress(4, "computing")
    dog.progress(5, "computing")
    dog.start()
    assert ended.wait(GUARD_S) and said == [(cause, [0])]
    cut_off.set()
