"""Jobs for SkyPilot: their specs and tasks, and a table of what it would say in its one module's place."""

import sys
import time

from rsb_cluster.backends.skypilot.backend import SkyPilot
from rsb_cluster.backends.skypilot.engine import EngineJob
from rsb_cluster.backends.skypilot.sky_task import sky_task
from rsb_cluster.config.job import Job
from rsb_cluster.node.node_spec import NodeSpec, Wheel
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Attempt, Run
from tests.unit.bundled import load_job


class Engine:
    """SkyPilot's table of managed jobs."""

    def __init__(self):
        self.table: dict[str, EngineJob] = {}
        self.tasks: list[dict] = []
        self.pools: list[str] = []
        self.logs: dict[int, str] = {}
        self.calls = 0

    def launch(self, tasks, *, pool):
        for task in tasks:
            self.tasks.append(task)
            self.pools.append(pool)
            self.table[task["name"]] = EngineJob(len(self.tasks), "PENDING", 0, "")

    def jobs(self):
        self.calls += 1
        return dict(self.table)

    def cancel(self, names):
        for name in names:
            self.say(name, "CANCELLED")

    def controller_log(self, number):
        return self.logs.get(number, "")

    def say(self, name, state, recoveries=0, reason="", details=""):
        self.table[name] = EngineJob(self.table[name].number, state, recoveries, reason, details)


def task_of(run: Run, *assignments: str) -> Task:
    """What a run's job is to do."""
    return Task(run.url, run.run_id, load_job("cloud-spot", *assignments).model_dump(mode="json"))


def launch(run: Run, tmp_path, *assignments: str):
    """Hand a run to the back end."""
    (sent,) = SkyPilot().submit(
        load_job("cloud-spot", *assignments), [task_of(run, *assignments)], tmp_path / "x", "a1"
    )
    return sent


def attempt(run: Run, job_id: str, number: int, cause="", message=""):
    """Note an attempt of a run; one without a cause is under way."""
    run.write_attempt(
        Attempt(
            number=number, job_id=job_id, world_size=1, hosts=("n1",), started=time.time(), start_step=0,
            ended=time.time() if cause else 0.0, cause=cause, message=message,
        )
    )  # fmt: skip


RUN = "s3://bucket/runs/a1-resnet50-s0-0123456789ab"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
CPU = ("gpus_per_node=0", "cloud.accelerators=''")


def spec_of(job: Job, run_url: str = RUN, **changes: object) -> NodeSpec:
    """What the nodes of a run are told."""
    fields = {
        "submission_id": "rsb-20260101-000000-abc123",
        "run_url": run_url,
        "run_id": run_url.rpartition("/")[2],
        "job": job.model_dump(mode="json"),
        "python": HERE,
        "code": Wheel(url=f"{run_url}/code/{'0' * 64}/rsb_cluster-1.0-py3-none-any.whl", sha256="0" * 64),
        "pins": ("timm==1.0.15", "torch==2.6.0"),
    }
    return NodeSpec(**fields | changes)


TASKS = {
    "spot": (("cloud-spot", "nodes=4"), {"AWS_REGION": "us-east-1", "AWS_SECRET_ACCESS_KEY": "hidden"}),
    "failover": (
        ("cloud", "cloud.infra=['aws/us-east-1','gcp','k8s/lab']", "cloud.image='docker:nvidia/cuda'", "mem_gb=512"),
        {"AWS_ENDPOINT_URL": "https://s3.example.org"},
    ),
    "cpu": (
        (
            "cloud-slurm", *CPU, "cpus_per_task=2", "tasks_per_node=2", "setup=['module load \"a b\"']",
            "cloud.secrets=['AWS_ACCESS_KEY_ID']", "cloud.envs.UV_TORCH_BACKEND=cpu", "trackers=['tensorboard']",
        ),
        {"AWS_ACCESS_KEY_ID": "hidden"},
    ),
}  # fmt: skip


def task(name: str) -> dict:
    """The task of one of `TASKS`."""
    job, environment = TASKS[name]
    return sky_task(spec_of(load_job(*job), python="3.11"), environment)
