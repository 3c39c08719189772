"""The task of a rank, which submitit pickles for the nodes."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

from rsb_cluster import __version__
from rsb_cluster.errors import RsbError, StorageError
from rsb_cluster.node import starts
from rsb_cluster.node.exit_codes import EXIT_FAILED, EXIT_RESTART
from rsb_cluster.node.notify import notify
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import SIGNAL_SLACK_S, StopFlag
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.subprocesses.interpreter import check_python_path

# Imported by name, as the machine that submits must not load torch, and this folder must not depend on training.
_WORKER = "rsb_cluster.train.worker"
_EVALUATION_WORKER = "rsb_cluster.train.validation.job"


@dataclass(frozen=True)
class Task:
    """One rank of one attempt of a run, or of an evaluation, whose folder is like a run's; called by submitit on nodes.

    Attributes:
        run_url: The run's folder.
        run_id: The run.
        job: The job's fields, as JSON values.
        data: Where the run's data are now; empty: where its spec says, as for jobs that earlier versions queued.
        version: Version of this package that submitted the task; empty: unknown.
    """

    run_url: str
    run_id: str
    job: dict[str, Any]
    data: str = ""
    version: str = ""

    def __call__(self) -> None:
        """Train, or evaluate, until all is done; otherwise exit the process with one of the codes in ``exit_codes``."""
        # Before torch is imported, which takes seconds: submitit's own handlers would end the run.
        flag = StopFlag(limit_s=self.job["time_min"] * 60 - self.job["signal_delay_s"] - SIGNAL_SLACK_S)
        flag.install()
        if self.version not in ("", __version__):  # as in a container, or another virtual environment
            sys.stderr.write(
                f"note: this Python ({sys.executable}) has rsb-cluster {__version__}, and {self.version} submitted the "
                "job: what it trains is what its version does.\n"
            )
        try:
            check_python_path()
            is_evaluation = Run(Store(self.run_url), self.run_id).is_evaluation
            worker = importlib.import_module(_EVALUATION_WORKER if is_evaluation else _WORKER)
            worker.work(self.run_url, self.run_id, self.job, self.data, flag)
        except Exception as error:  # before the attempt: an attempt itself raises nothing
            self._exit(error)

    def _exit(self, error: Exception) -> NoReturn:
        """Report why this start failed, and exit with a code that says whether a restart may help.

        Not by sys.exit, as threads may never end, nor by raising the error: a process that exits with code 1 is not
        restarted, and a single host that cannot import torch would end the run.
        """
        traceback.print_exception(error)
        is_permanent = isinstance(error, RsbError) and not isinstance(error, StorageError)
        message = str(error) if isinstance(error, RsbError) else f"{type(error).__name__}: {error}"
        run, ranks = Run(Store(self.run_url), self.run_id), Ranks.from_environment()
        starts.report(run, ranks, message)
        if is_permanent or starts.is_last(ranks):
            notify(run, ranks, self.job.get("notify_command", ""), "failed", message)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_FAILED if is_permanent else EXIT_RESTART)
