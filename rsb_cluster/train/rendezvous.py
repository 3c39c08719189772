"""How the ranks of an attempt find each other: by a file in the run's own folder.

Rank 0 listens on its addresses, at free ports that the system picks, and writes them there under the name of the
start. So two array tasks on one node never share a port, and no attempt connects to the remains of an earlier one. The
other ranks take the first address that they reach.
"""

from __future__ import annotations

import contextlib
import datetime
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch.distributed as dist

from rsb_cluster.errors import MissingError
from rsb_cluster.node.addresses import listen
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.relay import Relay
from rsb_cluster.storage.store import Store
from rsb_cluster.train.lost_peer import LostPeerError

# How long rank 0 may take to answer before its addresses are read again.
CONNECT_TIMEOUT = datetime.timedelta(seconds=20)
# How long a connection to one of its addresses may take: some lead nowhere from here.
_ADDRESS_S = 3.0


@dataclass(frozen=True)
class Rendezvous:
    """Where the common store of all ranks is; a file in the run's folder, which its owner alone can read.

    Attributes:
        host: Address of rank 0.
        port: Its port.
        prefix: A random prefix of all keys: whoever connects by accident finds none, and changes none.
        others: Its further addresses, and the port at each.
    """

    host: str
    port: int
    prefix: str
    others: tuple[tuple[str, int], ...] = ()

    def reached(self) -> Iterator[Rendezvous]:
        """Yield the places, in the order of the file, that answer from here; none of them need be rank 0."""
        for host, port in ((self.host, self.port), *self.others):
            with contextlib.suppress(OSError), socket.create_connection((host, port), _ADDRESS_S):
                yield replace(self, host=host, port=port, others=())

    def connect(self, world_size: int, timeout: datetime.timedelta) -> dist.Store:
        """Return a new connection to the store."""
        return dist.PrefixStore(self.prefix, dist.TCPStore(self.host, self.port, world_size, False, timeout))


def meet(ranks: Ranks, folder: Store, timeout: datetime.timedelta) -> tuple[dist.Store, Rendezvous, Relay | None]:
    """Return the common store of all ranks, where it is, and on rank 0 what relays its other addresses, if any.

    Args:
        ranks: The rank of this process; rank 0 hosts the store.
        folder: The run's folder.
        timeout: Of the rendezvous, and of each use of the store.

    Raises:
        LostPeerError: This host cannot listen, or rank 0 is not found in time.
    """
    if ranks.rank:
        return *join(ranks, folder, timeout), None
    try:
        # The store would listen on all addresses of a machine, and in a cloud one may be public.
        (listener, host), *others = listen(ranks.address)
    except OSError as error:
        raise LostPeerError(
            f"{socket.gethostname()} cannot listen for the other ranks: {error}. Set RSB_ADDRESS to an address of this "
            "host that the other nodes reach."
        ) from error
    port = listener.getsockname()[1]
    server = dist.TCPStore(
        host, port, ranks.world_size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    places = tuple((address, int(other.getsockname()[1])) for other, address in others)
    relay = Relay([other for other, _ in others], (host, port)) if others else None
    rendezvous = Rendezvous(host, port, secrets.token_hex(16), places)
    store = dist.PrefixStore(rendezvous.prefix, server)
    store.set("attempt", ranks.attempt_key)
    folder.write_json(ranks.rendezvous_file, asdict(rendezvous))
    return store, rendezvous, relay


def join(ranks: Ranks, folder: Store, timeout: datetime.timedelta) -> tuple[dist.Store, Rendezvous]:
    """Return the store of rank 0, and where it is.

    In a cloud, the file may have the address of a killed attempt until rank 0 writes its own.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    problem = f"{folder.locate(ranks.rendezvous_file)} is missing"
    while time.monotonic() < deadline:
        try:
            return _connect(ranks, folder, timeout)
        except LostPeerError as error:
            problem = str(error)
        except MissingError:
            time.sleep(0.2)
    raise LostPeerError(
        f"no rendezvous with rank 0 within {timeout.total_seconds():.0f} s ({problem}). "
        "It may still be starting, or have failed: see its log."
    )


def _connect(ranks: Ranks, folder: Store, timeout: datetime.timedelta) -> tuple[dist.Store, Rendezvous]:
    values = folder.read_json(ranks.rendezvous_file)
    published = Rendezvous(**values | {"others": tuple((host, port) for host, port in values.get("others", ()))})
    where = ", ".join(f"{host}:{port}" for host, port in ((published.host, published.port), *published.others))
    problem = f"rank 0 does not answer at {where}"
    for reached in published.reached():
        try:
            store = reached.connect(ranks.world_size, min(timeout, CONNECT_TIMEOUT))
            is_ours = store.check(["attempt"]) and store.get("attempt").decode() == ranks.attempt_key
            store.set_timeout(timeout)
        except (RuntimeError, dist.DistError) as error:
            problem = f"rank 0 at {reached.host}:{reached.port} does not answer: {error}"
            continue
        if is_ours:
            return store, reached
        problem = f"{reached.host}:{reached.port} belongs to another attempt"
    raise LostPeerError(problem)
