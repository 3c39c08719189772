"""Heartbeats: what the ranks of an attempt say of themselves, and which of them are presumed dead.

Each rank sends its heartbeat on a connection of its own. Rank 0, which hosts the common store, gathers all of them into
one key, so that an observer makes one request and not one per rank.

No two clocks are compared. A rank is presumed dead if its heartbeat did not move during some seconds of the observer's
own running time: an observer that was suspended itself, with its whole machine, must not accuse its peers.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

import torch.distributed as dist

from rsb_cluster.runs.run import Cause

T = TypeVar("T")
Phase = Literal["starting", "waiting for data", "computing", "evaluating", "saving"]

INTERVAL_S = 2.0
# How long rank 0 may take to answer a request, seconds.
ANSWER_TIMEOUT_S = 5.0
_GATHERED = "heartbeats"


@dataclass(frozen=True)
class RankHeartbeat:
    """What a rank said last.

    Attributes:
        count: Heartbeats so far; it moves as long as the process runs.
        step: Optimizer steps done.
        phase: What its main thread does.
        pid: The number of its process, on its host.
        exited: Whether it exits by itself, or has exited.
        failure: Why it exits, if it failed.
        verdict: The cause for which it ends the attempt, if it has found others to be that cause, and reported them.
    """

    count: int = 0
    step: int = 0
    phase: Phase = "starting"
    pid: int = 0
    exited: bool = False
    failure: str = ""
    verdict: Cause | Literal[""] = ""


class Heartbeats:
    """The heartbeats of all ranks, in the common store.

    Args:
        store: A connection of its own to the store of rank 0.
        rank: The rank of this process.
        world_size: The number of ranks.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store, self._rank = store, rank
        self._names = [f"heartbeat/{r}" for r in range(world_size)]
        self._request: threading.Thread | None = None
        self._asking = threading.Lock()
        if rank == 0:
            # So that one request reads all of them, although some ranks have not sent any yet.
            for name in self._names:
                store.compare_set(name, "", json.dumps(asdict(RankHeartbeat())))
            self.gather()  # so that who finds nothing gathered knows that rank 0 does not answer

    def send(self, heartbeat: RankHeartbeat) -> None:
        """Store the heartbeat of this rank."""
        self.ask(lambda: self._store.set(self._names[self._rank], json.dumps(asdict(heartbeat))), None)

    def gather(self) -> list[RankHeartbeat] | None:
        """Read all heartbeats, and store them under one key; for rank 0."""

        def gather() -> list[RankHeartbeat]:
            contents = [json.loads(content) for content in self._store.multi_get(self._names)]
            self._store.set(_GATHERED, json.dumps(contents))
            return [RankHeartbeat(**content) for content in contents]

        return self.ask(gather, None)

    def read(self) -> list[RankHeartbeat] | None:
        """Return the heartbeats of all ranks as rank 0 has gathered them; None if it has not, or does not answer."""
        if self._rank == 0:
            return self.gather()

        def read() -> list[RankHeartbeat] | None:
            if not self._store.check([_GATHERED]):
                return None
            return [RankHeartbeat(**content) for content in json.loads(self._store.get(_GATHERED))]

        return self.ask(read, None)

    def ask(self, request: Callable[[], T], default: T) -> T:
        """Return the result of a request to the store of rank 0, or the default if it does not answer in time.

        The connection serves one request at a time, for the main thread and the watchdog's: none is made while an
        earlier one has no answer.
        """
        with self._asking:
            if self._request is not None:
                self._request.join(ANSWER_TIMEOUT_S)
                if self._request.is_alive():
                    return default
            answers: list[T] = []

            def ask() -> None:
                with contextlib.suppress(RuntimeError, dist.DistError):
                    answers.append(request())

            # On a thread that can be abandoned: the store has no timeout if the process of rank 0 is stopped.
            self._request = threading.Thread(target=ask, name="heartbeat-request", daemon=True)
            try:
                self._request.start()
            except RuntimeError:  # no memory for a thread; the main thread will fail with that, too, and report it
                self._request = None
                return default
            self._request.join(ANSWER_TIMEOUT_S)
            return answers[0] if answers else default


class PeerMonitor:
    """Decides from heartbeats which ranks are presumed dead.

    Args:
        rank: The observer's.
        world_size: The number of ranks.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._now = 0.0
        self._last = [RankHeartbeat(count=-1)] * world_size
        self._moved_at = [0.0] * world_size

    def pause(self) -> None:
        """Forget how long heartbeats stood still: nobody looked."""
        self._moved_at = [self._now] * len(self._last)

    def observe(self, heartbeats: Sequence[RankHeartbeat] | None, running_s: float, limit_s: float) -> list[int]:
        """Return the ranks that are presumed dead, and those that failed.

        Args:
            heartbeats: Of all ranks; None if rank 0 did not answer.
            running_s: How long the observer has run since it observed last, without the time in which it was suspended.
            limit_s: How long a heartbeat may stand still, seconds of the observer's own running time.
        """
        self._now += running_s
        # What rank 0 does not gather says nothing of the others.
        is_current = heartbeats is not None and (self._rank == 0 or heartbeats[0].count != self._last[0].count)
        for rank, heartbeat in enumerate(heartbeats or self._last):
            if rank == self._rank or (rank != 0 and not is_current) or heartbeat.count != self._last[rank].count:
                self._moved_at[rank] = self._now
        if heartbeats is not None:
            self._last = list(heartbeats)
        return [
            rank
            for rank, last in enumerate(self._last)
            if rank != self._rank
            and (bool(last.failure) if last.exited else self._now - self._moved_at[rank] > limit_s)
        ]
