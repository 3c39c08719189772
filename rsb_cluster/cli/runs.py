"""Commands that look after runs: how they are, what they say, ending them, sending them again."""

from __future__ import annotations

import json

import click

from rsb_cluster.cli.terminal import (
    console,
    find,
    find_one,
    find_to_change,
    run_arguments,
    runs_option,
    say,
    yes_option,
)
from rsb_cluster.errors import RsbError

needed_arguments = click.argument("names", nargs=-1, required=True, metavar="RUN|SWEEP...")


@click.command()
@run_arguments
@runs_option
@click.option("-w", "--watch", "watching", is_flag=True, help="Live, until all have ended or Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(names: tuple[str, ...], runs: str, watching: bool, as_json: bool) -> None:
    """Show how runs are, one line each.

    RUN is an id, its beginning in whole words (a1 is not a1h), a glob or a path; SWEEP is an id or its beginning. All
    runs without one.

    \b
    rsb-cluster status
    rsb-cluster status resnet-depths --watch
    """
    from rsb_cluster.monitor.status import read_status, summary

    chosen = find(names, runs)
    if not chosen and not as_json:
        say("there are no runs yet")
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

    shown_on = console()
    shown_on.print(table(found, shown_on.width))
    if len(found) > 1:
        say(summary(found))


@click.command()
@click.argument("name", metavar="RUN")
@runs_option
@click.option("--rank", default=0, type=click.IntRange(0), show_default=True, help="Whose log.")
@click.option("--attempt", default=0, type=click.IntRange(0), help="Which attempt's, from 1.  [default: the last]")
@click.option("-f", "--follow", is_flag=True, help="Go on as it grows.")
def logs(name: str, runs: str, rank: int, attempt: int, follow: bool) -> None:
    """Print the log of a rank of a run."""
    from rsb_cluster.monitor.logs import read_log

    run = find_one(name, runs)
    for text in read_log(run, rank=rank, attempt=attempt, follow=follow):
        click.echo(text, nl=False)


@click.command()
@needed_arguments
@runs_option
@yes_option
def cancel(names: tuple[str, ...], runs: str, yes: bool) -> None:
    """End runs: running ones save first, queued ones leave the queue. Submit again, or 'retry', to go on.

    The beginning of an id that stands for several runs is asked about; a glob or a sweep is not.

    \b
    rsb-cluster cancel a1-resnet50-s1
    rsb-cluster cancel 'a1-*'
    """
    from rsb_cluster.monitor import actions

    for run_id, job_ids in actions.cancel(find_to_change(names, runs, yes=yes)).items():
        say(f"{run_id}: told job {', '.join(job_ids)} to end")


@click.command()
@needed_arguments
@runs_option
@yes_option
def preempt(names: tuple[str, ...], runs: str, yes: bool) -> None:
    """Make running runs save and go back to the queue, as a preemption does; to see that they come back."""
    from rsb_cluster.monitor import actions

    for run_id, job_ids in actions.preempt(find_to_change(names, runs, yes=yes)).items():
        say(f"{run_id}: told job {', '.join(job_ids)} to save and queue again")


@click.command()
@needed_arguments
@runs_option
@yes_option
@click.option("--failed", "failed_only", is_flag=True, help="Not those that you stopped.")
def retry(names: tuple[str, ...], runs: str, yes: bool, failed_only: bool) -> None:
    """Submit again what has ended without a result, with the nodes, limits and options it had.

    Finished, queued and running runs are left alone.

    \b
    rsb-cluster retry --failed resnet-depths
    rsb-cluster retry 'a3-resnet18-*'
    """
    from rsb_cluster.monitor import actions

    done = actions.retry(find_to_change(names, runs, yes=yes), failed_only=failed_only)
    for run_id, job_id in done.sent.items():
        say(f"{run_id}: submitted again as job {job_id}, goes on where it was")
    if not done.sent and not done.refused:
        say("nothing to retry: all are finished, queued, running or stopped by you")
    if done.refused:
        reasons = "\n".join(f"{run_id}: {why}" for run_id, why in done.refused.items())
        raise RsbError(f"{len(done.refused)} runs were not submitted again:\n{reasons}")
