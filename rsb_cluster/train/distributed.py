"""How a rank meets its peers, and how they talk."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist

from rsb_cluster.errors import MissingError, RsbError, StorageError
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.storage.store import Store

# How long rank 0 may take to answer before its address is looked up again.
CONNECT = datetime.timedelta(seconds=20)


class LostPeerError(RsbError):
    """Another rank is gone; this one is well and can go on in the next attempt."""


class DeviceError(RsbError):
    """This host does not have the GPUs that the job asks for; another one may."""


class ProcessGroup:
    """The processes of one attempt.

    They meet through a file in the run's own folder: rank 0 listens on a free port that the system picks and writes
    the address there under the attempt's name. So two elements of an array that share a node can never meet on one
    port, and no attempt meets a remainder of an earlier one.

    Args:
        ranks: Who this process is.
        folder: The run's folder.
        wait_s: How long to wait for the others.
        collective_s: How long a collective may take before the peer counts as lost.
        gpus: GPUs of a node that the job asks for, one for each rank there; 0: the CPU, and no GPU is touched. None:
            a GPU where there is one.

    Raises:
        DeviceError: The GPUs are not there.
        LostPeerError: The others were not met.
    """

    def __init__(
        self, ranks: Ranks, folder: Store, *, wait_s: float, collective_s: float, gpus: int | None = None
    ) -> None:
        self.ranks = ranks
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.device = pick_device(ranks.local_rank, gpus)
        self.host = socket.gethostname()
        self._folder = folder
        self._timeout = datetime.timedelta(seconds=wait_s)
        self.store, self._address = self._meet()
        self.hosts = self._exchange_hosts()
        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=datetime.timedelta(seconds=collective_s),
            )

    @staticmethod
    def wait_aside(ranks: Ranks, folder: Store, *, wait_s: float) -> None:
        """Wait, as a spare process, until the others have ended; a job whose first task ends may be killed.

        Raises:
            LostPeerError: They did not end orderly.
        """
        store, _ = _join(ranks, folder, datetime.timedelta(seconds=wait_s))
        with lost_peers_named():
            while not store.check(["left"]):
                time.sleep(1.0)

    def _meet(self) -> tuple[dist.TCPStore, tuple[str, int]]:
        """Return the store through which all ranks talk, and where it is."""
        if self.rank:
            return _join(self.ranks, self._folder, self._timeout)
        if private := self.ranks.address:
            # By itself the store listens on all addresses of a machine, and in a cloud one may be public.
            listener = socket.create_server((private, 0), backlog=1024)
            port, listener_fd = listener.getsockname()[1], listener.detach()
        else:
            port, listener_fd = 0, None
        store = dist.TCPStore(
            private or "0.0.0.0", port, self.world_size, True, self._timeout, wait_for_workers=False,
            master_listen_fd=listener_fd,
        )  # fmt: skip
        address = (private or _reachable_name(), store.port)
        self._folder.write_json(self.ranks.rendezvous_file, {"host": address[0], "port": address[1]})
        store.set("attempt", self.ranks.attempt_key)
        return store, address

    def _exchange_hosts(self) -> tuple[str, ...]:
        self.store.set(f"host/{self.rank}", self.host)
        return tuple(self.store.get(f"host/{rank}").decode() for rank in range(self.world_size))

    def connect(self) -> dist.TCPStore:
        """Return another connection to the ranks' common store, for another thread."""
        host, port = self._address
        return dist.TCPStore(host, port, self.world_size, False, self._timeout)

    def share(self, name: str, value: str = "") -> str:
        """Give all ranks a text of rank 0's."""
        if self.rank == 0:
            self.store.set(name, value)
        return self.store.get(name).decode()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all ranks, in place."""
        if self.world_size > 1:
            with lost_peers_named():
                dist.all_reduce(tensor)
        return tensor

    def leave_together(self, timeout_s: float = 600.0) -> None:
        """Wait until every rank has come here; rank 0, which answers the others, leaves last.

        Called after a save: some sites kill all tasks of a job when one ends, and rank 0 may still be writing.
        """
        with contextlib.suppress(RuntimeError, dist.DistError):
            self.store.add("leaving", 1)
            self._wait_for("leaving", timeout_s)
            self.store.add("left", 1)
            if self.rank == 0:
                self._wait_for("left", 10.0)
                if self.ranks.allocated > self.world_size:
                    time.sleep(3.0)  # the spare ones look once a second

    def _wait_for(self, counter: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.store.add(counter, 0) < self.world_size and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self) -> None:
        """End the process group and remove the address."""
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.rank == 0:
            with contextlib.suppress(StorageError):
                self._folder.delete(self.ranks.rendezvous_file)


def pick_device(local_rank: int, gpus: int | None) -> torch.device:
    """Return the device of a rank, and make it the present one.

    Args:
        local_rank: Its number on its node.
        gpus: As in `Group`.

    Raises:
        DeviceError: CUDA sees fewer GPUs than the job asks for.
    """
    if gpus == 0 or (gpus is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # Where a site binds each task to a GPU of its own, a rank is shown that one alone.
    is_bound = seen == 1 and "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")
    if gpus is not None and seen < gpus and not is_bound:
        raise DeviceError(
            f"{socket.gethostname()}: {gpus} GPU{'s are' if gpus > 1 else ' is'} asked for on this node, and CUDA sees "
            f"{seen or 'none'}. {_cuda()}. Use a torch for this driver, keep off this host (slurm.exclude), or ask for "
            "no GPU (--gpus-per-node 0)."
        )
    device = torch.device("cuda", local_rank % seen)
    torch.cuda.set_device(device)
    return device


def _cuda() -> str:
    """Say what decides whether CUDA works here: the wheel, the driver, and what is visible."""
    wheel = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].partition(":")[2].strip()
    except (OSError, IndexError):
        driver = "none is loaded"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        f"torch {torch.__version__} {wheel}; NVIDIA driver: {driver}; CUDA_VISIBLE_DEVICES "
        f"{'is not set' if visible is None else f'= {visible!r}'}"
    )


def _join(ranks: Ranks, folder: Store, timeout: datetime.timedelta) -> tuple[dist.TCPStore, tuple[str, int]]:
    """Return the store that rank 0 keeps, and where it is.

    The address may be that of a killed attempt until rank 0 has written its own, where the engine counts no attempts.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    problem = f"no {folder.locate(ranks.rendezvous_file)}"
    while time.monotonic() < deadline:
        try:
            return _connect(ranks, folder, timeout)
        except LostPeerError as error:
            problem = str(error)
        except MissingError:
            time.sleep(0.2)
    raise LostPeerError(
        f"rank 0 could not be met within {timeout.total_seconds():.0f} s ({problem}); "
        "is it still starting, or did it fail? See its log."
    )


