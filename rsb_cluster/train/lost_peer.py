"""Errors that another rank causes in this one, and how to tell them from this rank's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from rsb_cluster.errors import RsbError


class LostPeerError(RsbError):
    """A peer rank is lost; this rank is healthy and can resume in the next attempt."""


@contextlib.contextmanager
def lost_peer_errors() -> Iterator[None]:
    """Raise LostPeerError for the errors that a lost rank causes in its peers."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if is_lost_peer(error):
            # gloo appends advice that does not help here.
            reason = str(error).splitlines()[0].partition(". This is typically")[0]
            raise LostPeerError(f"lost a peer rank: {reason}") from error
        raise


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that a peer closed its connection or does not answer."""
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error)
    signs = (
        "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Socket closed",
        "Timed out waiting", "ncclRemoteError",
    )  # fmt: skip
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def is_nccl_error(error: BaseException) -> bool:
    """Whether NCCL raised, for whatever reason."""
    return isinstance(error, RuntimeError) and "NCCL" in str(error)
