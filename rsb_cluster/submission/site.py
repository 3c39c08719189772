"""Where in a cluster a job runs, on what and for how long: the options that trainings and evaluations share."""

from __future__ import annotations

from dataclasses import dataclass

from rsb_cluster import backends
from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import Override
from rsb_cluster.errors import ConfigError


@dataclass(frozen=True)
class Site:
    """Options as typed; empty and zero fields are the job's.

    Attributes:
        time_min: Time limit, minutes.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    time_min: int = 0
    gpu_type: str = ""

    @property
    def slurm_options(self) -> dict[str, str]:
        """The options that only Slurm has."""
        options = {"partition": self.partition, "account": self.account, "qos": self.qos}
        return {name: value for name, value in options.items() if value}

    @property
    def job_overrides(self) -> list[Override]:
        """The overrides of fields of the job."""
        found: list[Override] = []
        if self.gpu_type:
            found.append(("gpu_type", self.gpu_type))
        if self.time_min:
            found.append(("time_min", self.time_min))
        return found + [(f"slurm.{name}", value) for name, value in self.slurm_options.items()]

    def check(self, job: Job) -> None:
        """Refuse options that only Slurm has with a job for another back end. Raises ConfigError."""
        if self.slurm_options and not backends.backend_of(job).has_partitions:
            option = next(iter(self.slurm_options))
            raise ConfigError(f"--{option} is for Slurm, and job '{job.name}' has the back end {job.backend}.")
