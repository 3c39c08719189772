"""What travels to the nodes: a small picklable task."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

from rsb_cluster.errors import RsbError, StorageError
from rsb_cluster.node import starts
from rsb_cluster.node.exit_codes import EXIT_FAILED, EXIT_RESTART
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import SIGNAL_SLACK_S, StopFlag
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store

# By its name and not by an import: a task is made where nothing may load torch, and a node knows nothing of training.
_WORKER = "rsb_cluster.train.worker"


@dataclass(frozen=True)
class Task:
    """One rank of one attempt of a run; called by submitit on the node.

    Attributes:
        run_url: The run's folder.
        run_id: The run.
        job: The job's fields, plain.
    """

    run_url: str
    run_id: str
    job: dict[str, Any]

    def __call__(self) -> None:
        """Train until the run is finished; any other end leaves the process with one of the codes in ``exit_codes``."""
        # First of all: importing torch takes seconds, and submitit's own handlers would end the run for good.
        flag = StopFlag(limit_s=self.job["time_min"] * 60 - self.job["signal_delay_s"] - SIGNAL_SLACK_S)
        flag.install()
        try:
            importlib.import_module(_WORKER).work(self.run_url, self.run_id, self.job, flag)
        except Exception as error:  # outside of an attempt, which ends with a code and nothing else
            self._leave(error)

    def _leave(self, error: Exception) -> NoReturn:
        """Say why this start became no attempt, and end as one that may be better elsewhere, or later.

        Not by sys.exit, as threads may never end, nor by the error: a process that ends with code 1 is not started
        again, and a host that cannot import torch would end a run of days.
        """
        traceback.print_exception(error)
        is_for_good = isinstance(error, RsbError) and not isinstance(error, StorageError)
        message = str(error) if isinstance(error, RsbError) else f"{type(error).__name__}: {error}"
        starts.report(Run(Store(self.run_url), self.run_id), Ranks.from_environment(), message)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_FAILED if is_for_good else EXIT_RESTART)
