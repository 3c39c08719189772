"""What a row of metrics says of the time of steps and of GPUs, and which rank it calls the slowest."""

import math

import pytest
import torch

from rsb_cluster.train.telemetry import OwnTime, summarise

NAN = math.nan


def of_rank(own_s: float, *, gpu: tuple[float, float, float, float] = (NAN, NAN, NAN, NAN)) -> list[float]:
    return [own_s, *gpu]


def test_the_time_of_steps_is_given_by_its_median_and_its_99th_percentile() -> None:
    found = summarise([*[0.1] * 98, 0.2, 9.0], [of_rank(0.05)], ["alone"])
    assert found == {"step_s_p50": 0.1, "step_s_p99": 0.2}


def test_the_rank_that_others_wait_for_is_named_with_its_host() -> None:
    ranks = [of_rank(own) for own in (0.10, 0.10, 0.15, 0.11)]
    found = summarise([0.4], ranks, ["one", "one", "two", "two"])
    assert (found["slowest_rank"], found["slowest_host"]) == (2, "two")
    assert found["slowest_by"] == pytest.approx(0.15 / 0.105 - 1)


def test_gpus_are_summed_or_averaged_over_those_that_tell() -> None:
    ranks = [of_rank(0.1, gpu=(0.9, 400.0, 1000.0, 10e9)), of_rank(0.1, gpu=(0.7, 600.0, 3000.0, 30e9))]
    found = summarise([0.4], ranks, ["a", "b"])
    assert found["gpu_utilization"] == pytest.approx(0.8) and found["gpu_power_w"] == 500.0
    assert found["gpu_energy_j"] == 4000.0 and found["gpu_memory_bytes"] == 30_000_000_000
    one_unknown = summarise([0.4], [ranks[0], of_rank(0.1, gpu=(NAN, NAN, NAN, 30e9))], ["a", "b"])
    assert one_unknown["gpu_power_w"] == 400.0
    assert "gpu_energy_j" not in one_unknown  # a part of the energy would look like all of it


def test_what_no_rank_knows_has_no_column() -> None:
    assert summarise([], [of_rank(NAN), of_rank(0.1)], ["a", "b"]) == {}


class Event:
    """An event of a stream that happens when it is told to."""

    now = 0.0

    def record(self) -> None:
        self.at, self.happened = Event.now, False

    def query(self) -> bool:
        return self.happened

    def elapsed_time(self, later: "Event") -> float:
        return 1000 * (later.at - self.at)


def test_on_a_gpu_the_own_time_is_read_when_it_has_happened() -> None:
    made: list[Event] = []

    def new_event() -> Event:
        made.append(Event())
        return made[-1]

    own = OwnTime(torch.device("cuda"), new_event)  # type: ignore[arg-type]
    for begin, end in ((1.0, 1.5), (2.0, 2.7)):
        Event.now = begin
        own.begin()
        Event.now = end
        own.end()
    assert math.isnan(own.take())
    made[0].happened = made[1].happened = True
    assert own.take() == pytest.approx(0.5)
    made[2].happened = made[3].happened = True
    assert own.take() == pytest.approx(0.7)
