"""The commands that test on the user's own cluster what this package promises."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsb_cluster.cli import complete
from rsb_cluster.cli.terminal import console, log, new_table, set_option
from rsb_cluster.errors import RsbError

if TYPE_CHECKING:
    from rsb_cluster.config.schema import Override


@click.group()
def selftest() -> None:
    """Test on your own cluster that preempted runs resume exactly."""


@selftest.command("resume")
@click.option(
    "--job", default="", shell_complete=complete.jobs, help="Where to train: a name or a .toml file.  [default: local]"
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("selftest"),
    show_default=True,
    help="New or empty folder, on a file system that all nodes share.",
)
@click.option(
    "--gpus", type=click.IntRange(0), default=0, help="GPUs per node, with deterministic kernels.  [default: on CPUs]"
)
@set_option("job.KEY=VALUE", "Override a field of the job.")
@click.option("--timeout", default=60.0, show_default=True, help="Time limit in minutes, including queueing.")
def selftest_resume(job: str, folder: Path, gpus: int, overrides: tuple[Override, ...], timeout: float) -> None:
    """Test that a preempted run resumes exactly.

    A small run is preempted twice and compared with an uninterrupted one. It takes minutes on CPUs.
    On GPUs it trains with train.deterministic. On one host the weights must be equal bit by bit.

    \b
    rsb-cluster selftest resume
    rsb-cluster selftest resume --gpus 1
    rsb-cluster selftest resume --job slurm --set job.nodes=2 --set job.slurm.partition=short
    """
    from rsb_cluster.checks.selftest import new_folder, resume

    path = new_folder(folder)
    outcomes = resume(path, job=job, gpus=gpus, overrides=overrides, log=log, timeout_s=timeout * 60)
    table = new_table("", "compared", "result")
    for outcome in outcomes:
        table.add_row("ok" if outcome.passed else "WRONG", outcome.what, outcome.found)
    console().print(table)
    if not all(outcome.passed for outcome in outcomes):
        raise RsbError(f"the preempted run and the uninterrupted run differ. Data, runs and logs are kept in {path}.")
