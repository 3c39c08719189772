"""The stop flags of ranks: vectors that a collective sums."""

from __future__ import annotations

import signal

from hypothesis import given
from hypothesis import strategies as st

from rsb_cluster.node.stopping import CAUSES, MIN_SAVE_S, StopFlag


def exchange(*flags: StopFlag) -> list[str | None]:
    """The cause that each rank agrees to in a step."""
    summed = [sum(column) for column in zip(*(flag.to_vector() for flag in flags), strict=True)]
    return [flag.agree(summed) for flag in flags]


def test_nobody_stops_without_a_cause() -> None:
    flags = [StopFlag() for _ in range(3)]
    assert exchange(*flags) == [None] * 3
    assert flags[0].save_time_s(0) is None and flags[0].save_time_s(30) == 30


def test_a_notice_on_one_rank_stops_all_and_its_time_is_the_saves() -> None:
    """Whatever grace the site's own preemptions have."""
    flags = [StopFlag() for _ in range(3)]
    flags[2].reclaim(within_s=50)
    assert exchange(*flags) == ["preempted"] * 3
    for flag in flags:
        for grace_s in (0, 10, 600):
            left = flag.save_time_s(grace_s)
            assert left is not None and 45 < left <= 50
    assert flags[0].cause is None, "the notice is another rank's"


def test_notices_on_a_whole_cluster_are_not_added_up() -> None:
    flags = [StopFlag() for _ in range(200)]
    for flag in flags:
        flag.reclaim(within_s=100)
    exchange(*flags)
    left = flags[0].save_time_s(0)
    assert left is not None and 95 < left <= 100


def test_a_machine_that_outlived_its_time_is_saved_from_all_the_same() -> None:
    flags = [StopFlag(), StopFlag()]
    flags[1].reclaim(within_s=-200)
    assert exchange(*flags) == ["preempted", "preempted"]
    assert flags[0].save_time_s(0) == flags[1].save_time_s(0) == MIN_SAVE_S


def test_a_signal_has_the_grace_of_its_site() -> None:
    signalled, other = StopFlag(), StopFlag()
    signalled._on_signal(signal.SIGTERM, None)
    assert exchange(signalled, other) == ["preempted", "preempted"]
    left = signalled.save_time_s(30)
    assert left is not None and 25 < left <= 30 and other.save_time_s(30) == 30
    signalled.reclaim(within_s=8)  # a shutdown may come first, and the notice after
    left = signalled.save_time_s(30)
    assert signalled.cause == "preempted" and left is not None and left <= 8


def test_the_first_cause_stays_but_a_later_attempt_is_above_all() -> None:
    flag = StopFlag()
    flag.stop("stopped", "no GPU-hours left")
    flag.reclaim(within_s=60)
    assert (flag.cause, flag.reason) == ("stopped", "no GPU-hours left")
    flag.supersede()
    assert exchange(flag) == ["superseded"]


@given(st.lists(st.sampled_from([None, *CAUSES]), min_size=1, max_size=9))
def test_all_ranks_agree_on_the_first_cause(causes: list[str | None]) -> None:
    flags = [StopFlag() for _ in causes]
    for flag, cause in zip(flags, causes, strict=True):
        if cause:
            flag.stop(cause)  # type: ignore[arg-type]
    found = [cause for cause in CAUSES if cause in causes]
    assert exchange(*flags) == [found[0] if found else None] * len(causes)
