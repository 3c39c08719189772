"""The watchdog of a rank: ends an attempt that stands still, and says who was the cause.

In data-parallel training one rank that stands still makes all others wait in a collective, so that every rank looks
stuck. The watchdogs therefore tell each other, by a connection and a thread of their own, where their ranks are: who
does not answer any more (stopped, killed, cut off), or is behind the others, is the cause.
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
# How often ranks tell each other where they are, seconds.
PULSE_S = 2.0
# How long rank 0, which keeps what they tell, may take to answer, seconds.
ANSWER_S = 5.0

_NO_ANSWER = "does not answer (killed, stopped, or its node is cut off)"


@dataclass(frozen=True)
class StalledRank:
    """A rank that holds the others up.

    Attributes:
        rank: Its number.
        host: Where it runs.
        message: What is known, in words.
        stack: Python stack of all its threads; empty where it could not be had.
    """

    rank: int
    host: str
    message: str
    stack: str


class Watchdog(threading.Thread):
    """Watches the steps of this rank.

    Args:
        group: The processes of the attempt.
        limit_s: Seconds without progress that are too long; 0: never.
        on_stuck: Called with the ranks that are the cause, on this watchdog's thread, on one of the ranks that are
            well; it must end the process. The other ranks' processes end by themselves.
        leave: Ends the process of this rank.
    """

    def __init__(
        self,
        group: ProcessGroup,
        limit_s: float,
        on_stuck: Callable[[list[StalledRank]], None],
        leave: Callable[[], None],
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._group, self._limit_s, self._on_stuck, self._leave = group, limit_s, on_stuck, leave
        self._step, self._phase, self._at = 0, "starting", time.monotonic()
        self._beats = 0
        self._rank_0_is_silent = False
        self._closed = threading.Event()
        self._store = group.connect()

    def progress(self, step: int, phase: Phase) -> None:
        """Note that this rank has got on.

        Args:
            step: Optimizer steps done.
            phase: What it begins now.
        """
        self._step, self._phase, self._at = step, phase, time.monotonic()

    def close(self) -> None:
        """Watch no longer; the others learn that this rank has left by itself."""
        if not self._closed.is_set():
            self._closed.set()
            self._try_tell()

    def run(self) -> None:
        """Watch until closed."""
        self._try_tell()
        last = time.monotonic()
        while not self._closed.wait(PULSE_S):
            now = time.monotonic()
            if now - last > max(10.0, 3 * PULSE_S):
                # Not this rank's main thread but the whole process stood still: suspended by the scheduler, or stopped.
                log.warning("this process did not run for %.0f s\n%s", now - last, stacks())
                self._at = max(self._at, now - PULSE_S)
            last = now
            self._try_tell()
            if self._limit_s and self._phase != "saving" and now - self._at > self._limit_s:
                self._alarm(now - self._at)
                return

    def hears_rank_0(self) -> bool:
        """Whether rank 0, through which all ranks talk, answers."""
        self._rank_0_is_silent = False
        return self._pulses() is not None

    def missing(self) -> list[StalledRank]:
        """Return the ranks that give no sign of life and did not say that they leave; takes some seconds."""
        return [
            StalledRank(
                rank, self._group.hosts[rank], f"rank {rank} on {self._group.hosts[rank]} {self._why(rank)}", ""
            )
            for rank in self._silent()
        ]

    def _alarm(self, idle_s: float) -> None:
        """Find out who is the cause; one of the ranks that are well reports it, then all leave."""
        own = stacks()
        log.error("no progress for %.0f s after step %d (%s)\n%s", idle_s, self._step, self._phase, own)
        rank = self._group.rank
        self._rank_0_is_silent = False
        self._asked(lambda: self._store.set(f"stack/{rank}", own), None)
        silent = self._silent()
        behind = {} if silent else self._behind()
        suspects = [self._suspect(culprit, self._why(culprit), idle_s, "") for culprit in silent]
        suspects += [self._suspect(r, place, idle_s, self._stack_of(r)) for r, place in behind.items()]
        for suspect in suspects:
            log.error("%s\n%s", suspect.message, suspect.stack)
        reporter = next((r for r in range(self._group.world_size) if r not in silent), rank)
        if rank == reporter or 0 in silent:
            self._on_stuck(suspects)
        else:
            time.sleep(3 * PULSE_S)  # until the report is written, as the first rank that ends may end all
        self._leave()

    def _suspect(self, rank: int, what: str, idle_s: float, stack: str) -> StalledRank:
        host = self._group.hosts[rank]
        return StalledRank(rank, host, f"rank {rank} on {host} made no step for {idle_s:.0f} s: it {what}", stack)

    def _try_tell(self) -> None:
        self._beats += 1
        mine = {
            "beats": self._beats, "step": self._step, "phase": self._phase, "pid": os.getpid(),
            "left": self._closed.is_set(),
        }  # fmt: skip
        self._asked(lambda: self._store.set(f"pulse/{self._group.rank}", json.dumps(mine)), None)

    def _pulses(self) -> dict[int, dict[str, object]] | None:
        """Read where all ranks are; None where rank 0, which keeps it, does not answer."""

        def ask() -> dict[int, dict[str, object]]:
            names = {rank: f"pulse/{rank}" for rank in range(self._group.world_size)}
            return {
                rank: json.loads(self._store.get(name)) for rank, name in names.items() if self._store.check([name])
            }

        return self._asked(ask, None)

    def _silent(self) -> list[int]:
        before = self._pulses()
        if before is None:
            return [0]
        # Watchdogs of peers that run the alarm themselves do not tell their pulse; theirs is the stack they left.
        time.sleep(2.5 * PULSE_S)
        after = self._pulses()
        if after is None:
            return [0]
        silent = []
        for rank in range(self._group.world_size):
            pulse = after.get(rank, {})
            moved = pulse.get("beats") != before.get(rank, {}).get("beats") or bool(pulse.get("left"))
            if rank != self._group.rank and not moved and not self._has_stack(rank):
                silent.append(rank)
        return silent

    def _behind(self) -> dict[int, str]:
        """Return the ranks that are behind the others, and where they are; all of them if nobody is."""
        pulses = self._pulses() or {}
        # Who waits for data holds up those who already compute.
        places = {rank: (pulse["step"], pulse["phase"] != "waiting for data") for rank, pulse in pulses.items()}
        first = min(places.values(), default=None)
        return {
            rank: f"was {pulses[rank]['phase']} after step {pulses[rank]['step']}"
            for rank, place in places.items()
            if place == first
        }

    def _why(self, rank: int) -> str:
        if self._rank_0_is_silent:
            return _NO_ANSWER
        pulse = (self._pulses() or {}).get(rank, {})
        if self._group.hosts[rank] == self._group.host and "pid" in pulse:
            try:
                state = Path(f"/proc/{pulse['pid']}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                return "was killed"
            if state in "Tt":
                return f"is stopped (SIGSTOP, process {pulse['pid']})"
        return _NO_ANSWER

    def _has_stack(self, rank: int) -> bool:
        return self._asked(lambda: self._store.check([f"stack/{rank}"]), False)

    def _stack_of(self, rank: int) -> str:
        return self._asked(lambda: self._store.get(f"stack/{rank}").decode(), "") if self._has_stack(rank) else ""

    def _asked(self, question: Callable[[], T], otherwise: T) -> T:
        """Ask rank 0, who keeps what all ranks tell; once it has not answered it is not asked again."""
        if self._rank_0_is_silent:
            return otherwise
        answers: list[T] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError, dist.DistError):
                answers.append(question())

        # On a thread that can be left behind: the store waits for ever for a process that is stopped.
        asking = threading.Thread(target=ask, name="watchdog's question", daemon=True)
        try:
            asking.start()
        except RuntimeError:  # no memory for a thread; whoever computes will meet that too, and say so
            return otherwise
        asking.join(ANSWER_S)
        self._rank_0_is_silent = not answers
        return answers[0] if answers else otherwise


def stacks() -> str:
    """Return the Python stacks of all threads of this process, the main one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return "\n".join(
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
        if names.get(ident) != "watchdog"
    )
