"""The process group of an attempt: what its ranks know of each other, and their collectives."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from rsb_cluster.errors import RsbError, StorageError
from rsb_cluster.node.addresses import LOOPBACK
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.storage.store import Store
from rsb_cluster.train.devices import DeviceError, check_gpus, check_health, pick_device
from rsb_cluster.train.health import check_gpu, check_reduction
from rsb_cluster.train.lost_peer import LostPeerError, lost_peer_errors
from rsb_cluster.train.rendezvous import join, meet

log = logging.getLogger(__name__)

# Of torch and NCCL, unless the user has set them. A peer that dies leaves the kernels of the others waiting forever;
# torch's own handling aborts the process a while later (SIGABRT, without a word of which rank it was, or an end for a
# save). The watchdog knows the rank sooner, so torch is to leave errors alone, and its monitor not to abort the
# process while the watchdog's longer limit for a stall runs; then there is nothing to dump either.
NCCL_DEFAULTS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
# If all ranks are on one host, so that no other host can connect to them; unless the user has set them.
LOOPBACK_DEFAULTS = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


class ProcessGroup:
    """The processes of one attempt.

    Args:
        ranks: The rank of this process.
        folder: The run's folder.
        wait_s: Timeout of the rendezvous, seconds.
        collective_s: Timeout of a collective, seconds, after which a peer counts as lost.
        gpus: GPUs per node that the job requests, one for each rank; 0: the CPU, and no GPU is touched; None: a GPU if
            there is one.

    Attributes:
        remark: What is known against this host, though it takes part; empty: nothing.

    Raises:
        DeviceError: The GPUs are not there, or faulty; or this rank got a wrong sum.
        LostPeerError: The rendezvous failed, or another rank raises DeviceError.
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
        self._collective = datetime.timedelta(seconds=collective_s)
        self.store, self._rendezvous, self._relay = meet(ranks, folder, self._timeout)
        try:
            self._begin()
        except RsbError:
            self._wait_until_told()
            raise

    def _begin(self) -> None:
        """Compare the devices of all ranks, and do the first collective."""
        cards = self._exchange_cards()
        self.hosts = tuple(card["host"] for card in cards)
        self.gpu_models = check_gpus(cards)
        check_health(cards, self.rank)
        self.remark = cards[self.rank]["remark"]
        if self.world_size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            defaults = NCCL_DEFAULTS if backend == "nccl" else {}
            if self._rendezvous.host == LOOPBACK:
                defaults = defaults | LOOPBACK_DEFAULTS
            for name, value in defaults.items():
                os.environ.setdefault(name, value)
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=self._collective,
                # NCCL then connects at once, and knows the device without asking the first tensor.
                device_id=self.device if backend == "nccl" else None,
            )
            with lost_peer_errors():
                self._check_reduction()

    def _check_reduction(self) -> None:
        """Check the first all-reduce: a link that changes bits would spoil every step, and say nothing."""
        found = check_reduction(self.store, self.rank, self.hosts, self.device)
        if found.wrong:
            where = ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in found.wrong)
            message = (
                f"the first all-reduce gave a wrong sum ({where}): a link between GPUs or hosts changes bits. Exclude "
                "the host (--exclude-failed-hosts), or look for what others found with NCCL_P2P_DISABLE=1 and "
                "NCCL_DEBUG=INFO."
            )
            raise DeviceError(message) if self.rank in found.wrong else LostPeerError(message)
        if found.slow:
            text = f"all-reduce moves {found.rate / 1e9:.2f} GB/s; the slowest link is that of {', '.join(found.slow)}"
            log.warning("%s. NCCL_DEBUG=INFO says which network it chose.", text)
            if self.host in found.slow:
                self.remark = "; ".join(filter(None, [self.remark, text]))

    @staticmethod
    def wait_idle(ranks: Ranks, folder: Store, *, wait_s: float) -> None:
        """Wait, as an idle process, until rank 0 exits; a site may kill a job when its first task exits.

        Raises:
            LostPeerError: Rank 0 did not exit in order.
        """
        store, _ = join(ranks, folder, datetime.timedelta(seconds=wait_s))
        with lost_peer_errors():
            while not store.check(["exited"]):
                time.sleep(1.0)

    def _exchange_cards(self) -> list[dict[str, str]]:
        """Return the host and the GPU of each rank, and what is known against it."""
        card = {"host": self.host, "gpu": "", "model": "", "fault": "", "remark": ""}
        if self.device.type == "cuda":
            properties: Any = torch.cuda.get_device_properties(self.device)  # torch's stubs lack some of it
            bus = f"{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}"
            card |= {"gpu": str(properties.uuid), "model": properties.name}
            card |= asdict(check_gpu(f"GPU-{str(properties.uuid).removeprefix('GPU-')}", bus))
        return [json.loads(text) for text in self.gather("card", json.dumps(card))]

    def gather(self, name: str, text: str) -> list[str]:
        """Return the texts of all ranks, on all of them; each name can be used once."""
        self.store.set(f"{name}/{self.rank}", text)
        if self.rank == 0:
            contents = self.store.multi_get([f"{name}/{rank}" for rank in range(self.world_size)])
            self.store.set(f"{name} of all", json.dumps([content.decode() for content in contents]))
        texts: list[str] = json.loads(self.store.get(f"{name} of all"))
        return texts

    def connect(self) -> dist.Store:
        """Return a new connection to the common store, for another thread."""
        return self._rendezvous.connect(self.world_size, self._timeout)

    def broadcast(self, name: str, value: str = "") -> str:
        """Return the text that rank 0 passes, on all ranks."""
        if self.rank == 0:
            self.store.set(name, value)
        return self.store.get(name).decode()

    def split(self, members: Sequence[Sequence[int]]) -> dist.ProcessGroup:
        """Return the group of this rank among disjoint groups of ranks; all ranks call it with the same ones."""
        mine, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in members], timeout=self._collective)
        assert isinstance(mine, dist.ProcessGroup), "this rank is in none of the groups"
        return mine

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            with lost_peer_errors():
                dist.all_reduce(tensor)
        return tensor

    def _wait_until_told(self, timeout_s: float = 10.0) -> None:
        """Wait, as rank 0, until every rank knows why all leave: its store, from which they learn it, ends with it."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            self.store.add("told", 1)
            if self.rank == 0:
                self._wait_for("told", timeout_s)

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
        if self._relay is not None:
            self._relay.close()
        if self.rank == 0:
            with contextlib.suppress(StorageError):
                self._folder.delete(self.ranks.rendezvous_file)
