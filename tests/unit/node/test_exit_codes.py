"""Ranks end together."""

from __future__ import annotations

import pytest

from rsb_cluster.node.exit_codes import EXIT_FAILED, EXIT_RESTART, EXIT_STOPPED, combine_exit_codes


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([0, EXIT_RESTART], EXIT_RESTART),
        ([-9, 0], EXIT_RESTART),
        ([143, EXIT_RESTART], EXIT_RESTART),
        ([EXIT_RESTART, EXIT_FAILED], EXIT_FAILED),
        ([EXIT_STOPPED, EXIT_RESTART, -15], EXIT_STOPPED),
        ([1, EXIT_RESTART], 1),
    ],
)
def test_ranks_end_together(codes: list[int], code: int) -> None:
    assert combine_exit_codes(codes) == combine_exit_codes(codes[::-1]) == code
