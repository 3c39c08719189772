"""The process group of an attempt: rendezvous, collectives, and errors of lost peers."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from rsb_cluster.errors import ConfigError, MissingError, RsbError, StorageError
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.storage.store import Store

log = logging.getLogger(__name__)

# How long rank 0 may take to answer before its address is read again.
CONNECT_TIMEOUT = datetime.timedelta(seconds=20)


class LostPeerError(RsbError):
    """A peer rank is lost; this rank is healthy and can resume in the next attempt."""


# Of torch and NCCL, unless the user has set them. A peer that dies leaves the kernels of the others waiting forever;
# torch's own handling aborts the process a while later (SIGABRT, without a word of which rank it was, or an end for a
# save). The watchdog knows the rank sooner, so torch is to leave errors alone, and its monitor not to abort the
# process while the watchdog's longer limit for a stall runs; then there is nothing to dump either.
NCCL_DEFAULTS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}


class DeviceError(RsbError):
    """This host does not have the GPUs that the job requests; another host may."""


class ProcessGroup:
    """The processes of one attempt.

    The rendezvous uses a file in the run's own folder: rank 0 listens on a free port that the system picks, and writes
    its address there under the name of the start. So two array tasks on one node never share a port, and no attempt
    connects to the remains of an earlier one.

    Args:
        ranks: The rank of this process.
        folder: The run's folder.
        wait_s: Timeout of the rendezvous, seconds.
        collective_s: Timeout of a collective, seconds, after which a peer counts as lost.
        gpus: GPUs per node that the job requests, one for each rank; 0: the CPU, and no GPU is touched; None: a GPU if
            there is one.

    Raises:
        DeviceError: The GPUs are not there.
        LostPeerError: The rendezvous failed.
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
        self.store, self._address = self._rendezvous()
        cards = self._exchange_cards()
        self.hosts = tuple(card["host"] for card in cards)
        self.gpu_models = check_gpus(cards)
        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            if backend == "nccl":
                for name, value in NCCL_DEFAULTS.items():
                    os.environ.setdefault(name, value)
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=datetime.timedelta(seconds=collective_s),
            )

    @staticmethod
    def wait_idle(ranks: Ranks, folder: Store, *, wait_s: float) -> None:
        """Wait, as an idle process, until rank 0 exits; a site may kill a job when its first task exits.

        Raises:
            LostPeerError: Rank 0 did not exit in order.
        """
        store, _ = _join(ranks, folder, datetime.timedelta(seconds=wait_s))
        with lost_peer_errors():
            while not store.check(["exited"]):
                time.sleep(1.0)

    def _rendezvous(self) -> tuple[dist.TCPStore, tuple[str, int]]:
        """Return the common store of all ranks, and its address."""
        if self.rank:
            return _join(self.ranks, self._folder, self._timeout)
        if private := self.ranks.address:
            # By default the store listens on all addresses of a machine, and in a cloud one may be public.
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

    def _exchange_cards(self) -> list[dict[str, str]]:
        """Return the host and the GPU of each rank. Rank 0 gathers them: W ranks must not make W times W requests."""
        card = {"host": self.host, "gpu": "", "model": ""}
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            card |= {"gpu": str(properties.uuid), "model": properties.name}
        self.store.set(f"card/{self.rank}", json.dumps(card))
        if self.rank == 0:
            contents = self.store.multi_get([f"card/{rank}" for rank in range(self.world_size)])
            self.store.set("cards", json.dumps([json.loads(content) for content in contents]))
        cards: list[dict[str, str]] = json.loads(self.store.get("cards"))
        return cards

    def connect(self) -> dist.TCPStore:
        """Return a new connection to the common store, for another thread."""
        host, port = self._address
        return dist.TCPStore(host, port, self.world_size, False, self._timeout)

    def broadcast(self, name: str, value: str = "") -> str:
        """Return the text that rank 0 passes, on all ranks."""
        if self.rank == 0:
            self.store.set(name, value)
        return self.store.get(name).decode()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            with lost_peer_errors():
                dist.all_reduce(tensor)
        return tensor

    def exit_together(self, timeout_s: float = 600.0) -> None:
        """Wait until every rank has called this; rank 0, which hosts the store, exits last.

        Called after a save: some sites kill all tasks of a job when one exits, and rank 0 may still be writing.
        """
        with contextlib.suppress(RuntimeError, dist.DistError):
            self.store.add("exiting", 1)
            self._wait_for("exiting", timeout_s)
            self.store.add("exited", 1)
            if self.rank == 0:
                self._wait_for("exited", 10.0)
                if self.ranks.allocated > self.world_size:
                    time.sleep(3.0)  # idle processes poll once a second

    def _wait_for(self, counter: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.store.add(counter, 0) < self.world_size and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self) -> None:
        """Destroy the process group and remove the rendezvous file."""
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.rank == 0:
            with contextlib.suppress(StorageError):
                self._folder.delete(self.ranks.rendezvous_file)


