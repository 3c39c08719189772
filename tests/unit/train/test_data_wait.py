"""What a device loses to waiting for data: all of a CPU's wait, and of a GPU's only when it has nothing queued."""

import time

import pytest
import torch

from rsb_cluster.train.data_wait import DataWait


class Gpu:
    """The stream of a GPU: it does what is queued in order, while the process that queues it goes on.

    Attributes:
        now: The time of the process, seconds.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._done_at = 0.0

    def queue(self, seconds: float) -> float:
        """Queue so much work; return when it will be done."""
        self._done_at = max(self.now, self._done_at) + seconds
        return self._done_at


class Event:
    """A CUDA event, of that GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = self.gpu.queue(0.0)

    def query(self) -> bool:
        return self.at <= self.gpu.now

    def elapsed_time(self, end: "Event") -> float:
        assert self.query() and end.query(), "torch refuses events that have not happened"
        return (end.at - self.at) * 1000


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def waits(gpu: Gpu) -> DataWait:
    return DataWait(torch.device("cuda"), lambda: Event(gpu))  # type: ignore[arg-type, return-value]


def test_a_gpu_that_still_computes_loses_nothing(gpu: Gpu, waits: DataWait) -> None:
    gpu.queue(5.0)
    with waits.measure():
        gpu.now += 3.0
    gpu.queue(1.0)
    assert waits.take() == 0.0
    gpu.now += 10.0
    assert waits.take() == 0.0


def test_a_gpu_loses_the_time_from_the_end_of_its_work_to_the_arrival_of_the_batch(gpu: Gpu, waits: DataWait) -> None:
    gpu.queue(2.0)
    with waits.measure():
        gpu.now += 3.0
    gpu.queue(1.0)
    assert waits.take() == pytest.approx(1.0)
    assert waits.take() == 0.0


def test_what_has_not_happened_is_reported_later_and_once(gpu: Gpu, waits: DataWait) -> None:
    """Three steps of 3 s are queued at once; the batch of the fourth comes 1 s after they are done."""
    for _ in range(3):
        with waits.measure():
            pass
        gpu.queue(3.0)
        assert waits.take() == 0.0
    with waits.measure():
        gpu.now += 10.0
    assert waits.take() == pytest.approx(1.0)
    gpu.now += 100.0
    assert waits.take() == 0.0


def test_a_cpu_loses_the_whole_wait() -> None:
    waits = DataWait(torch.device("cpu"))
    with waits.measure():
        time.sleep(0.05)
    assert waits.take() >= 0.05
    assert waits.take() == 0.0


def test_a_wait_that_ends_in_an_error_leaves_nothing_behind(gpu: Gpu, waits: DataWait) -> None:
    with pytest.raises(StopIteration), waits.measure():
        raise StopIteration
    gpu.now += 1.0
    assert waits.take() == 0.0
