"""The next batch is copied and normalised beside the computation, before anything is waited for."""

from collections.abc import Callable, Iterator

import pytest
import torch

from rsb_cluster.train.input.loader import Batch
from rsb_cluster.train.input.to_device import OnDevice, ToDevice


def batch(number: int) -> Batch:
    numbers = torch.full((2,), number)
    return Batch(torch.full((2, 3, 1, 1), number, dtype=torch.uint8), numbers, numbers, numbers >= 0)


class Gpu:
    """Two streams: what is queued beside the computation is only done when something waits for it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._queued: list[OnDevice] = []

    def queue(self, work: Callable[[], OnDevice]) -> OnDevice:
        result = work()
        self.log.append(f"copy {int(result.labels[0])}")
        self._queued.append(result)
        return result

    def join(self, result: OnDevice) -> None:
        assert self._queued.pop(0) is result, "the computation waits for what it uses"
        assert not self._queued, "one batch ahead, not more"
        self.log.append(f"join {int(result.labels[0])}")


class Source:
    """Batches that arrive when the test says so."""

    def __init__(self, gpu: Gpu, count: int, error: Exception | None = None) -> None:
        self.arrived, self._gpu, self._count, self._error = 0, gpu, count, error

    def ready(self) -> bool:
        return self.arrived > 0

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self._count):
            if not self.arrived:
                self._gpu.log.append("wait")
            self.arrived = max(0, self.arrived - 1)
            yield batch(number)
        if self._error is not None:
            raise self._error


def normalise(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 2


def train(gpu: Gpu, moved: ToDevice, number: int) -> None:
    taken = moved.take()
    assert torch.equal(taken.images, torch.full((2, 3, 1, 1), number / 2)) and taken.labels.tolist() == [number] * 2
    gpu.log.append(f"compute {number}")
    moved.prefetch()
    gpu.log.append("read reports")


def made(gpu: Gpu, source: Source, *, side: bool = True) -> ToDevice:
    return ToDevice(iter(source), source.ready, torch.device("cpu"), normalise, gpu if side else None)


def test_the_copy_of_the_next_batch_is_queued_before_the_reports_are_waited_for():
    gpu = Gpu()
    source = Source(gpu, 3)
    moved = made(gpu, source)
    source.arrived = 3
    for number in range(3):
        train(gpu, moved, number)
    steps = [f"join {i}|compute {i}|copy {i + 1}|read reports" for i in range(2)]
    assert "|".join(gpu.log) == "|".join(["copy 0", *steps, "join 2|compute 2|read reports"])


def test_a_batch_that_has_not_arrived_is_waited_for_only_when_it_is_needed():
    gpu = Gpu()
    moved = made(gpu, Source(gpu, 2))
    for number in range(2):
        train(gpu, moved, number)
    assert gpu.log[:4] == ["wait", "copy 0", "join 0", "compute 0"]
    assert gpu.log[4:7] == ["read reports", "wait", "copy 1"]


def test_an_error_ahead_is_raised_only_if_the_batch_is_needed():
    for error, expected in ((None, StopIteration), (ZeroDivisionError("a bug"), ZeroDivisionError)):
        gpu = Gpu()
        source = Source(gpu, 1, error)
        moved = made(gpu, source)
        source.arrived = 9
        train(gpu, moved, 0)
        moved.prefetch()
        with pytest.raises(expected):
            moved.take()


def test_on_a_cpu_nothing_is_taken_ahead():
    gpu = Gpu()
    source = Source(gpu, 2)
    moved = made(gpu, source, side=False)
    source.arrived = 2
    train(gpu, moved, 0)
    assert source.arrived == 1 and gpu.log == ["compute 0", "read reports"]
