"""The commands that monitor and control runs: status, logs, cancel, preempt, retry."""

from __future__ import annotations

import json

import click

from rsb_cluster.cli.terminal import (
    console,
    find_run,
    find_runs,
    find_runs_to_change,
    log,
    run_arguments,
    runs_option,
    yes_option,
)
from rsb_cluster.errors import RsbError

needed_arguments = click.argument("names", nargs=-1, required=True, metavar="RUN|SWEEP...")


@click.command()
@run_arguments
@runs_option
@click.option("-w", "--watch", "watching", is_flag=True, help="Update live until all runs have ended or Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(names: tuple[str, ...], runs: str, watching: bool, as_json: bool) -> None:
    """Show the status of runs, one line each.

    RUN is a run's id, the first whole words of one (a1 does not match a1h), a glob or a path. SWEEP is a sweep's id or
    its beginning. Without either, all runs are shown.

    \b
    rsb-cluster status
    rsb-cluster status resnet-depths --watch
    """
    from rsb_cluster.monitor.status import read_status, summary

    chosen = find_runs(names, runs)
    if not chosen and not as_json:
        log("there are no runs yet")
        return
    if watching:
        from rsb_cluster.monitor.watch import watch

        watch(chosen, console())
        return
    found = read_status(chosen)
    if as_json:
        click.echo(json.dumps([vars(s) for s in found], indent=2))
        return
    from rsb_cluster.monitor.watch import table

    terminal = console()
    terminal.print(table(found, terminal.width))
    if len(found) > 1:
        log(summary(found))
    for one in found:
        for change in one.changes:
            log(f"note: {one.run_id}: {change}")


@click.command()
@click.argument("name", metavar="RUN")
@runs_option
@click.option("--rank", default=0, type=click.IntRange(0), show_default=True, help="Rank whose log to print.")
@click.option(
    "--attempt", default=0, type=click.IntRange(0), help="Attempt, from 1.  [default: all attempts of the last job]"
)
@click.option("-f", "--follow", is_flag=True, help="Keep printing as the log grows, until the job has ended.")
def logs(name: str, runs: str, rank: int, attempt: int, follow: bool) -> None:
    """Print the log of one rank of a run."""
    from rsb_cluster.monitor.logs import read_log

    run = find_run(name, runs)
    for text in read_log(run, rank=rank, attempt=attempt, follow=follow):
        click.echo(text, nl=False)


@click.command()
@needed_arguments
@runs_option
@yes_option
def cancel(names: tuple[str, ...], runs: str, yes: bool) -> None:
    """Cancel queued and running runs. Running ones save a checkpoint and exit.

    'submit' or 'retry' resumes them. If the beginning of an id matches several runs, you are asked to confirm; for a
    glob or a sweep you are not.

    \b
    rsb-cluster cancel a1-resnet50-s1
    rsb-cluster cancel 'a1-*'
    """
    from rsb_cluster.monitor import actions

    for run_id, job_ids in actions.cancel(find_runs_to_change(names, runs, yes=yes)).items():
        log(f"{run_id}: cancelled job {', '.join(job_ids)}")


@click.command()
@needed_arguments
@runs_option
@yes_option
def preempt(names: tuple[str, ...], runs: str, yes: bool) -> None:
    """Preempt running runs, to test that they resume. They save a checkpoint and return to the queue."""
    from rsb_cluster.monitor import actions

    for run_id, job_ids in actions.preempt(find_runs_to_change(names, runs, yes=yes)).items():
        log(f"{run_id}: signalled job {', '.join(job_ids)} to save and requeue")


@click.command()
@needed_arguments
@runs_option
@yes_option
@click.option("--failed", "failed_only", is_flag=True, help="Only runs that failed, not those that you stopped.")
def retry(names: tuple[str, ...], runs: str, yes: bool, failed_only: bool) -> None:
    """Resubmit runs that ended without a result.

    They resume from their last checkpoints, with the nodes, limits and options of their last jobs. Finished, queued and
    running runs are left alone.

    \b
    rsb-cluster retry --failed resnet-depths
    rsb-cluster retry 'a3-resnet18-*'
    """
    from rsb_cluster.monitor import actions

    done = actions.retry(find_runs_to_change(names, runs, yes=yes), failed_only=failed_only)
    for run_id, job_id in done.submitted.items():
        log(f"{run_id}: resubmitted as job {job_id}, resumes from the last checkpoint")
    if not done.submitted and not done.refused:
        log("nothing to retry: all runs are finished, queued, running or stopped by you")
    if done.refused:
        reasons = "\n".join(f"{run_id}: {why}" for run_id, why in done.refused.items())
        raise RsbError(f"{len(done.refused)} runs could not be resubmitted:\n{reasons}")
