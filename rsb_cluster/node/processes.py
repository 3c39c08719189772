"""Processes: unique names for them, and waiting for the ranks that this process has started.

A PID alone is not unique: the kernel reuses it, and other hosts have the same.
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

# How long the other ranks may take to exit by themselves after one has died, in seconds.
EXIT_TIMEOUT_S = 30.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Process:
    """A process of some host. Its text form is safe in file names, and has no ``_``.

    Attributes:
        host: Name of the host.
        pid: The PID there.
        start: Start time of the process, in clock ticks since boot.
        boot: First digits of the kernel's boot id.
    """

    host: str
    pid: int
    start: int
    boot: str

    def __str__(self) -> str:
        return f"{self.host}-{self.pid}-{self.start}-{self.boot}"

    @staticmethod
    def of(pid: int) -> Process:
        """Return the process of this host that has a PID.

        Raises:
            OSError: No process has it.
        """
        return Process(_host(), pid, _stat(pid)[1], _boot())

    @staticmethod
    def parse(text: str) -> Process | None:
        """Return the process that a text names; None if it is not the text form of a process."""
        match = re.fullmatch(rf"(.+)-(\d+)-(\d+)-([0-9a-f]{{{BOOT_DIGITS}}})", text)
        return Process(match[1], int(match[2]), int(match[3]), match[4]) if match else None

    @property
    def is_alive(self) -> bool:
        """Whether the process runs on this host; a zombie does not."""
        try:
            state, start = _stat(self.pid)
        except OSError:
            return False
        return state not in "ZX" and (start, _boot()) == (self.start, self.boot)

    @property
    def is_elsewhere(self) -> bool:
        """Whether the process is, or was, on another host, so that its state cannot be found here.

        A container counts as a host of its own: it shares its host's kernel, but neither its name nor its processes.
        """
        return self.host != _host() and not self.is_alive


def send_signal(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Send a signal to all ranks that still run."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.send_signal(number)


def wait_for_all(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all ranks to exit, and return their exit codes.

    Once a rank has died, the others are killed if they do not exit within ``EXIT_TIMEOUT_S``.
    """
    deadline = None
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code is not None for code in codes):
            return [code for code in codes if code is not None]
        if deadline is None and any(codes):
            deadline = time.monotonic() + EXIT_TIMEOUT_S
            send_signal(ranks, signal.SIGCONT)  # a stopped process cannot exit
        if deadline is not None and time.monotonic() > deadline:
            send_signal(ranks, signal.SIGKILL)
        time.sleep(_POLL_S)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())


def _stat(pid: int) -> tuple[str, int]:
    """Return the state and the start time of a process. Its name, which comes first, may have blanks and brackets."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:BOOT_DIGITS]
