"""What the ranks tell each other: a stop that all leave after the same batch of an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.storage.store import Store
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.exchange import StopVote


@pytest.mark.parametrize("late", [False, True])
def test_a_vote_is_read_at_once_or_with_the_next(tmp_path: Path, late: bool) -> None:
    group, flag = ProcessGroup(Ranks(0, 0, 1, "vote", 0, 1), Store(tmp_path), wait_s=60, collective_s=60), StopFlag()
    vote = StopVote(group, flag, late=late)
    assert vote.take() is None
    flag.stop("preempted", "")
    assert vote.take() == (None if late else "preempted")
    assert vote.take() == "preempted"
    group.close()
