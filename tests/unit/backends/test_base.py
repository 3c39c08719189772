"""Back ends as objects: what each refuses and can do, and that nobody else asks for their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import rsb_cluster
from rsb_cluster import backends
from rsb_cluster.backends import BACKENDS, Backend, JobStatus, backend_of
from rsb_cluster.backends.base import new_submission
from rsb_cluster.config.job import Job
from rsb_cluster.config.sweep_file import Grid, SweepFile
from rsb_cluster.errors import ConfigError
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Run, Submission
from rsb_cluster.submission.plan import plan
from rsb_cluster.submission.preview import describe
from rsb_cluster.submission.request import Request
from rsb_cluster.submission.submit import submit
from tests.unit.bundled import JOBS, load_job


@pytest.mark.parametrize("name", JOBS)
def test_every_bundled_job_is_one_that_its_back_end_takes(name):
    job = load_job(name)
    backend_of(job).check_job(job)


@pytest.mark.parametrize(
    ("name", "assignments", "message"),
    [
        ("local", ("nodes=2",), "nodes = 2: the local back end is only this machine"),
        (
            "cloud-spot", ("gpus_per_node=4",),
            "gpus_per_node = 4 with accelerators = 'H100:8': they must agree. Use --gpus-per-node 8",
        ),
        ("cloud-spot", ("cloud.accelerators=''",), "gpus_per_node = 8 with no cloud.accelerators: they must agree"),
        ("cloud-spot", ("checkpoint.every_min=0",), "cloud.spot without checkpoints"),
        ("cloud-spot", ("min_nodes=1", "nodes=2"), "min_nodes = 1: SkyPilot starts all nodes or none."),
        ("slurm", ("backend=slrum",), "there is no back end 'slrum'. Did you mean 'slurm'? Known: local, slurm, cloud"),
    ],
)  # fmt: skip
def test_a_job_that_a_back_end_cannot_run_is_refused_by_name(name, assignments, message):
    job = load_job(name, *assignments)
    with pytest.raises(ConfigError) as caught:
        backend_of(job).check_job(job)
    assert f"job '{name}': {message}" in str(caught.value)


def test_a_plan_refuses_it_before_anything_else(tmp_path, digits):
    file = SweepFile(name="one", grid=(Grid(recipes=("digits",)),))
    with pytest.raises(ConfigError, match="nodes = 2: the local back end"):
        plan(file, None, Request(job="local", nodes=(2, 2), data=str(digits), runs=str(tmp_path)), is_sweep=False)


def test_gpus_may_follow_from_the_instance_type():
    job = load_job("cloud-spot", "cloud.accelerators=''", "cloud.instance_type=p5.48xlarge")
    backend_of(job).check_job(job)
    assert job.world_size == 8


class Paper(Backend):
    """A fourth back end: a list of what somebody should start by hand."""

    name = "paper"
    script_title = "what to start"

    def __init__(self) -> None:
        self.jobs: list[str] = []

    def check_job(self, job: Job) -> None:
        """All can be written down."""

    def check_available(self, job: Job) -> None:
        """Paper is patient."""

    def max_array_size(self) -> int:
        return 1

    def script(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> str:
        return f"please start {name}"

    def submit(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[Submission]:
        self.jobs.append(name)
        return [new_submission(job, f"line-{len(self.jobs)}", folder, tasks[0].data)]

    def query(self, submissions: Sequence[Submission], *, fresh: bool = True) -> list[JobStatus]:
        return [JobStatus("queued") for _ in submissions]

    def cancel(self, submissions: Sequence[Submission]) -> list[str]:
        return [""] * len(submissions)

    def preempt(self, submissions: Sequence[Submission]) -> None:
        """Nobody has begun."""

    def cancel_command(self, submissions: Sequence[Submission]) -> str:
        return "use an eraser"


def test_a_fourth_back_end_is_a_class_and_a_line(tmp_path, digits, monkeypatch):
    """Planned, shown, submitted, queried and refused what it cannot do, without a word about it anywhere else."""
    paper = Paper()
    monkeypatch.setitem(BACKENDS, "paper", paper)
    (tmp_path / "mine.toml").write_text('name = "mine"\nbackend = "paper"\n')
    file = SweepFile(name="two", grid=(Grid(recipes=("digits",), seeds=(0, 1)),))
    request = Request(job=str(tmp_path / "mine.toml"), data=str(digits), runs=str(tmp_path / "runs"))
    made = plan(file, None, request, is_sweep=False)
    assert describe(made, {}).endswith("--- what to start ---\nplease start digits")
    sent = submit(made)
    assert [s.job_id for s in sent] == ["line-1", "line-2"] and len(paper.jobs) == 2
    assert backends.states(sent) == ["queued", "queued"]
    assert plan(file, None, request, is_sweep=False).arrays == (), "they are queued already"
    assert not paper.has_prices
    with pytest.raises(ConfigError, match="back end paper cannot exclude nodes"):
        paper.exclude_hosts(load_job("local"), ["n1"])
    run: Run = made.runs[0].run
    assert paper.read_log(run, sent[0], 0, 0) is None and not paper.has_ended(run, sent[0])


def test_no_folder_but_backends_asks_for_the_name_of_one():
    """What a back end can do stands in its class."""
    package = Path(rsb_cluster.__file__).parent
    name = "['\"](local|slurm|cloud)['\"]"
    asked = re.compile(rf"backend\s*(==|!=|in|not in)\s*[(\[{{]?{name}|{name}\s*(==|!=)")
    found = [
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        if "backends" not in path.parts
        for line in path.read_text(encoding="utf-8").splitlines()
        if asked.search(line)
    ]
    assert found == []
