"""How ranks find rank 0, and who can take part in an attempt."""

from __future__ import annotations

import datetime
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from rsb_cluster.node import addresses
from rsb_cluster.node.addresses import LOOPBACK
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.storage.store import Store
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.lost_peer import LostPeerError
from rsb_cluster.train.rendezvous import _connect

RANKS = Ranks(0, 0, 1, "test", 0, 1)
WAIT = datetime.timedelta(seconds=60)


def listening() -> set[str]:
    """Return the TCP addresses, as the kernel writes them, on which this process listens."""
    sockets = {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    rows = [
        row.split() for name in ("tcp", "tcp6") for row in Path("/proc/self/net", name).read_text().splitlines()[1:]
    ]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


@pytest.mark.parametrize(("address", "written"), [("127.0.0.1", "0100007F"), ("127.0.0.2", "0200007F")])
def test_rank_0_listens_on_the_address_that_it_publishes_and_on_no_other(
    tmp_path: Path, address: str, written: str
) -> None:
    before = listening()
    group = ProcessGroup(Ranks(0, 0, 1, "test", 0, 1, address), Store(tmp_path), wait_s=60, collective_s=60)
    (opened,) = listening() - before
    published = Store(tmp_path).read_json(RANKS.rendezvous_file)
    assert published["host"] == address
    assert opened == f"{written}:{published['port']:04X}"
    group.close()
    assert not Store(tmp_path).exists(RANKS.rendezvous_file)


def test_it_is_reached_by_each_address_that_it_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of two networks; from some hosts the first address leads nowhere, or to somebody else."""
    monkeypatch.setattr(addresses, "reachable_addresses", lambda: ["127.0.0.2", "127.0.0.3", "::1"])
    before = listening()
    folder, ranks = Store(tmp_path), Ranks(0, 0, 1, "test", 0, 1, "")
    group = ProcessGroup(ranks, folder, wait_s=60, collective_s=60)
    opened = listening() - before
    published = folder.read_json(ranks.rendezvous_file)
    places = [[published["host"], published["port"]], *published["others"]]
    assert [host for host, _ in places] == ["127.0.0.2", "127.0.0.3", "::1"]
    assert {address.split(":")[1] for address in opened} == {f"{port:04X}" for _, port in places}
    assert len(opened) == 3
    with socket.create_server((LOOPBACK, 0)) as gone:
        nowhere = [LOOPBACK, gone.getsockname()[1]]
        gone.close()
        stranger = ProcessGroup(replace(RANKS, job_id="stranger"), folder, wait_s=60, collective_s=60)
        other = folder.read_json("rendezvous/stranger-0.json")
        for last in places:
            first = (nowhere, [other["host"], other["port"]], last)
            (host, port), *others = first
            folder.write_json(ranks.rendezvous_file, published | {"host": host, "port": port, "others": others})
            store, reached = _connect(ranks, folder, WAIT)
            assert [reached.host, reached.port] == last
            store.set(f"from {last[0]}", "here")
            assert group.store.get(f"from {last[0]}") == b"here"
        stranger.close()
    group.close()
    left = {address.split(":")[1] for address in listening() - before}
    assert not left & {f"{port:04X}" for _, port in places[1:]}, "torch's store goes with its last user"


def test_only_who_can_read_the_runs_folder_takes_part(tmp_path: Path) -> None:
    folder, other = Store(tmp_path / "run"), Store(tmp_path / "other")
    group = ProcessGroup(RANKS, folder, wait_s=60, collective_s=60)
    published = folder.read_json(RANKS.rendezvous_file)
    assert _connect(RANKS, folder, WAIT)[0].get("attempt") == b"test-0"
    stranger = dist.TCPStore(published["host"], published["port"], 1, False, WAIT)
    assert not stranger.check(["attempt"]) and not stranger.check(["card of all"])
    stranger.set("attempt", "mine")
    stranger.set("card of all", "[]")
    assert group.store.get("attempt") == b"test-0" and group.connect().get("card of all") != b"[]"
    other.write_json(RANKS.rendezvous_file, published | {"prefix": "0"})
    with pytest.raises(LostPeerError, match="belongs to another attempt"):
        _connect(RANKS, other, WAIT)
    group.close()


def test_an_address_that_this_host_has_not_is_said_with_what_to_set(tmp_path: Path) -> None:
    ranks = Ranks(0, 0, 1, "test", 0, 1, "192.0.2.1")
    with pytest.raises(LostPeerError, match=rf"{socket.gethostname()} cannot listen .* 192\.0\.2\.1: .* RSB_ADDRESS"):
        ProcessGroup(ranks, Store(tmp_path), wait_s=60, collective_s=60)
