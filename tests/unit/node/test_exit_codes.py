"""Ranks end together."""

from __future__ import annotations

import pytest

from rsb_cluster.node.exit_codes import EXIT_AGAIN, EXIT_FAILED, EXIT_STOPPED, together


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([0, EXIT_AGAIN], EXIT_AGAIN),
        ([-9, 0], EXIT_AGAIN),
        ([143, EXIT_AGAIN], EXIT_AGAIN),
        ([EXIT_AGAIN, EXIT_FAILED], EXIT_FAILED),
        ([EXIT_STOPPED, EXIT_AGAIN, -15], EXIT_STOPPED),
        ([1, EXIT_AGAIN], 1),
    ],
)
def test_ranks_end_together(codes: list[int], code: int) -> None:
    assert together(codes) == together(codes[::-1]) == code
