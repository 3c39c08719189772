"""What is said of a host before training: by NVML (here its answers, as no GPU is at hand), the log, and a sum."""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from rsb_cluster.errors import RsbError
from rsb_cluster.node import starts
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train import health
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.health import GpuHealth, check_gpu, name_slow


class Nvml:
    """NVML's answers about one GPU, through the arguments that the real one gets."""

    def __init__(self, *, handle: int = 0, pending: int = 0, failed: int = 0, errors: int = 0, known: bool = True):
        self._values, self._handle, self._known, self.open = (pending, failed, errors), handle, known, 0

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, device: Any) -> int:
        assert uuid == b"GPU-1"
        return self._handle

    def nvmlDeviceGetRemappedRows(self, device: Any, *rows: Any) -> int:
        for row, value in zip(rows, (0, 0, *self._values[:2]), strict=True):
            ctypes.cast(row, ctypes.POINTER(ctypes.c_uint))[0] = value
        return 0 if self._known else 3

    def nvmlDeviceGetTotalEccErrors(self, device: Any, kind: int, counter: int, count: Any) -> int:
        assert (kind, counter) == (1, 0)
        ctypes.cast(count, ctypes.POINTER(ctypes.c_ulonglong))[0] = self._values[2]
        return 0 if self._known else 3


@pytest.mark.parametrize(
    ("answers", "fault", "remark"),
    [
        ({}, "", ""),
        ({"failed": 1}, "could not be replaced", ""),
        ({"pending": 1, "errors": 2}, "only by a reset", "2 uncorrected memory errors"),
        ({"handle": 15}, "has fallen off the bus", ""),
        ({"handle": 6}, "", ""),  # not found, as in a container
        ({"known": False, "pending": 1, "errors": 1}, "", ""),  # a GPU without ECC
    ],
)
def test_what_nvml_says_of_a_gpu(answers: dict[str, Any], fault: str, remark: str) -> None:
    nvml = Nvml(**answers)
    found = check_gpu("GPU-1", library=nvml, kernel_log="")
    assert fault in found.fault and bool(fault) == bool(found.fault)
    assert remark in found.remark and bool(remark) == bool(found.remark)
    assert nvml.open == 0


def test_an_xid_of_the_hardware_is_a_remark_on_its_gpu() -> None:
    text = (
        "4,1,2,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\n"
        "4,1,2,-;NVRM: Xid (PCI:0000:3B:00): 31, pid=1, name=python, a fault of a program\n"
        "4,1,2,-;NVRM: Xid (PCI:0000:86:00): 48, pid=1, DBE\n"
    )
    assert check_gpu("GPU-1", "3b:00", Nvml(), text) == GpuHealth(remark="the kernel's log has Xid 79")
    assert check_gpu("GPU-1", "af:00", Nvml(), text) == GpuHealth()


def test_without_nvml_nothing_is_known() -> None:
    assert check_gpu("GPU-1", kernel_log="") == GpuHealth()


def test_a_slow_host_is_named() -> None:
    assert name_slow({"b": 9e9, "c": 1e9, "d": 10e9}, "a") == ["c"]
    assert name_slow({"b": 1e9, "c": 1e9}, "a") == ["a"], "what all links have in common"
    assert name_slow({"b": 1e9}, "a") == ["a", "b"]


def _rank(rank: int, folder: str, out: Any) -> None:
    """A rank whose sums are wrong if it is rank 1, which is also slow to hear what all have found."""
    import torch

    torch.set_num_threads(1)
    reduce, get = dist.all_reduce, dist.PrefixStore.get

    def late(store: dist.PrefixStore, key: str) -> bytes:
        if key == "reduction":
            time.sleep(1.0)
        return get(store, key)

    if rank == 1:
        dist.PrefixStore.get = late

    def changes_a_bit(tensor: torch.Tensor) -> None:
        reduce(tensor)
        if rank == 1 and len(tensor) > 1:
            tensor[-1] += 1

    dist.all_reduce = changes_a_bit  # as a broken link does, without a word
    try:
        ProcessGroup(Ranks(rank, rank, 2, "sum", 0, 2), Store(folder), wait_s=600, collective_s=600)
        out.put((rank, "", ""))
    except RsbError as error:
        out.put((rank, type(error).__name__, str(error)))


def found_by(rank: Callable[[int, str, Any], None], count: int, folder: Path) -> list[Any]:
    """Return what the ranks of a run in real processes find, in their order."""
    context = multiprocessing.get_context("fork")
    out: Any = context.Queue()
    ranks = [context.Process(target=rank, args=(number, str(folder), out)) for number in range(count)]
    for process in ranks:
        process.start()
    found = sorted(out.get() for _ in ranks)
    for process in ranks:
        process.join()
    return found


def test_a_wrong_sum_is_found_before_the_first_step_and_named(tmp_path: Path) -> None:
    found = found_by(_rank, 2, tmp_path)
    assert [(rank, kind) for rank, kind, _ in found] == [(0, "LostPeerError"), (1, "DeviceError")]
    assert all("a wrong sum (rank 1 on " in message for _, _, message in found)


def _slow_rank(rank: int, folder: str, out: Any) -> None:
    import torch

    torch.set_num_threads(1)
    health._SLOW["cpu"] = float("inf")  # any network is
    group = ProcessGroup(Ranks(rank, rank, 3, "slow", 0, 3), Store(folder), wait_s=600, collective_s=600)
    found = health.check_reduction(dist.PrefixStore("again", group.store), rank, ("a", "b", "b"), group.device)
    out.put((rank, found.wrong, found.slow, found.rate > 0))
    group.close()


def test_each_host_is_tried_where_the_sum_is_slow(tmp_path: Path) -> None:
    found = found_by(_slow_rank, 3, tmp_path)
    assert found == [(rank, (), ("a", "b"), True) for rank in range(3)]


def test_hosts_with_a_fault_are_excluded(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    store.write_json("spec.json", {})
    run = Run(store, "run")
    ranks = Ranks(0, 0, 1, "7", 0, 1)
    starts.report(run, ranks, "CUDA is missing", host_fault=True)
    (name,) = store.files("attempts")
    host = store.read_json(name)["host"]
    assert run.failed_hosts() == [host]
    starts.report(run, ranks, "torch is missing")
    assert run.failed_hosts() == []
    assert "host_fault" not in store.read_json(name), "as earlier versions wrote it, and read it"
