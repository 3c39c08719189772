"""Jobs: where to train. Nothing here changes a run's result."""

from __future__ import annotations

import importlib.util
import re
from datetime import date
from datetime import time as clock
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rsb_cluster.config.schema import Count, Section, no_variable
from rsb_cluster.errors import plural

# A trace of a step of ResNet-50 takes a megabyte, and viewers stop at some hundred.
MAX_PROFILED = 100


class CheckpointPolicy(Section):
    """When checkpoints are saved, besides at a preemption and at the end."""

    every_min: float = Field(15.0, ge=0, description="minutes between two checkpoints; 0: off")
    every_steps: int = Field(0, ge=0, description="steps between two checkpoints; 0: off")
    keep: int = Field(2, ge=2, description="complete checkpoints kept; 2 at least, as one may be damaged")


class Cloud(Section):
    """Resources that SkyPilot provisions, in its own terms; for the back end ``cloud``."""

    infra: tuple[str, ...] = Field(
        (), description="aws, aws/us-east-1, gcp, azure, k8s/context, slurm/cluster ...: any of these; empty: any"
    )
    accelerators: str = Field("", description="GPUs per node, such as H100:8")
    instance_type: str = Field("", description="instance type; empty: chosen by accelerators, CPUs and memory")
    spot: bool = Field(False, description="use spot (preemptible) instances")
    disk_gb: Count = Field(256, description="disk per node, GB")
    image: str = Field("", description="machine image or docker:NAME; empty: SkyPilot's own")
    recovery: Literal["EAGER_NEXT_REGION", "FAILOVER"] = Field(
        "EAGER_NEXT_REGION", description="where new machines are requested first: another region, or the same"
    )
    max_restarts: int = Field(
        10, ge=0, description="restarts after a failure outside of the run, such as a node that could not be set up"
    )
    pool: str = Field("", description="SkyPilot pool whose workers execute the runs; its size limits concurrent runs")
    envs: dict[str, str] = Field({}, description="environment variables of the nodes; no credentials")
    secrets: tuple[str, ...] = Field(
        (), description="variables of the submitting shell that SkyPilot passes on; their values are not stored by us"
    )
    price: float = Field(0, ge=0, description="$ per node-hour, for the estimate; 0: from SkyPilot's catalog")

    @property
    def gpus(self) -> int:
        """GPUs per node according to ``accelerators``."""
        name, _, count = self.accelerators.partition(":")
        return int(count or 1) if name else 0

    @field_validator("accelerators")
    @classmethod
    def _is_one_kind(cls, text: str) -> str:
        if text and not re.fullmatch(r"[A-Za-z][\w.-]*(:[1-9]\d*)?", text):
            raise ValueError(
                f"accelerators = '{text}' is not NAME:COUNT, such as H100:8. Use 'sky gpus list' for names"
            )
        return text

    @field_validator("envs")
    @classmethod
    def _holds_no_credential(cls, envs: dict[str, str]) -> dict[str, str]:
        for name in envs:
            if re.search(r"(?i)SECRET|TOKEN|PASSW|CREDENTIAL|ACCESS_KEY|API_KEY", name):
                raise ValueError(
                    f"envs: {name} looks like a credential, and would be written into the task. Give the machines a "
                    f"role instead, or use secrets = ['{name}'], which reads it from your shell"
                )
        return envs

    @model_validator(mode="after")
    def _spot_is_supported(self) -> Cloud:
        slurm = [where for where in self.infra if where.split("/")[0] == "slurm"]
        if self.spot and slurm:
            raise ValueError(f"spot: SkyPilot has no spot nodes on Slurm ({slurm[0]}). Use spot = false")
        return self


