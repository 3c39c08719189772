"""Curves are downsample without losing their end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rsb_cluster.results.report.history import downsample


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
