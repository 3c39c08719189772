"""What `submit` and `sweep` do with a plan: print its verdict, submit it, wait for its runs."""

from __future__ import annotations

import shlex
import signal
from typing import TYPE_CHECKING

import click

from rsb_cluster.cli.terminal import console, log, runs_url
from rsb_cluster.errors import RsbError, plural

if TYPE_CHECKING:
    from pathlib import Path

    from rsb_cluster.config.sweep_file import SweepFile
    from rsb_cluster.submission.plan import Plan
    from rsb_cluster.submission.request import Request


def end_dry_run(plan: Plan, as_json: bool) -> None:
    """Print the verdict of a dry run, and exit with the code that a submit would have."""
    from rsb_cluster.submission import preview

    if not as_json:
        click.echo(f"\n{preview.verdict(plan)}")
    if plan.refusals:
        raise click.exceptions.Exit(plan.refusals[0].exit_code)


def make_plan(file: SweepFile, path: Path | None, request: Request, *, is_sweep: bool, dry_run: bool) -> Plan:
    """Return the plan of a submit, and print which job file it uses. Raises RsbError: it would be refused."""
    from rsb_cluster.submission.plan import plan as plan_submit

    try:
        plan = plan_submit(file, path, request, is_sweep=is_sweep, dry_run=dry_run)
    except RsbError as error:
        if dry_run:
            error.args = (f"{error}\nThe submit would be refused.",)
        raise
    log(f"job {plan.runs[0].point.job_path}")
    return plan


def submit_plan(plan: Plan, save_diff: bool) -> None:
    """Make the shards that are missing, print the notes, and submit."""
    from rsb_cluster.submission.data_location import make_missing_shards
    from rsb_cluster.submission.submit import submit

    for url in make_missing_shards(planned.data for planned in plan.runs if planned.should_submit):
        log(f"made the shards in {url}")
    for note in plan.notes:
        log(f"note: {note}")
    submit(plan, with_diff=save_diff)


def wait_for(plan: Plan) -> None:
    """Show progress until all runs have ended. Raises RsbError if one did not finish."""
    from rsb_cluster.monitor.watch import follow

    statuses = follow([planned.run for planned in plan.runs], console(stderr=True))
    if statuses is None:
        log(_detached_message(plan))
        raise click.exceptions.Exit(128 + signal.SIGINT)  # the shell's code for Ctrl-C
    unfinished = [s for s in statuses if s.state != "finished"]
    if unfinished and all(s.cause == "stopped" or s.state == "cancelled" for s in unfinished):
        log("Stopped; a checkpoint is saved. Submit again to resume.")
        raise click.exceptions.Exit(RsbError.exit_code)
    if unfinished:
        reasons = "\n".join(f"{s.run_id}: {s.cause or s.state}" for s in unfinished)
        raise RsbError(
            f"{len(unfinished)} of {plural(len(statuses), 'run')} did not finish:\n{reasons}\n"
            "See 'rsb-cluster logs RUN'."
        )


def _detached_message(plan: Plan) -> str:
    """Return what a user can do who no longer waits for jobs that continue."""
    ids = [planned.run.run_id for planned in plan.runs]
    runs_flag = "" if plan.runs_url == runs_url("") else f" --runs {shlex.quote(plan.runs_url)}"
    names = (plan.sweep.sweep_id if plan.sweep else " ".join(ids)) + runs_flag
    return (
        "No longer waiting; queued and running jobs continue.\n"
        f"watch them  rsb-cluster status --watch {names}\n"
        f"see a log   rsb-cluster logs -f {ids[0]}{runs_flag}\n"
        f"cancel all  rsb-cluster cancel {names}"
    )
