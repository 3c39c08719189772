"""The watchdog of a rank: ends an attempt that has lost a rank or is stalled, and names the rank that is the cause.

In data-parallel training one dead or stalled rank makes all others wait in a collective. With gloo a dead peer raises
an error; with NCCL nothing does. The watchdogs therefore exchange heartbeats with the progress of their ranks, on a
connection and a thread of their own (`rsb_cluster.train.heartbeats`). While its own rank waits, a watchdog looks at the
others':

- whose heartbeats stop is presumed dead, and who failed said so before it exited: the attempt ends at once;
- if all are alive and nobody gets on for long, who is stopped or behind the others is the cause.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rsb_cluster.runs.run import Cause
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.heartbeats import INTERVAL_S, Heartbeats, PeerMonitor, Phase, RankHeartbeat

log = logging.getLogger(__name__)

# A rank that made progress so lately is not waiting for its peers, seconds.
WAITING_S = 5.0
# A watchdog that sleeps for so long was suspended with its whole process, seconds.
SUSPENDED_S = 10.0

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
    stack: str = ""


class Watchdog(threading.Thread):
    """Watches the progress of this rank, and the heartbeats of the others.

    Args:
        group: The processes of the attempt.
        stalled_s: Seconds without progress after which the attempt is stalled; 0: no limit.
        peer_timeout_s: Seconds without a heartbeat after which a peer is presumed dead; 0: no limit.
        report: Called with "lost peer" or "stuck" and the ranks that are the cause, on the watchdog's thread of one
            healthy rank.
        exit_rank: Exits the process of this rank for that cause; called on every rank.
    """

    def __init__(
        self,
        group: ProcessGroup,
        *,
        stalled_s: float,
        peer_timeout_s: float,
        report: Callable[[Cause, Sequence[StalledRank]], None],
        exit_rank: Callable[[Cause], None],
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._group, self._stalled_s, self._peer_timeout_s = group, stalled_s, peer_timeout_s
        self._report, self._exit_rank = report, exit_rank
        self._step, self._at = 0, time.monotonic()
        self._phase: Phase = "starting"
        self._count, self._failure = 0, ""
        self._verdict: Cause | Literal[""] = ""
        self._closed = threading.Event()
        self._sending = threading.Lock()
        self._store = group.connect()
        self._heartbeats = Heartbeats(self._store, group.rank, group.world_size)
        self._monitor = PeerMonitor(group.rank, group.world_size)
        self._first_step: int | None = None
        self._send_heartbeat()

    def progress(self, step: int, phase: Phase) -> None:
        """Record progress of this rank.

        Args:
            step: Optimizer steps done.
            phase: The phase that it enters.
        """
        self._step, self._phase, self._at = step, phase, time.monotonic()
        if self._first_step is None:
            self._first_step = step

    def close(self, failure: str = "") -> None:
        """Stop watching; the last heartbeat tells the other ranks that this rank exits by itself.

        Args:
            failure: Why, if it failed: its peers exit, too.
        """
        if not self._closed.is_set():
            self._failure = failure
            self._closed.set()
            self._send_heartbeat()

    def run(self) -> None:
        """Watch until closed."""
        last = asleep = time.monotonic()
        # The ranks do not all ask at one moment. The global generator is the main thread's.
        jitter = random.Random()
        while not self._closed.wait(INTERVAL_S * jitter.uniform(0.9, 1.1)):
            now = time.monotonic()
            # Only what it overslept: to wait for an answer of rank 0, which may be gone, is to run.
            suspended_s = now - asleep if now - asleep > SUSPENDED_S else 0.0
            if suspended_s:
                # Not only the main thread but the whole process was stopped, such as by a suspending scheduler.
                log.warning("this process did not run for %.0f s\n%s", suspended_s, format_stacks())
                self._at = max(self._at, now - INTERVAL_S)
            ran_s, last = now - last - suspended_s, now
            self._send_heartbeat()
            waiting_s = now - self._at
            if self._end_if_peers_are_lost(waiting_s, ran_s):
                return
            if self._stalled_s and self._phase != "saving" and waiting_s > self._stalled_s:
                self._end("stuck", *self._find_cause_of_stall(waiting_s))
                return
            asleep = time.monotonic()

    def reaches_rank_0(self) -> bool:
        """Whether rank 0, which hosts the common store, answers."""
        return self._heartbeats.read() is not None

    def find_lost(self) -> list[StalledRank]:
        """Return the ranks that send no heartbeats and did not exit by themselves; takes some seconds."""
        return [self._stalled(rank, self._describe_silence(rank)) for rank in self._find_silent()]

    def _end_if_peers_are_lost(self, waiting_s: float, ran_s: float) -> bool:
        """End the attempt if this rank waits for ranks that are gone; return whether it does."""
        heartbeats = self._heartbeats.gather() if self._group.rank == 0 else None  # always, as the others read it
        if not self._peer_timeout_s or self._phase == "saving" or waiting_s < WAITING_S:
            self._monitor.pause()
            return False
        heartbeats = heartbeats or self._heartbeats.read()
        for heartbeat in heartbeats or ():
            if heartbeat.verdict:
                self._exit_rank(heartbeat.verdict)
                return True
        # Until all have done a step together, imports, compilation and the first contact of NCCL may keep all threads
        # of a process waiting.
        is_starting = self._first_step in (None, self._step)
        limit_s = max(self._peer_timeout_s, self._stalled_s) if is_starting else self._peer_timeout_s
        if lost := self._monitor.observe(heartbeats, ran_s, limit_s):
            self._end("lost peer", [self._stalled(rank, self._describe_silence(rank)) for rank in lost], lost)
        return bool(lost)

    def _end(self, cause: Cause, suspects: Sequence[StalledRank], silent: Sequence[int]) -> None:
        """End the attempt: one rank that is not silent reports the cause, then all exit."""
        for suspect in suspects:
            log.error("%s\n%s", suspect.message, suspect.stack)
        reporter = next((r for r in range(self._group.world_size) if r not in silent), self._group.rank)
        if self._group.rank == reporter or 0 in silent:
            self._report(cause, suspects)
            self._verdict = cause
            self._send_heartbeat()
        if self._group.rank == 0:
            self._heartbeats.gather()
        if self._group.rank == 0 or self._group.rank != reporter:
            # Rank 0 hosts the store, in which the others find its verdict; and the first rank that exits may end the
            # job before the report is written.
            time.sleep(3 * INTERVAL_S)
        self._exit_rank(cause)

    def _find_cause_of_stall(self, idle_s: float) -> tuple[list[StalledRank], list[int]]:
        """Return the ranks that are silent, or else those that are behind the others; and those that are silent."""
        own = format_stacks()
        log.error("no progress for %.0f s after step %d (%s)\n%s", idle_s, self._step, self._phase, own)
        self._heartbeats.ask(lambda: self._store.set(f"stack/{self._group.rank}", own), None)
        silent = self._find_silent()
        positions = {rank: self._describe_silence(rank) for rank in silent} or self._find_behind()
        suspects = [
            self._stalled(rank, f"stalled for {idle_s:.0f} s: it {position}", self._read_stack(rank))
            for rank, position in positions.items()
        ]
        return suspects, silent

    def _stalled(self, rank: int, state: str, stack: str = "") -> StalledRank:
        host = self._group.hosts[rank]
        return StalledRank(rank, host, f"rank {rank} on {host} {state}", stack)

    def _send_heartbeat(self) -> None:
        # The last one, of the main thread, must not be followed by one that the watchdog's thread has begun before.
        with self._sending:
            self._count += 1
            exited = self._closed.is_set()
            self._heartbeats.send(
                RankHeartbeat(self._count, self._step, self._phase, os.getpid(), exited, self._failure, self._verdict)
            )

    def _find_silent(self) -> list[int]:
        before = self._heartbeats.read()
        # Watchdogs that have raised the alarm, too, send no more heartbeats, but have stored their stacks.
        time.sleep(2.5 * INTERVAL_S)
        after = self._heartbeats.read()
        if before is None or after is None:
            return [0]
        return [
            rank
            for rank, heartbeat in enumerate(after)
            if rank != self._group.rank
            and not (heartbeat.count != before[rank].count or heartbeat.exited or self._has_stack(rank))
        ]

    def _find_behind(self) -> dict[int, str]:
        """Return the ranks that are behind the others, each with a description of its position; all if none is."""
        heartbeats = self._heartbeats.read() or []
        # In the same step, ranks that wait for data are behind those that compute.
        positions = [(heartbeat.step, heartbeat.phase != "waiting for data") for heartbeat in heartbeats]
        return {
            rank: f"was {heartbeat.phase} after step {heartbeat.step}"
            for rank, (heartbeat, position) in enumerate(zip(heartbeats, positions, strict=True))
            if position == min(positions)
        }

    def _describe_silence(self, rank: int) -> str:
        heartbeats = self._heartbeats.read()
        if heartbeats is None:
            return _NO_ANSWER
        heartbeat = heartbeats[rank]
        if heartbeat.failure:
            return f"failed: {heartbeat.failure}"
        if self._group.hosts[rank] == self._group.host and heartbeat.pid:
            try:
                state = Path(f"/proc/{heartbeat.pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                state = "X"
            if state in "XZ":
                return "was killed"
            if state in "Tt":
                return f"is stopped (SIGSTOP, process {heartbeat.pid})"
        return _NO_ANSWER

    def _has_stack(self, rank: int) -> bool:
        return self._heartbeats.ask(lambda: self._store.check([f"stack/{rank}"]), False)

    def _read_stack(self, rank: int) -> str:
        if not self._has_stack(rank):
            return ""
        return self._heartbeats.ask(lambda: self._store.get(f"stack/{rank}").decode(), "")


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
