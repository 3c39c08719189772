"""Who a process is among the ranks of a job. The one place that reads it from the environment, and without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Ranks:
    """Who this process is.

    Attributes:
        rank: Number of this process in the run, from 0.
        local_rank: Number of this process on its node.
        world_size: Processes that train.
        job_id: The scheduler's id of the job.
        restart: How often the scheduler has started this job again.
        held: Processes that the job has; more than train where they cannot share the work equally.
        address: The address of this machine on which it may listen; empty: on all, as on a cluster's own network.
    """

    rank: int
    local_rank: int
    world_size: int
    job_id: str
    restart: int
    held: int
    address: str = ""

    @staticmethod
    def from_environment() -> Ranks:
        """Read what submitit and the scheduler say."""
        import submitit

        env = submitit.JobEnvironment()
        restart = os.environ.get("RSB_LOCAL_RESTART") or os.environ.get("SLURM_RESTART_COUNT") or "0"
        address = os.environ.get("RSB_ADDRESS", "")
        return Ranks(env.global_rank, env.local_rank, env.num_tasks, env.job_id, int(restart), env.num_tasks, address)

    def sharing(self, parts: int) -> Ranks:
        """Return the same process in the largest world that shares so many parts equally; some may be spare."""
        return replace(self, world_size=max(w for w in range(1, self.held + 1) if parts % w == 0))

    @property
    def is_spare(self) -> bool:
        """Whether there is nothing to do for this process in this attempt."""
        return self.rank >= self.world_size

    @property
    def attempt_key(self) -> str:
        """A name that no other attempt of any job of this scheduler has."""
        return f"{self.job_id}-{self.restart}"

    @property
    def card(self) -> str:
        """The file in the run's folder where rank 0 says how it is reached."""
        return f"rendezvous/{self.attempt_key}.json"
