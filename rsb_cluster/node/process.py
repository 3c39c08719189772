"""Processes by names that no other process has: a PID alone comes again, after a while or on another host."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

BOOT_DIGITS = 8


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


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())


def _stat(pid: int) -> tuple[str, int]:
    """Return the state and the start of a process; its name, which comes before, may hold blanks and parentheses."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:BOOT_DIGITS]
