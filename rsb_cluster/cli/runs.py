"""The commands that monitor and control runs: status, logs, cancel, preempt, retry."""

from __future__ import annotations

import signal

import click

from rsb_cluster.cli import complete
from rsb_cluster.cli.terminal import (
    Since,
    console,
    find_run,
    find_runs_to_change,
    log,
    print_json,
    run_arguments,
    runs_option,
    runs_url,
    where_it_starts,
    yes_option,
)
from rsb_cluster.errors import RsbError, plural

needed_arguments = click.argument(
    "names", nargs=-1, required=True, metavar="RUN|SWEEP...", shell_complete=complete.runs
)


def _words(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word.strip() for text in texts for word in text.split(",") if word.strip())


@click.command()
@run_arguments
@runs_option
@click.option(
    "--state",
    "states",
    multiple=True,
    callback=_words,
    metavar="STATE,...",
    help="Only runs in these states, such as failed,crashed.",
)
@click.option("--recipe", "recipes", multiple=True, callback=_words, metavar="NAME,...", help="Only these recipes.")
@click.option("--model", "models", multiple=True, callback=_words, metavar="NAME,...", help="Only these models.")
@click.option(
    "--since",
    type=Since(),
    default=0.0,
    show_default=False,
    help="Only runs that were submitted, started or ended since: 2h, 3d, or a date.",
)
@click.option(
    "--sort",
    type=click.Choice(["run", "state", "recipe", "model", "updated", "progress", "top1", "eta"]),
    help="Order of the lines; the newest, the farthest and the best come first.  [default: as named]",
)
@click.option("-w", "--watch", "watching", is_flag=True, help="Update live until all runs have ended or Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(
    names: tuple[str, ...],
    runs: str,
    states: tuple[str, ...],
    recipes: tuple[str, ...],
    models: tuple[str, ...],
    since: float,
    sort: str | None,
    watching: bool,
    as_json: bool,
) -> None:
    """Show the status of runs, one line each.

    On a terminal it is a table, in a pipe or a file tab-separated values.

    RUN is a run's id, the first whole words of one (a1 does not match a1h), a glob or a path. SWEEP is a sweep's id or
    its beginning. Without either, all runs are shown. Names of recipes and models may be globs.

    \b
    rsb-cluster status
    rsb-cluster status --state failed,crashed --since 2d
    rsb-cluster status resnet-depths --sort top1
    rsb-cluster status resnet-depths --watch
    """
    from rsb_cluster.monitor.status import count_runs, find_status, summary
    from rsb_cluster.monitor.table import SORT_KEYS, Filter, table, tsv
    from rsb_cluster.runs.lookup import no_runs

    wanted = Filter(states, recipes, models, since)
    chosen, found = find_status(runs_url(runs), names)
    pairs = [(run, one) for run, one in zip(chosen, found, strict=True) if wanted.takes(one)]
    if sort:
        pairs.sort(key=lambda pair: SORT_KEYS[sort](pair[1]))
    hidden, shown = len(found) - len(pairs), [one for _, one in pairs]
    if as_json:
        print_json([vars(one) for one in shown])
        return
    if not shown:
        log(f"{count_runs(hidden)}, none of them like that" if hidden else no_runs(runs_url(runs)))
        return
    if watching:
        from rsb_cluster.monitor.watch import watch

        watch([run for run, _ in pairs], console())
        return
    terminal = console()
    if not terminal.is_terminal:
        click.echo(tsv(shown))
    else:
        terminal.print(table(shown, terminal.width))
    if len(shown) > 1 or hidden:
        log(summary(shown) + (f" ({hidden} more not shown)" if hidden else ""))
    for one in shown:
        for note in filter(None, (one.problem, *one.changes)):
            log(f"note: {one.run_id}: {note}")


@click.command()
@click.argument("name", metavar="RUN", shell_complete=complete.runs)
@runs_option
@click.option("--rank", default=0, type=click.IntRange(0), show_default=True, help="Rank whose log to print.")
@click.option(
    "--attempt", default=0, type=click.IntRange(0), help="Attempt, from 1.  [default: all attempts of the last job]"
)
@click.option("-n", "--tail", type=click.IntRange(0), metavar="N", help="Only the last N lines.")
@click.option("-f", "--follow", is_flag=True, help="Keep printing as the log grows, until the job has ended.")
def logs(name: str, runs: str, rank: int, attempt: int, tail: int | None, follow: bool) -> None:
    """Print the log of one rank of a run.

    \b
    rsb-cluster logs a1-resnet50-s0 --tail 50
    rsb-cluster logs a1-resnet50-s0 -n 20 -f
    rsb-cluster logs a1-resnet50-s0 --attempt 2 --rank 7
    """
    from rsb_cluster.monitor.logs import last_lines, read_log

    run = find_run(name, runs)
    try:
        pieces = read_log(run, rank=rank, attempt=attempt, follow=follow, tell=log)
        for text in pieces if tail is None else last_lines(pieces, tail):
            click.echo(text, nl=False)
    except KeyboardInterrupt:  # with -f it is how one stops
        raise click.exceptions.Exit(128 + signal.SIGINT) from None


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
@click.option(
    "--failed", "failed_only", is_flag=True, help="Only runs that failed, not those that were stopped or cancelled."
)
def retry(names: tuple[str, ...], runs: str, yes: bool, failed_only: bool) -> None:
    """Resubmit runs that ended without a result.

    Each resumes from its last checkpoint, or starts from the beginning if it has none, with the nodes, limits and
    options of its last job. Finished, queued and running runs are left alone.

    \b
    rsb-cluster retry --failed resnet-depths
    rsb-cluster retry 'a3-resnet18-*'
    """
    from rsb_cluster.monitor import actions

    chosen = find_runs_to_change(names, runs, yes=yes)
    done = actions.retry(chosen, failed_only=failed_only)
    found = {run.run_id: run for run in chosen}
    for run_id, job_id in done.submitted.items():
        log(f"{run_id}: resubmitted as job {job_id}, {where_it_starts(found[run_id])}")
    if not done.submitted and not done.refused:
        log("nothing to retry: all runs are finished, queued, running, or stopped or cancelled by you")
    for run_id, why in done.perhaps_cancelled.items():
        log(f"{run_id}: left alone, as {why} 'retry' without --failed resubmits it.")
    if done.refused:
        reasons = "\n".join(f"{run_id}: {why}" for run_id, why in done.refused.items())
        raise RsbError(f"{plural(len(done.refused), 'run')} could not be resubmitted:\n{reasons}")
