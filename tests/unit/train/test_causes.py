"""What an exception means for an attempt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from rsb_cluster.train.causes import explain_end
from rsb_cluster.train.watchdog import StalledRank


@pytest.mark.parametrize(
    ("lost", "cause"), [([], "crashed"), ([StalledRank(1, "n2", "rank 1 on n2 was killed")], "lost peer")]
)
def test_an_error_of_nccl_is_a_lost_peer_only_where_one_is_missing(lost: list[StalledRank], cause: str) -> None:
    watchdog: Any = SimpleNamespace(find_lost=lambda: lost)
    error = dist.DistBackendError("NCCL error in: x.cpp:1, unhandled system error")
    found, message = explain_end(error, watchdog, 0)
    assert found == cause and "unhandled system error" in message
    assert ("NCCL_SOCKET_IFNAME" in message) == (cause == "crashed")
