"""Commands by which a user proves on their own cluster what this package promises."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsb_cluster.cli.terminal import console, new_table, say, set_option
from rsb_cluster.errors import RsbError

if TYPE_CHECKING:
    from rsb_cluster.config.schema import Override


@click.group()
def selftest() -> None:
    """Prove on your own cluster that what is promised holds."""


@selftest.command("resume")
@click.option("--job", default="", help="Where to train: a name or a .toml file.  [default: slurm, else local]")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("selftest"),
    show_default=True,
    help="New folder that all nodes share.",
)
@set_option("job.KEY=VALUE", "Change a field of the job.")
@click.option("--timeout", default=60.0, show_default=True, help="Minutes that it may take, queueing included.")
def selftest_resume(job: str, folder: Path, overrides: tuple[Override, ...], timeout: float) -> None:
    """Preempt a small run twice, and compare it with one that was left alone. On CPUs, in minutes.

    \b
    rsb-cluster selftest resume
    rsb-cluster selftest resume --job slurm --set job.nodes=2 --set job.slurm.partition=short
    """
    from rsb_cluster.checks import selftest as verb

    where = verb.new_folder(folder)
    findings = verb.resume(where, job=job, overrides=overrides, say=say, timeout_s=timeout * 60)
    table = new_table("", "compared", "found")
    for finding in findings:
        table.add_row("ok" if finding.holds else "WRONG", finding.what, finding.found)
    console().print(table)
    if not all(finding.holds for finding in findings):
        raise RsbError(f"a preempted run does not end as an unbroken one does. All that was written is in {where}.")
