"""The command that checks what a job needs before it is submitted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from rsb_cluster.cli import complete
from rsb_cluster.cli.terminal import console, new_table, runs_option, set_option
from rsb_cluster.errors import RsbError

if TYPE_CHECKING:
    from rsb_cluster.config.schema import Override


@click.command()
@click.option(
    "--job",
    default="",
    shell_complete=complete.jobs,
    help="Where to train: a name or a .toml file.  [default: slurm where it is installed, else local]",
)
@runs_option
@click.option("--data", default="", help="Also check this data set: a folder or s3:// URL with train/ and val/.")
@set_option("job.KEY=VALUE", "Override a field of the job.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(job: str, runs: str, data: str, overrides: tuple[Override, ...], as_json: bool) -> None:
    """Check what a job needs before it is queued or costs anything.

    The exit code is 1 if a check found a problem.

    \b
    rsb-cluster doctor --job slurm --set job.slurm.partition=gpu
    rsb-cluster doctor --job cloud-spot --runs s3://bucket/runs --data s3://bucket/imagenet-1k
    """
    from rsb_cluster.checks.doctor import run_checks

    job_overrides = [(path.removeprefix("job."), value) for path, value in overrides]
    findings = list(run_checks(job, overrides=job_overrides, runs=runs, data=data))
    if as_json:
        click.echo(json.dumps([vars(f) | {"ok": f.is_ok} for f in findings], indent=2))
    else:
        from rich.text import Text

        table = new_table("", "check", "result", "what to do")
        for f in findings:
            table.add_row(*map(Text, ("ok" if f.is_ok else "PROBLEM", f.what, f.found, f.advice)))
        console().print(table)
    if problems := sum(not f.is_ok for f in findings):
        raise RsbError(f"{problems} of {len(findings)} checks found a problem.")
