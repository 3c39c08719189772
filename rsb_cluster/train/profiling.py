"""A profile of some steps: what host and device did when, as a trace for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from rsb_cluster.config.job import step_range
from rsb_cluster.errors import StorageError
from rsb_cluster.storage.store import Store
from rsb_cluster.train.distributed import ProcessGroup

log = logging.getLogger(__name__)


class StepProfiler:
    """Profiles steps of one rank of each node, and writes a trace per node into the run's folder, ``profiles/``.

    It reads clocks and changes no number; the steps it watches take longer.

    Args:
        steps: First and last step, such as ``100-110``, counted from 1 as in the log; empty: none.
        folder: The run's folder.
        group: The processes.
    """

    def __init__(self, steps: str, folder: Store, group: ProcessGroup) -> None:
        self._steps = step_range(steps) if group.ranks.local_rank == 0 else range(0)
        self._folder, self._rank, self._on_gpu = folder, group.rank, group.device.type == "cuda"
        self._profile: profile | None = None
        self._first = self._last = 0

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile a step, if it is one of those: the block."""
        if number not in self._steps:
            yield
            return
        if self._profile is None:
            gpu = [ProfilerActivity.CUDA] if self._on_gpu else []
            self._profile, self._first = profile(activities=[ProfilerActivity.CPU, *gpu]), number
            self._profile.start()
        try:
            with torch.profiler.record_function(f"step {number}"):
                yield
        except BaseException:
            self._profile.stop()
            self._profile = None
            raise
        self._last = number
        if number == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Write what was profiled, if anything is left; a trace that cannot be written does not end a training."""
        if self._profile is None:
            return
        found, self._profile = self._profile, None
        found.stop()
        name = f"profiles/steps-{self._first}-{self._last}-rank{self._rank:05d}.json.gz"
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json.gz"
                found.export_chrome_trace(str(path))
                self._folder.write_bytes(name, path.read_bytes())
        except (OSError, RuntimeError, StorageError) as error:
            log.warning("the profile could not be written: %s", error)
        else:
            log.info("the profile of steps %d to %d is %s", self._first, self._last, self._folder.locate(name))
