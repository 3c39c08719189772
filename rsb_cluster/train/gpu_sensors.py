"""What NVIDIA's management library (NVML) measures of a GPU; without the library or a right to it, nothing is known."""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_EVERY_S = 1.0


@dataclass(frozen=True)
class Readings:
    """Of one GPU, since the last reading; NaN for what is not known.

    Attributes:
        utilization: Share of the time in which a kernel ran, 0 to 1; says nothing about how much of the GPU it used.
        power_w: Mean power, watts.
        energy_j: Energy, joules.
    """

    utilization: float = math.nan
    power_w: float = math.nan
    energy_j: float = math.nan


class GpuSensors:
    """Reads a GPU's sensors once a second on a thread, which costs the training nothing.

    Args:
        uuid: The GPU's UUID as torch gives it, without NVML's ``GPU-``.
    """

    def __init__(self, uuid: str) -> None:
        self._lock = threading.Lock()
        self._utilizations: list[float] = []
        self._powers: list[float] = []
        self._stopped = threading.Event()
        self._nvml, self._handle = _open(uuid)
        self._energy_mj = self._energy()
        if self._handle is not None:
            threading.Thread(target=self._keep_sampling, name="gpu-sensors", daemon=True).start()

    def take(self) -> Readings:
        """Return the readings since the last call."""
        with self._lock:
            utilizations, self._utilizations = self._utilizations, []
            powers, self._powers = self._powers, []
        before, self._energy_mj = self._energy_mj, self._energy()
        used_mj = self._energy_mj - before
        return Readings(
            statistics.fmean(utilizations) if utilizations else math.nan,
            statistics.fmean(powers) if powers else math.nan,
            used_mj / 1000 if used_mj >= 0 else math.nan,  # the counter starts anew with the driver
        )

    def close(self) -> None:
        """Stop the thread."""
        self._stopped.set()

    def _keep_sampling(self) -> None:
        while not self._stopped.wait(_EVERY_S):
            self._sample()

    def _sample(self) -> None:
        utilization = self._read(lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100)
        power = self._read(lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000)
        with self._lock:
            self._utilizations += [] if math.isnan(utilization) else [utilization]
            self._powers += [] if math.isnan(power) else [power]

    def _energy(self) -> float:
        return self._read(lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu))

    def _read(self, ask: Callable[[Any, Any], float]) -> float:
        """Return an answer of NVML; NaN if it has none, as each generation of GPUs has other sensors."""
        if self._handle is None:
            return math.nan
        try:
            return float(ask(self._nvml, self._handle))
        except self._nvml.NVMLError:
            return math.nan


def _open(uuid: str) -> tuple[Any, Any]:
    """Return NVML and its handle of a GPU; the handle is None without access, as to a part of a GPU (MIG)."""
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return pynvml, None
