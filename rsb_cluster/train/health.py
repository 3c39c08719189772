"""What is wrong with a host before training begins: its GPUs, by NVML and the kernel's log, and its network.

A GPU that must not be used is a fault: its rank leaves, the others name it. What may be harmless, or only slow, is a
remark: training begins, and ``--exclude-failed-hosts`` knows the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

# nvml.h: an uncorrected error, counted since the driver was loaded; what a GPU answers that fell off the bus.
_UNCORRECTED, _VOLATILE = 1, 0
_LOST = {15: "has fallen off the bus", 16: "needs a reset"}

# Xids of the hardware, in NVIDIA's catalogue; those of programs, such as 13, 31 and 43, say nothing of a GPU.
_XIDS = {48, 62, 64, 74, 79, 92, 94, 95, 110, 119, 120, 136, 140, 143}
_XID = re.compile(r"NVRM: Xid \(PCI:(?:[0-9a-f]{4}:)?([0-9a-f]{2}:[0-9a-f]{2})[^)]*\): (\d+)", re.I)

# Numbers in the all-reduce that is checked and timed.
_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 24}
# A slower one is worth a word, bytes per second of a link: 10 Gbit/s Ethernet has more. gloo is for small trainings.
_SLOW = {"cpu": 20e6, "cuda": 1e9}
# A host whose link has less than this share of what hosts have in the middle is named.
_SLOW_SHARE = 0.5


@dataclass(frozen=True)
class GpuHealth:
    """What is known of a GPU.

    Attributes:
        fault: Why it must not be used; empty: nothing.
        remark: What may be harmless; empty: nothing.
    """

    fault: str = ""
    remark: str = ""


def check_gpu(uuid: str, bus: str = "", library: Any = None, kernel_log: str | None = None) -> GpuHealth:
    """Return what NVML and the kernel's log say of a GPU; nothing where they are not to be had.

    Args:
        uuid: The GPU, as NVML names it (``GPU-...``).
        bus: Its PCI bus and device, ``3b:00``; empty: unknown.
        library: NVML; None: the driver's.
        kernel_log: The kernel's log; None: this host's, where it can be read.
    """
    log_text = _read_kernel_log() if kernel_log is None else kernel_log
    xids = {int(xid) for place, xid in _XID.findall(log_text) if bus and place.lower() == bus.lower()} & _XIDS
    remarks = [f"the kernel's log has Xid {', '.join(map(str, sorted(xids)))}"] if xids else []
    try:
        nvml = library or ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            raise OSError("NVML does not start")
    except OSError:
        return GpuHealth(remark="; ".join(remarks))
    try:
        device = ctypes.c_void_p()
        if code := nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device)):
            return GpuHealth(f"NVML says that it {_LOST[code]}" if code in _LOST else "", "; ".join(remarks))
        pending, failed, unused = ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint()
        rows = [ctypes.byref(unused), ctypes.byref(unused), ctypes.byref(pending), ctypes.byref(failed)]
        fault = ""
        if not nvml.nvmlDeviceGetRemappedRows(device, *rows):
            if failed.value:
                fault = "NVML says that a broken row of its memory could not be replaced"
            elif pending.value:
                fault = "NVML says that a broken row of its memory is replaced only by a reset"
        errors = ctypes.c_ulonglong()
        if not nvml.nvmlDeviceGetTotalEccErrors(device, _UNCORRECTED, _VOLATILE, ctypes.byref(errors)) and errors.value:
            remarks.append(f"NVML counts {errors.value} uncorrected memory errors since the driver was loaded")
        return GpuHealth(fault, "; ".join(remarks))
    finally:
        nvml.nvmlShutdown()


def _read_kernel_log() -> str:
    """Return the kernel's messages; empty where this user may not read them."""
    found = b""
    with contextlib.suppress(OSError):
        file = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        try:
            while record := os.read(file, 1 << 13):  # one message a read; BlockingIOError after the last
                found += record
        finally:
            os.close(file)
    return found.decode(errors="replace")


@dataclass(frozen=True)
class Reduction:
    """The first all-reduce of an attempt.

    Attributes:
        wrong: Ranks whose result was wrong.
        slow: Hosts whose link is slower than that of others.
        rate: Bytes per second of a link; 0 if there is one rank.
    """

    wrong: tuple[int, ...] = ()
    slow: tuple[str, ...] = ()
    rate: float = 0.0


def check_reduction(store: dist.Store, rank: int, hosts: Sequence[str], device: torch.device) -> Reduction:
    """Sum numbers whose sum is known over all ranks, and return what was found, the same on every rank.

    Args:
        store: The common store.
        rank: This rank.
        hosts: Host of each rank.
        device: Device of this rank.
    """
    world_size = len(hosts)
    numbers = torch.arange(_NUMBERS[device.type], device=device, dtype=torch.float32) % 251
    expected = numbers * (world_size * (world_size + 1) // 2)  # small integers: exact in any order
    results = []
    for _ in range(2):  # connections are made by the first
        summed = numbers * (rank + 1)
        dist.all_reduce(summed[:1])  # the ranks begin together
        started = time.monotonic()
        dist.all_reduce(summed[1:])
        results.append(bool((summed[1:] == expected[1:]).all()))  # waits for the device
        seconds = time.monotonic() - started
    rate = 2 * (world_size - 1) / world_size * numbers.nbytes / max(seconds, 1e-9)
    store.set(f"reduction/{rank}", json.dumps([all(results), rate]))
    if rank == 0:
        found = [json.loads(text) for text in store.multi_get([f"reduction/{r}" for r in range(world_size)])]
        wrong = [r for r, (right, _) in enumerate(found) if not right]
        slowest = min(value for _, value in found)
        store.set("reduction", json.dumps([wrong, slowest, slowest < _SLOW[device.type] and len(set(hosts)) > 1]))
    wrong, slowest, is_slow = json.loads(store.get("reduction"))
    slow = _slow_hosts(store, rank, hosts, numbers) if is_slow and not wrong else ()
    return Reduction(tuple(wrong), slow, slowest)


def _slow_hosts(store: dist.Store, rank: int, hosts: Sequence[str], numbers: torch.Tensor) -> tuple[str, ...]:
    """Return the hosts that are slow: each in turn sends numbers to rank 0, and gets them back."""
    leaders = {host: hosts.index(host) for host in hosts if host != hosts[0]}
    rates: dict[str, float] = {}
    for host, leader in leaders.items():
        for _ in range(2):  # connections are made by the first
            started = time.monotonic()
            if rank == leader:
                dist.send(numbers, 0)
                dist.recv(numbers, 0)
            elif rank == 0:
                dist.recv(numbers, leader)
                dist.send(numbers, leader)
            if rank == 0:
                float(numbers[-1])  # waits for the device
                rates[host] = 2 * numbers.nbytes / max(time.monotonic() - started, 1e-9)
    if rank == 0:
        store.set("slow hosts", json.dumps(name_slow(rates, hosts[0])))
    return tuple(json.loads(store.get("slow hosts")))


def name_slow(rates: Mapping[str, float], first: str) -> list[str]:
    """Return the hosts whose link is slow.

    Args:
        rates: Bytes per second between each other host and the first.
        first: The host of rank 0; it is named where all links to it are equally slow and there are several.
    """
    middle = statistics.median(rates.values())
    slow = [host for host, rate in rates.items() if rate < _SLOW_SHARE * middle]
    return slow or ([first] if len(rates) > 1 else [first, *rates])
