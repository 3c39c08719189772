"""What travels to the nodes: a small picklable task, and the exit codes by which it speaks to whoever started it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# sysexits.h's EX_TEMPFAIL: state is saved, or a peer was lost; start this job again.
EXIT_AGAIN = 75
# A failure that another attempt would repeat. It is above EXIT_AGAIN because srun reports the highest code of all
# tasks, and the peers of a failed rank end with EXIT_AGAIN.
EXIT_FAILED = 100
# Stopped by the user: saved, not to be started again.
EXIT_STOPPED = 130


def should_restart(code: int) -> bool:
    """Whether a job whose worst exit code this is should be started again.

    A rank that was killed (negative, or above 128 in a shell) says nothing of the run; the next attempt counts crashes
    and ends the run where there is no progress.
    """
    return code == EXIT_AGAIN or code < 0 or (code > 128 and code != EXIT_STOPPED)


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
        """Train until the run is finished; any other end leaves the process with one of the exit codes above."""
        from rsb_cluster.train.worker import work

        work(self.run_url, self.run_id, self.job)
