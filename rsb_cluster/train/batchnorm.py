"""Running statistics of BatchNorm that do not depend on the number of processes.

The micro-batch is the unit: in a step each virtual rank updates the running mean and variance from the same starting
point, and the step ends with the average over all virtual ranks of all processes. Otherwise the statistics of a process
with four virtual ranks would be updated four times, and those of four processes would diverge.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningStatistics:
    """The running statistics of a model within a step.

    Args:
        model: The network; it need not have BatchNorm.
        virtual_ranks: Micro-batches per step, over all processes.
        parts: Processes that share a virtual rank; each of them has the statistics of the whole.
    """

    def __init__(self, model: nn.Module, virtual_ranks: int, parts: int = 1) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
        self._buffers: list[Tensor] = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        self._counters: list[Tensor] = [m.num_batches_tracked for m in norms if m.num_batches_tracked is not None]
        self._virtual_ranks, self._parts = virtual_ranks, parts
        self._base = [buffer.clone() for buffer in self._buffers]
        self._sums = [torch.zeros_like(buffer) for buffer in self._buffers]
        self._base_counters = [counter.clone() for counter in self._counters]

    @property
    def size(self) -> int:
        """Count of numbers that the processes exchange in a step."""
        return sum(buffer.numel() for buffer in self._buffers) if self._virtual_ranks > 1 else 0

    @torch.no_grad()
    def begin_step(self) -> None:
        """Take the current values as the step's starting point."""
        if self._buffers:
            torch._foreach_copy_(self._base, self._buffers)
            torch._foreach_zero_(self._sums)
            torch._foreach_copy_(self._base_counters, self._counters)

    @torch.no_grad()
    def end_micro_batch(self) -> None:
        """Add the statistics after a micro-batch to the sums, and restore the starting point."""
        if self._buffers and self._virtual_ranks > 1:
            torch._foreach_add_(self._sums, self._buffers)
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the step's starting point."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._base)
            torch._foreach_copy_(self._counters, self._base_counters)

    @torch.no_grad()
    def pack(self, out: Tensor) -> None:
        """Write the local sums into a flat tensor of ``size`` numbers, to be summed over the processes."""
        if self.size:
            torch.cat([s.reshape(-1) for s in self._sums], out=out)

    @torch.no_grad()
    def end_step(self, summed: Tensor) -> None:
        """Set the statistics to the average over all virtual ranks."""
        if not self.size:
            return
        means = summed / (self._virtual_ranks * self._parts)
        parts = means.split([buffer.numel() for buffer in self._buffers])
        torch._foreach_copy_(
            self._buffers, [part.view_as(buffer) for part, buffer in zip(parts, self._buffers, strict=True)]
        )
        torch._foreach_add_(self._counters, 1)
