"""How the decoding processes of ranks on one node find each other, to share the work (see ``decoder_process``)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from rsb_cluster.data.global_batch import Share
from rsb_cluster.train.input.decoder import same_user
from rsb_cluster.train.input.sharing import Sharing
from rsb_cluster.train.lost_peer import LostPeerError

log = logging.getLogger(__name__)

Gather = Callable[[str, str], list[str]]


@dataclass(frozen=True)
class Neighbours:
    """The other ranks of this node whose decoding processes share the work with that of this rank.

    Attributes:
        sharing: Who decodes what.
        listener: On which the other ranks reach the decoding process of this one.
        sockets: To the decoding processes of the others, by their numbers in ``sharing``.
    """

    sharing: Sharing
    listener: socket.socket
    sockets: dict[int, socket.socket]

    def hello(self, message: bytes, descriptor: int) -> dict[int, Connection]:
        """Pass each of them a message and a descriptor, and return the connections.

        Raises:
            LostPeerError: A decoding process has ended.
        """
        connections = {}
        for number, peer in self.sockets.items():
            try:
                socket.send_fds(peer, [message], [descriptor])
            except OSError as error:
                raise LostPeerError(f"lost a peer rank: the process that decodes for it has ended: {error}") from error
            connections[number] = Connection(peer.detach())
        return connections


def find_neighbours(gather: Gather, rank: int, shares: Sequence[Share], groups: Sequence[range]) -> Neighbours | None:
    """Return the ranks of this node that share images with this one; called by all ranks of a run, once an attempt.

    Two ranks are on one node if they have the same kernel, network namespace and user, whatever their hosts are called;
    then they reach each other by abstract Unix sockets, also from different containers.

    Args:
        gather: Returns the texts of all ranks under a name (``ProcessGroup.gather``).
        rank: This rank.
        shares: What each rank computes of a global batch.
        groups: The groups of virtual ranks that share images (``order.groups_of``).

    Returns:
        None where no other rank of the node needs images of this one, or one could not be reached.
    """
    listener = socket.socket(socket.AF_UNIX)
    address = f"rsb-decoder-{secrets.token_hex(16)}"
    listener.bind(f"\0{address}")
    listener.listen(socket.SOMAXCONN)
    cards = [json.loads(text) for text in gather("decoder", json.dumps({"node": _node(), "address": address}))]
    here = [other for other, card in enumerate(cards) if card["node"] == cards[rank]["node"]]
    sharing = Sharing.among([shares[other] for other in here], here.index(rank))
    sockets: dict[int, socket.socket] = {}
    problem = ""
    for number in sharing.peers(groups):
        try:
            sockets[number] = _connect(cards[here[number]]["address"])
        except OSError as error:
            problem = f"rank {here[number]}: {error}"
    # All of a node share, or none.
    if any(text for other, text in enumerate(gather("decoder reached", problem)) if other in here):
        if problem:
            log.warning("the ranks of this node do not share the decoding of images: no way to %s", problem)
        for peer in sockets.values():
            peer.close()
        sockets = {}
    if not sockets:
        listener.close()
        return None
    return Neighbours(sharing, listener, sockets)


def _node() -> str:
    """Return what ranks have in common if they can share memory by Unix sockets."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/net').stat().st_ino} {os.getuid()}"


def _connect(address: str) -> socket.socket:
    """Connect to a rank's listener. Raises OSError, also where another user listens."""
    peer = socket.socket(socket.AF_UNIX)
    with _closed_on_error(peer):
        peer.connect(f"\0{address}")
        if not same_user(peer):
            raise PermissionError("another user listens there")
    return peer


@contextlib.contextmanager
def _closed_on_error(peer: socket.socket) -> Iterator[None]:
    try:
        yield
    except OSError:
        peer.close()
        raise
