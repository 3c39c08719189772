"""The watchdog of a rank: ends a stalled attempt, and finds the rank that is the cause.

In data-parallel training one stalled rank makes all others wait in a collective, so every rank looks stuck. The
watchdogs therefore exchange heartbeats with the progress of their ranks, on a connection and a thread of their own. A
rank that sends no heartbeat (stopped, killed, unreachable), or is behind the others, is the cause.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch.distributed as dist

from rsb_cluster.train.distributed import ProcessGroup

log = logging.getLogger(__name__)

T = TypeVar("T")
Phase = Literal["starting", "waiting for data", "computing", "evaluating", "saving"]
# Interval of the heartbeats, seconds.
HEARTBEAT_S = 2.0
# How long rank 0, which stores the heartbeats, may take to answer, seconds.
ANSWER_TIMEOUT_S = 5.0

_NO_ANSWER = "does not answer (killed, stopped, or its node is unreachable)"


@dataclass(frozen=True)
class StalledRank:
    """A rank that blocks the others.

    Attributes:
        rank: Its number.
        host: Its host.
        message: Description of its state, for the user.
        stack: Python stacks of all its threads; empty if they are not available.
    """

    rank: int
    host: str
    message: str
    stack: str


class Watchdog(threading.Thread):
    """Watches the progress of this rank.

    Args:
        group: The processes of the attempt.
        limit_s: Seconds without progress after which the attempt is stalled; 0: no limit.
        on_stuck: Called with the ranks that are the cause, on the watchdog's thread of one healthy rank.
        exit_rank: Exits the process of this rank; called on every rank.
    """

    def __init__(
        self,
        group: ProcessGroup,
        limit_s: float,
        on_stuck: Callable[[list[StalledRank]], None],
        exit_rank: Callable[[], None],
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._group, self._limit_s, self._on_stuck, self._exit = group, limit_s, on_stuck, exit_rank
        self._step, self._phase, self._at = 0, "starting", time.monotonic()
        self._heartbeat_count = 0
        self._rank_0_is_silent = False
        self._closed = threading.Event()
        self._store = group.connect()

    def progress(self, step: int, phase: Phase) -> None:
        """Record progress of this rank.

        Args:
            step: Optimizer steps done.
            phase: The phase that it enters.
        """
        self._step, self._phase, self._at = step, phase, time.monotonic()

    def close(self) -> None:
        """Stop watching; the last heartbeat tells the other ranks that this rank exits by itself."""
        if not self._closed.is_set():
            self._closed.set()
            self._send_heartbeat()

    def run(self) -> None:
        """Watch until closed."""
        self._send_heartbeat()
        last = time.monotonic()
        while not self._closed.wait(HEARTBEAT_S):
            now = time.monotonic()
            if now - last > max(10.0, 3 * HEARTBEAT_S):
                # Not only the main thread but the whole process was stopped, such as by a suspending scheduler.
                log.warning("this process did not run for %.0f s\n%s", now - last, format_stacks())
                self._at = max(self._at, now - HEARTBEAT_S)
            last = now
            self._send_heartbeat()
            if self._limit_s and self._phase != "saving" and now - self._at > self._limit_s:
                self._alarm(now - self._at)
                return

    def reaches_rank_0(self) -> bool:
        """Whether rank 0, which hosts the common store, answers."""
        self._rank_0_is_silent = False
        return self._read_heartbeats() is not None

    def find_lost(self) -> list[StalledRank]:
        """Return the ranks that send no heartbeats and did not exit by themselves; takes some seconds."""
        return [
            StalledRank(rank, host, f"rank {rank} on {host} {self._describe_silence(rank)}", "")
            for rank in self._find_silent()
            for host in [self._group.hosts[rank]]
        ]

    def _alarm(self, idle_s: float) -> None:
        """Find the cause; one healthy rank reports it, then all exit."""
        own = format_stacks()
        log.error("no progress for %.0f s after step %d (%s)\n%s", idle_s, self._step, self._phase, own)
        rank = self._group.rank
        self._rank_0_is_silent = False
        self._ask_rank_0(lambda: self._store.set(f"stack/{rank}", own), None)
        silent = self._find_silent()
        behind = {} if silent else self._find_behind()
        suspects = [self._suspect(r, self._describe_silence(r), idle_s, "") for r in silent]
        suspects += [self._suspect(r, position, idle_s, self._read_stack(r)) for r, position in behind.items()]
        for suspect in suspects:
            log.error("%s\n%s", suspect.message, suspect.stack)
        reporter = next((r for r in range(self._group.world_size) if r not in silent), rank)
        if rank == reporter or 0 in silent:
            self._on_stuck(suspects)
        else:
            time.sleep(3 * HEARTBEAT_S)  # until the report is written, as the first rank that exits may end the job
        self._exit()

    def _suspect(self, rank: int, state: str, idle_s: float, stack: str) -> StalledRank:
        host = self._group.hosts[rank]
        return StalledRank(rank, host, f"rank {rank} on {host} stalled for {idle_s:.0f} s: it {state}", stack)

    def _send_heartbeat(self) -> None:
        self._heartbeat_count += 1
        heartbeat = {
            "count": self._heartbeat_count, "step": self._step, "phase": self._phase, "pid": os.getpid(),
            "exited": self._closed.is_set(),
        }  # fmt: skip
        self._ask_rank_0(lambda: self._store.set(f"heartbeat/{self._group.rank}", json.dumps(heartbeat)), None)

    def _read_heartbeats(self) -> dict[int, dict[str, object]] | None:
        """Return the last heartbeat of each rank; None if rank 0, which stores them, does not answer."""

        def read() -> dict[int, dict[str, object]]:
            names = {rank: f"heartbeat/{rank}" for rank in range(self._group.world_size)}
            return {
                rank: json.loads(self._store.get(name)) for rank, name in names.items() if self._store.check([name])
            }

        return self._ask_rank_0(read, None)

    def _find_silent(self) -> list[int]:
        before = self._read_heartbeats()
        if before is None:
            return [0]
        # Watchdogs that have raised the alarm, too, send no more heartbeats, but have stored their stacks.
        time.sleep(2.5 * HEARTBEAT_S)
        after = self._read_heartbeats()
        if after is None:
            return [0]
        silent = []
        for rank in range(self._group.world_size):
            heartbeat = after.get(rank, {})
            is_alive = heartbeat.get("count") != before.get(rank, {}).get("count") or bool(heartbeat.get("exited"))
            if rank != self._group.rank and not is_alive and not self._has_stack(rank):
                silent.append(rank)
        return silent

    def _find_behind(self) -> dict[int, str]:
        """Return the ranks that are behind the others, each with a description of its position; all if none is."""
        heartbeats = self._read_heartbeats() or {}
        # In the same step, ranks that wait for data are behind those that compute.
        positions = {rank: (beat["step"], beat["phase"] != "waiting for data") for rank, beat in heartbeats.items()}
        last = min(positions.values(), default=None)
        return {
            rank: f"was {heartbeats[rank]['phase']} after step {heartbeats[rank]['step']}"
            for rank, position in positions.items()
            if position == last
        }

    def _describe_silence(self, rank: int) -> str:
        if self._rank_0_is_silent:
            return _NO_ANSWER
        heartbeat = (self._read_heartbeats() or {}).get(rank, {})
        if self._group.hosts[rank] == self._group.host and "pid" in heartbeat:
            try:
                state = Path(f"/proc/{heartbeat['pid']}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                return "was killed"
            if state in "Tt":
                return f"is stopped (SIGSTOP, process {heartbeat['pid']})"
        return _NO_ANSWER

    def _has_stack(self, rank: int) -> bool:
        return self._ask_rank_0(lambda: self._store.check([f"stack/{rank}"]), False)

    def _read_stack(self, rank: int) -> str:
        return self._ask_rank_0(lambda: self._store.get(f"stack/{rank}").decode(), "") if self._has_stack(rank) else ""

    def _ask_rank_0(self, request: Callable[[], T], default: T) -> T:
        """Return the result of a request to the store of rank 0, or the default if it does not answer in time.

        After a timeout no more requests are made.
        """
        if self._rank_0_is_silent:
            return default
        answers: list[T] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError, dist.DistError):
                answers.append(request())

        # On a thread that can be abandoned: the store has no timeout if the process of rank 0 is stopped.
        thread = threading.Thread(target=ask, name="watchdog-request", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no memory for a thread; the main thread will fail with that, too, and report it
            return default
        thread.join(ANSWER_TIMEOUT_S)
        self._rank_0_is_silent = not answers
        return answers[0] if answers else default


def format_stacks() -> str:
    """Return the Python stacks of all threads of this process, the main one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return "\n".join(
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
        if names.get(ident) != "watchdog"
    )
