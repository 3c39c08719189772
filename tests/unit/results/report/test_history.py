"""Curves are downsample without losing their end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rsb_cluster.results.report.history import _measured, downsample


@given(st.integers(0, 500), st.integers(2, 60))
def test_a_thinned_curve_keeps_its_end_and_its_mean(number: int, points: int) -> None:
    rows = [{"epoch": float(i), "loss": float(i % 7)} for i in range(number)]
    epochs, losses = downsample(rows, "loss", points)
    assert len(epochs) == len(losses) == min(number, points)
    assert epochs == sorted(set(epochs))
    if rows:
        assert (epochs[-1], losses[-1]) == (rows[-1]["epoch"], rows[-1]["loss"])


def test_a_loss_that_is_no_number_is_left_out() -> None:
    rows = [{"epoch": 1.0, "loss": 2.0}, {"epoch": 2.0, "loss": float("nan")}, {"epoch": 3.0}]
    assert downsample(rows, "loss", 10) == ([1.0], [2.0])


def test_what_was_measured_is_said_and_nothing_else() -> None:
    assert _measured([{"kind": "train", "step": 1, "loss": 2.0}]) == {}  # of an earlier version
    slow = {"slowest_host": "n2", "slowest_by": 0.2}
    rows = [
        {"step_s_p50": 0.1, "step_s_p99": 0.3, "slowest_rank": 9, **slow},
        {"step_s_p50": 0.2, "step_s_p99": 0.4, "slowest_rank": 9, **slow},
        {"step_s_p50": 0.1, "step_s_p99": 0.3, "slowest_rank": 1, "slowest_host": "n1", "slowest_by": 0.9},
    ]
    assert _measured(rows) == {
        "step time": "p50 0.1 s, p99 0.3 s (medians over the logged intervals)",
        "slowest rank": "9 on n2, in 67% of the intervals; behind the median by 20% until its last forward pass ends",
    }
    gpu = {"gpu_memory_bytes": 40_000_000_000, "gpu_utilization": 0.9, "gpu_power_w": 500.0, "gpu_energy_j": 7.2e6}
    assert _measured([gpu, gpu | {"gpu_memory_bytes": 41_000_000_000, "gpu_power_w": 600.0}]) == {
        "GPU memory": "41.0 GB at most, of the fullest",
        "GPU utilisation": "90%",
        "GPU power": "550 W each",
        "GPU energy": "4 kWh",
    }
