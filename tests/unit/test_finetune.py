"""Fine-tuning: what a run starts from, what of it changes the run's id, and whether it is worth it."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import pytest
import torch

from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.grid import Grid, SweepFile, expand
from rsb_cluster.job import Job
from rsb_cluster.plan import PlannedRun, plan_runs
from rsb_cluster.run import Run
from rsb_cluster.storage import Store
from rsb_cluster.submit import create_runs
from rsb_cluster.train import worker
from rsb_cluster.train.distributed import Ranks
from rsb_cluster.train.logfile import logging_to
from rsb_cluster.train.stopping import StopFlag

FASHION = Path("/usr/share/datasets/fashion-mnist")
# The recipes' own network, at the digits' size and for some hundred steps on one core.
SHORT = (
    "augment.resolution=32", "eval.resolution=32", "train.global_batch=64", "train.virtual_ranks=1",
    "schedule.warmup_epochs=0", "job.tasks_per_node=1",
)  # fmt: skip


def planned(recipe: str, data: Path, runs: Path, *assignments: str, seeds: int = 1) -> list[PlannedRun]:
    """Plan runs as submit does, but for the check of the model in a process of its own."""
    for_jobs = [a.removeprefix("job.") for a in assignments if a.startswith("job.")]
    for_recipes = [a for a in assignments if not a.startswith("job.")]
    file = SweepFile(name="test", grid=(Grid(recipes=(recipe,), seeds=tuple(range(seeds))),))
    points = expand(file, job="local", for_recipes=for_recipes, for_jobs=for_jobs)
    return plan_runs(points, str(runs), str(data), dry_run=False)[0]


def train(run: Run, job: Job, flag: StopFlag | None = None) -> float:
    """Do one attempt in this process; return the top-1, percent."""
    torch.set_num_threads(1)
    ranks = Ranks(rank=0, local_rank=0, world_size=1, job_id="test", restart=len(run.attempts()), held=1)
    with logging_to(run.store, ranks) as log_file:
        worker._Attempt(run, job, ranks, flag or StopFlag(), log_file).run()
    found = run.result()
    return -1.0 if found is None else float(found["top1"])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the recipe fashion-mnist on 9,600 of its images: 150 steps."""
    folder = tmp_path_factory.mktemp("pretrained")
    if not FASHION.is_dir():
        pytest.skip("no Debian package dataset-fashion-mnist")
    sources = {
        name: dataclasses.replace(source, entries=source.entries[:size])
        for (name, source), size in zip(open_set("FashionMNIST", root=FASHION).items(), (9600, 500), strict=True)
    }
    make_set(sources, Store(folder / "data"))
    short = (*SHORT, "data.train_samples=9600", "data.val_samples=500", "schedule.epochs=1")
    [one] = planned("fashion-mnist", folder / "data", folder / "runs", *short)
    create_runs([one])
    assert train(one.run, one.point.job) > 60
    return one.run


def test_fine_tuning_beats_training_from_scratch_at_equal_steps(tmp_path: Path, digits: Path, pretrained: Run) -> None:
    """Two epochs of digits (44 steps), by the same recipe; three seeds each."""
    short = (*SHORT, "schedule.epochs=2", "eval.every_epochs=2")
    scratch = planned("digits", digits, tmp_path, *short, seeds=3)
    tuned = planned("digits", digits, tmp_path, *short, f"init.weights={pretrained.url}", "init.head=replace", seeds=3)
    create_runs([*scratch, *tuned])
    top1 = {name: [train(p.run, p.point.job) for p in runs] for name, runs in (("scratch", scratch), ("tuned", tuned))}
    print(top1)
    assert statistics.fmean(top1["tuned"]) > statistics.fmean(top1["scratch"]) + 5
