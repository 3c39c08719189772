"""Evaluations as jobs: the options that say where, and the submit."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from rsb_cluster.cli import complete
from rsb_cluster.cli.site_options import site_options
from rsb_cluster.cli.terminal import console, log, print_json
from rsb_cluster.errors import RsbError

if TYPE_CHECKING:
    from rsb_cluster.config.job import Job
    from rsb_cluster.evaluation.record import Evaluation, EvaluationRequest
    from rsb_cluster.submission.evaluation import PlannedEvaluation


def job_options(command: Callable[..., Any]) -> Any:
    """Add the options that say where; the command gets those of the site as ``site``."""
    options = (
        click.option(
            "--job",
            default="",
            shell_complete=complete.jobs,
            help="Evaluate as a job: a name ('jobs list') or a .toml file.  [default: now, on this machine]",
        ),
        site_options("With --job: "),
        click.option(
            "--wait", is_flag=True, help="With --job: show progress until the jobs have ended, then the results."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def submit_jobs(requests: Sequence[EvaluationRequest], job: Job, *, wait: bool, as_json: bool) -> list[Evaluation]:
    """Submit evaluations, and print their ids; return the results if they were waited for.

    Raises:
        RsbError: One that was waited for has failed.
    """
    from rsb_cluster.evaluation.jobs import read_result
    from rsb_cluster.submission import evaluation

    planned = evaluation.plan(requests, job)
    evaluation.submit(planned, job)
    for one in planned:
        state = {"new": "submitted", "unfinished": "resubmitted"}.get(one.state, one.state)
        log(f"{one.run.run_id}: {state}{'; collect has the result' if one.state == 'finished' else ''}")
    if wait:
        _wait(planned)
    found = [result for one in planned if wait and (result := read_result(one.run)) is not None]
    evaluated = [e for result in found for e in result.evaluations]
    if as_json:
        values = {
            "job": job.model_dump(mode="json"),
            "submitted": [{"id": one.run.run_id, "url": one.run.url, "state": one.state} for one in planned],
            "evaluations": [e.model_dump(mode="json") for e in evaluated],
        }
        print_json(values)
    elif not wait:
        click.echo("\n".join(one.run.run_id for one in planned))
    return evaluated


def _wait(planned: Sequence[PlannedEvaluation]) -> None:
    from rsb_cluster.monitor.watch import follow

    statuses = follow([one.run for one in planned], console(stderr=True))
    if statuses is None:
        log("No longer waiting; queued and running jobs continue. See 'rsb-cluster status'.")
        raise click.exceptions.Exit(128 + signal.SIGINT)
    if failed := [status for status in statuses if status.state != "finished"]:
        reasons = "\n".join(f"{status.run_id}: {status.cause or status.state}" for status in failed)
        raise RsbError(f"{len(failed)} of {len(statuses)} evaluations did not finish:\n{reasons}")
