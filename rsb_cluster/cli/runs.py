"""Commands that look after runs: how they are, what they say, ending them."""

from __future__ import annotations

import json

import click

from rsb_cluster.cli.terminal import console, find, find_one, run_arguments, runs_option, say


@click.command()
@run_arguments
@runs_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(names: tuple[str, ...], runs: str, as_json: bool) -> None:
    """Show how runs are, one line each; RUN is an id, its beginning, a glob or a path. All without one."""
    from rsb_cluster.status import read_status

    found = read_status(find(names, runs))
    if as_json:
        click.echo(json.dumps([vars(s) for s in found], indent=2))
    elif found:
        from rsb_cluster.watch import table

        console().print(table(found))
    else:
        say("there are no runs yet")


@click.command()
@click.argument("name", metavar="RUN")
@runs_option
@click.option("--rank", default=0, type=click.IntRange(0), show_default=True, help="Whose log.")
@click.option("--attempt", default=0, type=click.IntRange(0), help="Which attempt's, from 1.  [default: the last]")
@click.option("-f", "--follow", is_flag=True, help="Go on as it grows.")
def logs(name: str, runs: str, rank: int, attempt: int, follow: bool) -> None:
    """Print the log of a rank of a run."""
    from rsb_cluster.logs import read_log

    run = find_one(name, runs)
    for text in read_log(run, rank=rank, attempt=attempt, follow=follow):
        click.echo(text, nl=False)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@runs_option
def cancel(names: tuple[str, ...], runs: str) -> None:
    """End runs: a running one saves first, a queued one leaves the queue. Submit again to go on."""
    from rsb_cluster import control

    for run in find(names, runs):
        say(f"{run.run_id}: told job {control.cancel(run)} to end")


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@runs_option
def preempt(names: tuple[str, ...], runs: str) -> None:
    """Make runs save and go back to the queue, as a preemption does; to see that they come back."""
    from rsb_cluster import control

    for run in find(names, runs):
        say(f"{run.run_id}: told job {control.preempt(run)} to save and queue again")
