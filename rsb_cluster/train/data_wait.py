"""How long a device had nothing to compute because its process waited for data."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class DataWait:
    """The time that a device lost to waiting for data.

    A process queues work on a GPU and runs ahead of it: while it waits for a batch, the GPU may still compute, and then
    nothing is lost. What is lost is the time on the GPU between the end of all work queued before the wait and the
    batch's arrival. Two events in its stream measure that; they are read when they have happened, some steps later, as
    to wait for them would stop the process. On a CPU it is the time of the wait.

    Args:
        device: The device.
        new_event: Returns an event with a time.
    """

    def __init__(self, device: torch.device, new_event: Callable[[], torch.cuda.Event] = _timed_event) -> None:
        self._new_event = new_event if device.type == "cuda" else None
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Measure a wait for data: the block."""
        if self._new_event is None:
            started = time.monotonic()
            yield
            self._seconds += time.monotonic() - started
            return
        idle, arrived = self._new_event(), self._new_event()
        idle.record()
        yield
        arrived.record()
        self._pending.append((idle, arrived))

    def take(self) -> float:
        """Return the seconds that have become known since the last call."""
        while self._pending and self._pending[0][1].query():
            idle, arrived = self._pending.popleft()
            self._seconds += idle.elapsed_time(arrived) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds
