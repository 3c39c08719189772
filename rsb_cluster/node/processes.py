"""The ranks that a process has started on its machine: telling them what it is told, and waiting for their end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Sequence

# How long the other ranks may take to end by themselves after one has died, in seconds.
PATIENCE_S = 30.0
_LOOK_S = 0.05


def tell(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Send a signal to all ranks that are still there."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.send_signal(number)


def wait(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all ranks to end, and return their exit codes; those that outlive a dead one for too long are killed."""
    limit = None
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code is not None for code in codes):
            return [code for code in codes if code is not None]
        if limit is None and any(codes):
            limit = time.monotonic() + PATIENCE_S
            tell(ranks, signal.SIGCONT)  # one that is stopped cannot end
        if limit is not None and time.monotonic() > limit:
            tell(ranks, signal.SIGKILL)
        time.sleep(_LOOK_S)
