"""What travels to the nodes: a small picklable task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
        """Train until the run is finished; any other end leaves the process with one of the codes in ``exits``."""
        from rsb_cluster.train.stopping import SIGNAL_SLACK_S, StopFlag

        # First of all: importing torch takes seconds, and submitit's own handlers would end the run for good.
        flag = StopFlag(limit_s=self.job["time_min"] * 60 - self.job["signal_delay_s"] - SIGNAL_SLACK_S)
        flag.install()
        from rsb_cluster.train.worker import work

        work(self.run_url, self.run_id, self.job, flag)
