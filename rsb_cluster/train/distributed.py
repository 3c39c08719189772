"""Ranks: who this process is, how it meets its peers, and how they talk. The one place that reads ranks."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from dataclasses import dataclass, replace

import submitit
import torch
import torch.distributed as dist

from rsb_cluster.errors import MissingError, RsbError, StorageError
from rsb_cluster.storage import Store

# How long rank 0 may take to answer before its address is looked up again.
CONNECT = datetime.timedelta(seconds=20)


class LostPeerError(RsbError):
    """Another rank is gone; this one is well and can go on in the next attempt."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is.

    Attributes:
        rank: Number of this process in the run, from 0.
        local_rank: Number of this process on its node.
        world_size: Processes that train.
        job_id: The scheduler's id of the job.
        restart: How often the scheduler has started this job again.
        held: Processes that the job has; more than train where they cannot share the work equally.
        address: The address of this machine on which it may listen; empty: on all, as on a cluster's own network.
    """

    rank: int
    local_rank: int
    world_size: int
    job_id: str
    restart: int
    held: int
    address: str = ""

    @staticmethod
    def from_environment() -> Ranks:
        """Read what submitit and the scheduler say."""
        env = submitit.JobEnvironment()
        restart = os.environ.get("RSB_LOCAL_RESTART") or os.environ.get("SLURM_RESTART_COUNT") or "0"
        address = os.environ.get("RSB_ADDRESS", "")
        return Ranks(env.global_rank, env.local_rank, env.num_tasks, env.job_id, int(restart), env.num_tasks, address)

    def sharing(self, parts: int) -> Ranks:
        """Return the same process in the largest world that shares so many parts equally; some may be spare."""
        return replace(self, world_size=max(w for w in range(1, self.held + 1) if parts % w == 0))

    @property
    def is_spare(self) -> bool:
        """Whether there is nothing to do for this process in this attempt."""
        return self.rank >= self.world_size

    @property
    def attempt_key(self) -> str:
        """A name that no other attempt of any job of this scheduler has."""
        return f"{self.job_id}-{self.restart}"

    @property
    def card(self) -> str:
        """The file in the run's folder where rank 0 says how it is reached."""
        return f"rendezvous/{self.attempt_key}.json"


class Group:
    """The processes of one attempt.

    They meet through a file in the run's own folder: rank 0 listens on a free port that the system picks and writes
    the address there under the attempt's name. So two elements of an array that share a node can never meet on one
    port, and no attempt meets a remainder of an earlier one.

    Args:
        ranks: Who this process is.
        folder: The run's folder.
        wait_s: How long to wait for the others.
        collective_s: How long a collective may take before the peer counts as lost.
    """

    def __init__(self, ranks: Ranks, folder: Store, *, wait_s: float, collective_s: float) -> None:
        self.ranks = ranks
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.device = self._pick_device()
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

    def _pick_device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", self.ranks.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

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
        self._folder.write_json(self.ranks.card, {"host": address[0], "port": address[1]})
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
                if self.ranks.held > self.world_size:
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
                self._folder.delete(self.ranks.card)


def _join(ranks: Ranks, folder: Store, timeout: datetime.timedelta) -> tuple[dist.TCPStore, tuple[str, int]]:
    """Return the store that rank 0 keeps, and where it is.

    The address may be that of a killed attempt until rank 0 has written its own, where the engine counts no attempts.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    problem = f"no {folder.locate(ranks.card)}"
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
    card = folder.read_json(ranks.card)
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