class Job(Section):
    """Where to train; a TOML file in ``jobs/``."""

    name: str = Field(description="for tables and messages")
    description: str = Field("", description="shown by 'jobs list'")
    backend: str = Field(description="local, slurm or cloud")
    nodes: Count = Field(1, description="nodes of an attempt")
    min_nodes: int = Field(0, ge=0, description="fewest nodes to start on if not all are available; 0: always all")
    gpus_per_node: int = Field(0, ge=0, description="0: train on the CPU")
    gpu_type: str = Field("", description="Slurm's name of the GPUs, such as a100; empty: any (sinfo -o %G)")
    tasks_per_node: int = Field(0, ge=0, description="ranks per node; 0: one per GPU, or one on the CPU")
    cpus_per_task: Count = Field(1, description="cores of a rank: its process and the decoding of its images")
    mem_gb: float = Field(0, ge=0, description="memory per node; 0: the site's default")
    time_min: Count = Field(1440, description="time limit of an attempt, minutes; the next attempt resumes the run")
    signal_delay_s: Count = Field(120, description="how long before the time limit the job is signalled to save, s")
    slurm: dict[str, Any] = Field({}, description="any sbatch option: partition, account, qos, constraint ...")
    cloud: Cloud = Cloud()
    setup: tuple[str, ...] = Field(
        (), description="shell lines before training, such as module load; on this machine a script under set -e"
    )
    python: str = Field(
        "",
        description="shell words that start Python on Slurm's nodes, such as a container's: "
        "'apptainer exec --nv image.sif python'; empty: the Python that submits",
    )
    array_parallelism: Count = Field(256, description="concurrent array tasks")
    loader_workers: int = Field(0, ge=0, description="decoding threads per rank; 0: decode in the main thread")
    loader_processes: int = Field(
        1,
        ge=0,
        le=1,
        description="1: these threads are in a process of their own, so they do not delay the training loop; 0: in the "
        "rank's process",
    )
    cache_dir: str = Field(
        "", description="folder on a node's local disk that caches shards, such as $TMPDIR/shards; empty: no cache"
    )
    cache_gb: float = Field(500.0, gt=0, description="size of cache_dir, GB of 10^9 bytes")
    max_micro_batch: Count = Field(512, description="images that fit a device in one forward pass")
    gradient_checkpointing: bool = Field(
        False,
        description="compute activations again in the backward pass: less memory, a third slower, the same mathematics",
    )
    log_every_steps: Count = Field(50, description="steps between two rows of metrics")
    profile_steps: str = Field(
        "", description="steps to profile, such as 100-110: Chrome traces in the run's folder, profiles/; empty: none"
    )
    rendezvous_s: Count = Field(600, description="timeout of the rendezvous of all ranks at the start, s")
    collective_s: Count = Field(900, description="timeout of a collective, s")
    peer_timeout_s: int = Field(
        60,  # 30 heartbeats, as a loaded host may pause; a tenth of watchdog_s, as it is sure that the rank is gone
        ge=0,
        description="a rank whose heartbeats stop for so long, while others wait for it, is presumed dead, s; 0: off",
    )
    watchdog_s: int = Field(600, ge=0, description="a rank that is stalled for so long ends the attempt, s; 0: off")
    grace_s: int = Field(0, ge=0, description="the site's grace time between preemption and kill, s; 0: unknown")
    notice: Literal["", "auto", "aws", "gcp", "azure"] = Field(
        "", description="cloud whose interruption notices are watched; empty: none"
    )
    max_gpu_hours: float = Field(0, ge=0, description="GPU-hour budget of a run, over all attempts; 0: no limit")
    max_preemptions: int = Field(0, ge=0, description="preemptions of a job that end the run; 0: unlimited")
    log_samples: bool = Field(False, description="record the samples of each micro-batch in the run's folder")
    submissions: str = Field("", description="folder for scripts and logs, shared by all nodes; empty: with the runs")
    data: str = Field("", description="root of the data sets if --data is not given")
    runs: str = Field("", description="folder of the runs if --runs is not given")
    share: Literal["private", "group"] = Field(
        "private", description="who may read the runs: their owner, or also the group of the folder of runs"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        (), description="experiment trackers that also receive the metrics"
    )
    notify_command: str = Field(
        "",
        description="shell command that a node runs when a run has finished, failed for good or exceeded its budget; "
        "what happened is JSON on its standard input",
    )
    checkpoint: CheckpointPolicy = CheckpointPolicy()

    @property
    def ranks_per_node(self) -> int:
        """Ranks per node: one per GPU, or as many as the job requests on the CPU."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Number of all ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def shape(self) -> str:
        """A description of the resources, for messages."""
        kinds = ("GPU", "GPUs") if self.gpus_per_node else ("process", "processes")
        count = f"{self.min_nodes}-{self.nodes}" if self.is_elastic else str(self.nodes)
        return f"{count} {'node' if self.nodes == 1 else 'nodes'} × {plural(self.ranks_per_node, *kinds)}"

    @property
    def is_elastic(self) -> bool:
        """Whether an attempt may get fewer nodes than the job requests."""
        return 0 < self.min_nodes < self.nodes

    _are_written_out = field_validator("submissions", "data", "runs")(no_variable)

    @field_validator("gpu_type")
    @classmethod
    def _is_the_type_alone(cls, text: str) -> str:
        if not re.fullmatch(r"[\w.-]*", text, re.ASCII):
            raise ValueError(
                f"gpu_type = '{text}' is not the type alone: of gpu:a100:8(S:0-1), as 'sinfo -o %G' shows it, it is "
                "'a100'. gpus_per_node says how many"
            )
        return text

    @field_validator("slurm")
    @classmethod
    def _are_options_of_sbatch(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options, with times that TOML has read as such in Slurm's form."""
        for name, value in options.items():
            if not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII):
                raise ValueError(
                    f"slurm: '{name}' is no name of an option of sbatch. Use its long name, without dashes"
                )
            if value in ("True", "False"):
                raise ValueError(f"slurm.{name} = '{value}': write {value.lower()}, without quotes")
            if not isinstance(value, str | int | float | date | clock) or "\n" in str(value):
                raise ValueError(
                    f"slurm.{name} = {value!r} is no value of an option of sbatch. Write it in quotes, as after the "
                    f'option: slurm.{name} = "..."'
                )
        return {n: v.isoformat() if isinstance(v, date | clock) else v for n, v in options.items()}

    @field_validator("profile_steps")
    @classmethod
    def _is_a_range_of_steps(cls, text: str) -> str:
        if text and len(steps := step_range(text)) > MAX_PROFILED:
            raise ValueError(f"profile_steps = '{text}' are {len(steps):,} steps, and a trace holds {MAX_PROFILED}")
        return text

    @field_validator("trackers")
    @classmethod
    def _trackers_are_installed(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"trackers: {name} is not installed. Use pip install 'rsb-cluster[{name}]'")
        return names

    @model_validator(mode="after")
    def _consistent(self) -> Job:
        if self.gpus_per_node and self.tasks_per_node not in (0, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node = {self.tasks_per_node} with gpus_per_node = {self.gpus_per_node}: "
                "there is one rank per GPU. Leave tasks_per_node out"
            )
        if self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes = {self.min_nodes} is more than nodes = {self.nodes}")
        if self.signal_delay_s >= self.time_min * 60:
            raise ValueError("signal_delay_s is not shorter than time_min")
        return self


def step_range(text: str) -> range:
    """Return the steps, counted from 1, that a text such as ``100-110`` or ``100`` names; none if it is empty.

    Raises:
        ValueError: It names no steps.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"([1-9]\d*)(?:-(\d+))?", text)
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise ValueError(f"profile_steps = '{text}' is not FIRST-LAST, such as 100-110; steps are counted from 1")
    return range(int(found[1]), int(found[2] or found[1]) + 1)