def _connect(ranks: Ranks, folder: Store, timeout: datetime.timedelta) -> tuple[dist.TCPStore, tuple[str, int]]:
    card = folder.read_json(ranks.rendezvous_file)
    address = (card["host"], card["port"])
    try:
        store = dist.TCPStore(*address, ranks.world_size, False, min(timeout, CONNECT))
        met = store.get("attempt").decode()
        store.set_timeout(timeout)
    except (RuntimeError, dist.DistError) as error:
        raise LostPeerError(f"rank 0 at {address[0]}:{address[1]} does not answer: {error}") from error
    if met != ranks.attempt_key:
        raise LostPeerError(f"met attempt {met} at {address[0]}:{address[1]} instead of our own")
    return store, address


@contextlib.contextmanager
def lost_peers_named():  # type: ignore[no-untyped-def]
    """Turn the errors that a vanished rank causes in the others into LostPeerError."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if is_lost_peer(error):
            # gloo adds advice of its own, which does not help here.
            reason = str(error).splitlines()[0].partition(". This is typically")[0]
            raise LostPeerError(f"another rank is gone: {reason}") from error
        raise


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that a peer closed its connection or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "Broken pipe", "Socket closed")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _reachable_name() -> str:
    """Return a name or address under which other nodes reach this one."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        # A host that does not know its own name: the address from which it would send outwards.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1 (RFC 5737); a datagram socket sends nothing here
            return str(probe.getsockname()[0])
    return name
