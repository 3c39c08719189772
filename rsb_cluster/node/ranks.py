"""The rank and world size of a process. Only this module reads them from the environment; it does not import torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from rsb_cluster.data.global_batch import GlobalBatch
from rsb_cluster.node.addresses import LOOPBACK


@dataclass(frozen=True)
class Ranks:
    """The place of this process among the ranks of a job.

    Attributes:
        rank: Global rank of this process.
        local_rank: Rank of this process on its node.
        world_size: Processes that train.
        job_id: The scheduler's id of the job.
        restart: How often the scheduler has restarted this job.
        allocated: Processes of the job; more than ``world_size`` if they cannot share a global batch equally.
        address: The address on which rank 0 listens; empty: one by which other hosts reach this one.
    """

    rank: int
    local_rank: int
    world_size: int
    job_id: str
    restart: int
    allocated: int
    address: str = LOOPBACK

    @staticmethod
    def from_environment() -> Ranks:
        """Read the variables of submitit and the scheduler."""
        import submitit

        env = submitit.JobEnvironment()
        restart = os.environ.get("RSB_LOCAL_RESTART") or os.environ.get("SLURM_RESTART_COUNT") or "0"
        address = os.environ.get("RSB_ADDRESS") or (LOOPBACK if env.num_nodes == 1 else "")
        return Ranks(env.global_rank, env.local_rank, env.num_tasks, env.job_id, int(restart), env.num_tasks, address)

    def sharing(self, batch: GlobalBatch) -> Ranks:
        """Return the same process in the largest world that shares a global batch equally."""
        return replace(self, world_size=batch.largest(self.allocated))

    @property
    def is_idle(self) -> bool:
        """Whether this process has no part in the training of this attempt."""
        return self.rank >= self.world_size

    @property
    def attempt_key(self) -> str:
        """A name that no other attempt of any job of this scheduler has."""
        return f"{self.job_id}-{self.restart}"

    @property
    def rendezvous_file(self) -> str:
        """The file in the run's folder with the address of rank 0."""
        return f"rendezvous/{self.attempt_key}.json"
