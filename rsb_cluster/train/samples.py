"""The sample log: the samples of each micro-batch, the proof that a resumed run trains on those of an unbroken one."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rsb_cluster.data.global_batch import Share
from rsb_cluster.errors import ConfigError
from rsb_cluster.runs.lease import Lease
from rsb_cluster.storage.store import Store
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.input.loader import Batch


class SampleLog:
    """Appends a line per micro-batch to ``samples/<attempt>-rank<rank>.jsonl`` in the run's folder.

    A line has the step, the virtual rank, the numbers of the samples in the index, a checksum of their pixels, and one
    of the share of each class in them, which depends on the partners and the λ of Mixup and CutMix; and the slots of
    the samples, if other processes have the others. `runs.sample_log` puts such parts together. It is written before
    the step is computed, so a killed rank leaves no gap.

    Args:
        folder: The run's folder; it must be local, as object stores cannot append.
        group: The processes.
        lease: The attempt; on rank 0 only.
    """

    def __init__(self, folder: Store, group: ProcessGroup, lease: Lease | None) -> None:
        if not folder.is_local:
            raise ConfigError(
                f"job.log_samples appends to files, which {folder.url} cannot. Remove it, or use a local --runs."
            )
        attempt = group.broadcast("samples of attempt", f"{lease.record.number:04d}" if lease is not None else "")
        self._path = Path(folder.locate(f"samples/{attempt}-rank{group.rank:05d}.jsonl"))
        self._path.parent.mkdir(exist_ok=True)

    def add(self, step: int, virtual_rank: int, share: Share, batch: Batch, shares_BK: Tensor) -> None:
        """Log a micro-batch, or this process's part of it, and the shares of the classes after mixing."""
        line = {
            "step": step,
            "virtual_rank": virtual_rank,
            "samples": batch.samples.tolist(),
            "pixels": _checksum(share.slots, batch.images),
            "shares": _checksum(share.slots, shares_BK),
            **({} if share.is_whole else {"slots": share.slots}),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _checksum(slots: Sequence[int], tensor: Tensor) -> int:
    """Return the sum of the CRC-32 of each image, begun with its slot: the sum over parts is that of the whole."""
    rows = tensor.cpu().contiguous().numpy()
    return sum(zlib.crc32(row.data, slot) for slot, row in zip(slots, rows, strict=True)) % 2**32
