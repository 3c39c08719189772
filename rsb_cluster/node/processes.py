"""Processes of a machine: by names that no other has, and the ranks that one has started.

A PID alone comes again, after a while or on another host.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BOOT_DIGITS = 8

# How long the other ranks may take to end by themselves after one has died, in seconds.
PATIENCE_S = 30.0
_LOOK_S = 0.05


@dataclass(frozen=True)
class Process:
    """A process of some machine. As text it may be part of a file's name, and holds no ``_``.

    Attributes:
        host: The machine's name, for people.
        pid: The process's number there.
        start: When it was started, in clock ticks since the machine was.
        boot: First digits of the id that the kernel gave itself at that start of the machine.
    """

    host: str
    pid: int
    start: int
    boot: str

    def __str__(self) -> str:
        return f"{self.host}-{self.pid}-{self.start}-{self.boot}"

    @staticmethod
    def of(pid: int) -> Process:
        """Return a process of this machine.

        Raises:
            OSError: There is none of that number.
        """
        return Process(_host(), pid, _stat(pid)[1], _boot())

    @staticmethod
    def parse(text: str) -> Process | None:
        """Return the process that a text names; None where it names none."""
        match = re.fullmatch(rf"(.+)-(\d+)-(\d+)-([0-9a-f]{{{BOOT_DIGITS}}})", text)
        return Process(match[1], int(match[2]), int(match[3]), match[4]) if match else None

    @property
    def is_alive(self) -> bool:
        """Whether it runs, on this machine; one that has ended and was not waited for does not."""
        try:
            state, start = _stat(self.pid)
        except OSError:
            return False
        return state not in "ZX" and (start, _boot()) == (self.start, self.boot)

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is, or was, one of another machine, of which nothing is known here.

        A container is a machine of its own: it has the kernel of its host, but neither its name nor its processes.
        """
        return self.host != _host() and not self.is_alive


def send_signal(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Send a signal to all ranks that are still there."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.send_signal(number)


def wait_for_all(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all ranks to end, and return their exit codes; those that outlive a dead one for too long are killed."""
    limit = None
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code is not None for code in codes):
            return [code for code in codes if code is not None]
        if limit is None and any(codes):
            limit = time.monotonic() + PATIENCE_S
            send_signal(ranks, signal.SIGCONT)  # one that is stopped cannot end
        if limit is not None and time.monotonic() > limit:
            send_signal(ranks, signal.SIGKILL)
        time.sleep(_LOOK_S)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())


def _stat(pid: int) -> tuple[str, int]:
    """Return the state and the start of a process; its name, which comes before, may hold blanks and parentheses."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:BOOT_DIGITS]
