"""Sweeps that are planned here, and what makes runs of them."""

from pathlib import Path

from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import parse_overrides, validate
from rsb_cluster.config.sweep_file import SweepFile, expand
from rsb_cluster.runs.run import Run, Spec, Submission
from rsb_cluster.submission.plan_runs import plan_runs


def file(**values: object) -> SweepFile:
    """A sweep file of these values."""
    return validate(SweepFile, {"name": "x"} | values, "x.toml")


DIGITS = {"recipes": ["digits"], "models": ["resnet10t", "test_resnet"], "seeds": 2}


def planned(runs: Path, digits: Path, *job_overrides: str):
    """Plan the runs of the grid `DIGITS`."""
    return planned_with_notes(runs, digits, *job_overrides)[0]


def planned_with_notes(runs: Path, digits: Path, *job_overrides: str):
    """The same, with what is said beside it."""
    points = expand(file(grid=[DIGITS]), job="slurm-cpu", job_overrides=parse_overrides(job_overrides))
    return plan_runs(points, str(runs), str(digits), dry_run=False)


def make(one, job: Job | None = None) -> Run:
    """Make a planned run's folder, as sent with a job if there is one."""
    spec = Spec(run_id=one.run.run_id, seed=one.seed, virtual_ranks=4, data="", train_digest="", val_digest="")
    one.run.create(one.recipe, spec)
    if job:
        one.run.add_submission(
            Submission(backend="local", job_id="1", folder="/f", shape="", time=1, job=job.model_dump(mode="json"))
        )
    return one.run


def finish(run: Run) -> None:
    """Give a run its result."""
    run.store.write_json("result.json", {"top1": 90, "attempts": 1, "epochs": 25, "steps": 550, "images_per_s": 9.5})
