"""The address on which rank 0 listens."""

from __future__ import annotations

import pytest

from rsb_cluster.node.ranks import Ranks


@pytest.mark.parametrize(
    ("nodes", "given", "address"),
    [("1", "", "127.0.0.1"), ("2", "", ""), ("1", "10.0.0.7", "10.0.0.7"), ("2", "10.0.0.7", "10.0.0.7")],
)
def test_ranks_of_one_host_need_no_network_and_the_user_has_the_last_word(
    monkeypatch: pytest.MonkeyPatch, nodes: str, given: str, address: str
) -> None:
    local = {"JOB_ID": "7", "NTASKS": "2", "NODEID": "0", "GLOBALID": "1", "LOCALID": "1", "JOB_NUM_NODES": nodes}
    for name, value in {f"SUBMITIT_LOCAL_{key}": value for key, value in local.items()}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("RSB_ADDRESS", given)
    assert Ranks.from_environment().address == address
