"""The one collective of a step besides the gradients: stop flags, counts, the loss and BatchNorm statistics.

On a GPU the result is read one step later, when it has arrived, so the host never waits for the step it has just
queued. All ranks read the same numbers after the same step, so they take the same decisions.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from rsb_cluster.node.stopping import VECTOR_SIZE, StopFlag
from rsb_cluster.runs.run import Cause
from rsb_cluster.train.batchnorm import RunningStatistics
from rsb_cluster.train.distributed import ProcessGroup

# stop flags; bad samples, seconds waited for data, bytes read; loss
_HEADER = VECTOR_SIZE + 4


@dataclass(frozen=True)
class RankReport:
    """The numbers of one rank for a step, besides the loss.

    Attributes:
        bad: Samples that could not be decoded.
        data_wait_s: Seconds that the device lost to waiting for data (see ``DataWait``).
        bytes_read: Bytes that the rank's loader read from the store meanwhile.
    """

    bad: int
    data_wait_s: float
    bytes_read: int


@dataclass(frozen=True)
class StepReport:
    """The numbers of all ranks for a step.

    Attributes:
        flags: Sum of the stop flags' vectors.
        bad: Samples that could not be decoded.
        loss: Mean over the global batch.
        data_wait_s: Seconds that a device lost to waiting for data, mean over ranks.
        bytes_read: Bytes that all ranks read from the store.
    """

    flags: list[float]
    bad: int
    loss: float
    data_wait_s: float
    bytes_read: float


class StepExchange:
    """Sums the numbers of a step over all ranks.

    Args:
        group: The processes.
        statistics: BatchNorm's running statistics, averaged in the same collective.
    """

    def __init__(self, group: ProcessGroup, statistics: RunningStatistics) -> None:
        self._group, self._statistics = group, statistics
        self._on_gpu = group.device.type == "cuda"
        self._vector = torch.zeros(_HEADER + statistics.size, device=group.device)
        self._arrived: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def post(self, flags: list[float], local: RankReport, loss: Tensor) -> None:
        """Exchange the numbers of the step that has just been computed.

        Args:
            flags: Vector of this rank's stop flag.
            local: This rank's numbers.
            loss: Mean loss of this rank's micro-batches, on the device.
        """
        host = torch.tensor([*flags, *map(float, astuple(local)), 0.0], pin_memory=self._on_gpu)
        header = self._vector[:_HEADER]
        header.copy_(host, non_blocking=True)
        header[-1] = loss
        self._statistics.pack(self._vector[_HEADER:])
        self._group.sum_(self._vector)
        self._statistics.end_step(self._vector[_HEADER:])
        event = None
        if self._on_gpu:
            arrived = torch.empty(_HEADER, pin_memory=True)
            arrived.copy_(header, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # a wait that spins takes a core from a decoder
            event.record()
        else:
            arrived = header.clone()
        self._arrived.append((arrived, event))

    def take(self, *, all_: bool = False) -> list[StepReport]:
        """Return the reports that are available without waiting for the last step; with ``all_``, wait for it."""
        ready = len(self._arrived) if all_ or not self._on_gpu else len(self._arrived) - 1
        taken, self._arrived = self._arrived[:ready], self._arrived[ready:]
        return [self._report(*item) for item in taken]

    def _report(self, header: Tensor, event: torch.cuda.Event | None) -> StepReport:
        if event is not None:
            event.synchronize()
        *flags, bad, wait, read, loss = header.tolist()
        world_size = self._group.world_size
        return StepReport(flags, int(bad), loss / world_size, wait / world_size, read)


class StopVote:
    """Agrees on a stop between the batches of an evaluation.

    Args:
        group: The processes.
        flag: The stop flag of this rank.
        late: Whether a vote is read with the next one, when it has arrived, so that the host never waits for the batch
            that it has just queued; as everywhere on a GPU.
    """

    def __init__(self, group: ProcessGroup, flag: StopFlag, *, late: bool) -> None:
        self._group, self._flag, self._late = group, flag, late
        self._on_gpu = group.device.type == "cuda"
        self._cast: tuple[Tensor, torch.cuda.Event | None] | None = None

    def take(self) -> Cause | None:
        """Vote, and return the cause on which all ranks agreed, the same after the same batch on each."""
        host = torch.tensor(self._flag.to_vector(), pin_memory=self._on_gpu)
        summed = self._group.sum_(host.to(self._group.device, non_blocking=True))
        event = None
        if self._on_gpu:
            arrived = torch.empty(len(host), pin_memory=True)
            arrived.copy_(summed, non_blocking=True)
            event = torch.cuda.Event(blocking=True)
            event.record()
            summed = arrived
        previous, self._cast = self._cast, (summed, event)
        return self._read(previous if self._late else self._cast)

    def _read(self, vote: tuple[Tensor, torch.cuda.Event | None] | None) -> Cause | None:
        if vote is None:
            return None
        summed, event = vote
        if event is not None:
            event.synchronize()
        return self._flag.agree(summed.tolist())