def pick_device(local_rank: int, gpus: int | None) -> torch.device:
    """Return the device of a rank, and make it the current one.

    Args:
        local_rank: The rank on its node.
        gpus: As in `ProcessGroup`.

    Raises:
        DeviceError: CUDA sees fewer GPUs than the job requests.
    """
    if gpus == 0 or (gpus is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # If a site binds each task to a GPU of its own, a rank sees only that one.
    is_bound = visible == 1 and "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")
    if gpus is not None and visible < gpus and not is_bound:
        raise DeviceError(
            f"{socket.gethostname()}: the job requests {gpus} GPU{'s' * (gpus > 1)} per node, and CUDA sees "
            f"{visible or 'none'}. {_describe_cuda()}. Install a torch that matches the driver, exclude this host "
            "(slurm.exclude), or request no GPU (--gpus-per-node 0)."
        )
    device = torch.device("cuda", local_rank % visible)
    torch.cuda.set_device(device)
    return device


def check_gpus(cards: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """Return the models of GPUs that the ranks train on, each once; more than one is warned of.

    Args:
        cards: Of each rank: ``host``, ``gpu`` (its UUID) and ``model``; the last two are empty on a CPU.

    Raises:
        ConfigError: Two ranks have the same GPU.
    """
    ranks_of: dict[str, list[int]] = {}
    models: dict[str, list[int]] = {}
    for rank, card in enumerate(cards):
        if card["gpu"]:
            ranks_of.setdefault(card["gpu"], []).append(rank)
            models.setdefault(card["model"], []).append(rank)
    for gpu, ranks in ranks_of.items():
        if len(ranks) > 1:
            raise ConfigError(
                f"ranks {', '.join(map(str, ranks))} on {cards[ranks[0]]['host']} have the same GPU ({gpu}): each rank "
                "needs its own. Options such as --gpu-bind=closest can bind several tasks to one: remove them from "
                "[slurm] and from SBATCH_* and SRUN_* variables, or use slurm.gpu-bind = 'none'."
            )
    if len(models) > 1:
        counts = ", ".join(f"{len(ranks)} x {model}" for model, ranks in models.items())
        log.warning("the ranks have different GPUs (%s): each step takes as long as on the slowest", counts)
    return tuple(models)


def _describe_cuda() -> str:
    """Return what decides whether CUDA works here: torch's wheel, the driver, and CUDA_VISIBLE_DEVICES."""
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
    """Return the store of rank 0, and its address.

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


def _connect(ranks: Ranks, folder: Store, timeout: datetime.timedelta) -> tuple[dist.TCPStore, tuple[str, int]]:
    rendezvous = folder.read_json(ranks.rendezvous_file)
    address = (rendezvous["host"], rendezvous["port"])
    try:
        store = dist.TCPStore(*address, ranks.world_size, False, min(timeout, CONNECT_TIMEOUT))
        attempt_key = store.get("attempt").decode()
        store.set_timeout(timeout)
    except (RuntimeError, dist.DistError) as error:
        raise LostPeerError(f"rank 0 at {address[0]}:{address[1]} does not answer: {error}") from error
    if attempt_key != ranks.attempt_key:
        raise LostPeerError(f"{address[0]}:{address[1]} belongs to another attempt, {attempt_key}")
    return store, address


@contextlib.contextmanager
def lost_peer_errors():  # type: ignore[no-untyped-def]
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


def _reachable_name() -> str:
    """Return a name or address by which other nodes reach this one."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        # The host cannot resolve its own name: use the address of its default route.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1 (RFC 5737); a datagram socket sends nothing here
            return str(probe.getsockname()[0])
    return name
