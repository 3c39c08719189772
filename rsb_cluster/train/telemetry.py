"""What the steps of an interval cost: time, the GPUs' memory, power and energy; and which rank was the slowest."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.gpu_sensors import GpuSensors, Readings

# Numbers that each rank gives: own time, utilisation, power, energy, memory.
_NUMBERS = 5


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class OwnTime:
    """The part of a step in which a rank waits for no other: from its start to the end of its last forward pass.

    In synchronous training all ranks have equally long steps, as the fast ones wait for the slow in the backward pass.
    What tells them apart is the time before: waiting for data, and the forward pass. On a GPU it is measured by events
    in its stream, read when they have happened.

    Args:
        device: The device.
        new_event: Returns an event with a time.
    """

    def __init__(self, device: torch.device, new_event: Callable[[], torch.cuda.Event] = _timed_event) -> None:
        self._new_event = new_event if device.type == "cuda" else None
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._start: torch.cuda.Event | None = None
        self._started_s = 0.0
        self._seconds: list[float] = []

    def begin(self) -> None:
        """Mark the start of a step."""
        if self._new_event is None:
            self._started_s = time.monotonic()
        else:
            self._start = self._new_event()
            self._start.record()

    def end(self) -> None:
        """Mark the end of the step's last forward pass."""
        if self._new_event is None:
            self._seconds.append(time.monotonic() - self._started_s)
        elif self._start is not None:
            stop = self._new_event()
            stop.record()
            self._pending.append((self._start, stop))

    def take(self) -> float:
        """Return the mean of what has become known since the last call, seconds; NaN if nothing has."""
        while self._pending and self._pending[0][1].query():
            start, stop = self._pending.popleft()
            self._seconds.append(start.elapsed_time(stop) / 1000)
        seconds, self._seconds = self._seconds, []
        return statistics.fmean(seconds) if seconds else math.nan


class Telemetry:
    """Measures the steps of this rank, and tells rank 0 when a row of metrics is due.

    Args:
        group: The processes.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group, self.own_time = group, OwnTime(group.device)
        self._laps: list[float] = []
        self._lap_started = time.monotonic()
        self._sensors = None
        if group.device.type == "cuda":
            self._sensors = GpuSensors(str(torch.cuda.get_device_properties(group.device).uuid))

    def begin_step(self) -> None:
        """Mark the start of a step."""
        self._lap_started = time.monotonic()
        self.own_time.begin()

    def end_step(self) -> None:
        """Mark its end, on a GPU after the host has waited for an earlier one: then a lap is as long as a step."""
        self._laps.append(time.monotonic() - self._lap_started)

    def take(self) -> dict[str, Any]:
        """Return the columns of the metrics since the last call; a collective. What is not known is left out."""
        readings, memory = Readings(), math.nan
        if self._sensors is not None:
            readings, memory = self._sensors.take(), float(torch.cuda.max_memory_allocated(self._group.device))
        numbers = [self.own_time.take(), readings.utilization, readings.power_w, readings.energy_j, memory]
        table = torch.zeros(self._group.world_size, _NUMBERS, dtype=torch.float64)
        table[self._group.rank] = torch.tensor(numbers, dtype=torch.float64)
        laps, self._laps = self._laps, []
        return summarise(laps, self._group.sum_(table.to(self._group.device)).tolist(), self._group.hosts)

    def close(self) -> None:
        """Stop reading sensors."""
        if self._sensors is not None:
            self._sensors.close()


def summarise(laps: Sequence[float], of_ranks: Sequence[Sequence[float]], hosts: Sequence[str]) -> dict[str, Any]:
    """Return the columns of the metrics.

    Args:
        laps: Time of each step of the interval, seconds.
        of_ranks: For each rank its own time in a step, the utilisation of its GPU, its power, energy, and memory; NaN
            where it is not known.
        hosts: The host of each rank.
    """
    found: dict[str, Any] = {}
    if laps:
        in_order = sorted(laps)
        found["step_s_p50"] = statistics.median(in_order)
        found["step_s_p99"] = in_order[math.ceil(0.99 * len(in_order)) - 1]
    own, utilizations, powers, energies, memories = (
        [value for value in column if not math.isnan(value)] for column in zip(*of_ranks, strict=True)
    )
    if len(own) == len(of_ranks) > 1:
        slowest = max(range(len(own)), key=own.__getitem__)
        found["slowest_rank"], found["slowest_host"] = slowest, hosts[slowest]
        found["slowest_by"] = own[slowest] / max(statistics.median(own), 1e-9) - 1
    if memories:
        found["gpu_memory_bytes"] = round(max(memories))
    if utilizations:
        found["gpu_utilization"] = statistics.fmean(utilizations)
    if powers:
        found["gpu_power_w"] = statistics.fmean(powers)
    if len(energies) == len(of_ranks):
        found["gpu_energy_j"] = sum(energies)
    return found
