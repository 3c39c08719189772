"""The command group ``runs``: a page on one run, and removing runs or what they no longer need."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from rsb_cluster.cli import complete
from rsb_cluster.cli.terminal import (
    MAX_LISTED_RUNS,
    Since,
    console,
    find_run,
    find_runs_to_change,
    log,
    new_table,
    print_json,
    run_arguments,
    runs_option,
    runs_url,
)
from rsb_cluster.cli.terminal import find_runs as find_all_runs
from rsb_cluster.errors import ConfigError

if TYPE_CHECKING:
    from rsb_cluster.monitor.cleanup import Plan
    from rsb_cluster.runs.run import Run

_MIN_END = 12  # characters of the reason why an attempt ended
MAX_LINES = 40  # of a list of what would go; a longer one is summed up

_yes = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")


@click.group()
def runs() -> None:
    """Show one run on a page, delete runs, or prune their folders."""


@runs.command()
@click.argument("name", metavar="RUN", shell_complete=complete.runs)
@runs_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, runs: str, as_json: bool) -> None:
    """Show everything about one run on a page.

    What it trains and what was modified, its state and score, its jobs, its attempts with their hosts and ends, its
    checkpoints and files.
    """
    from rsb_cluster.monitor.show import read_page

    page = read_page(find_run(name, runs))
    if as_json:
        print_json(page.values)
        return
    width = max(map(len, page.facts)) + 2
    for label, text in page.facts.items():
        click.echo(f"{label:<{width}}" + text.replace("\n", "\n" + " " * width))
    for rows in (page.attempts, page.evaluations, page.files):
        if rows:
            click.echo()
            _print_rows(rows)


def _print_rows(rows: Sequence[Mapping[str, str]]) -> None:
    from rich.text import Text

    table = new_table(*rows[0])
    for column in table.columns:
        column.justify = "left" if column.header in ("job", "hosts", "end", "files") else "right"
        column.no_wrap = column.header != "end"
    for row in rows:
        table.add_row(*map(Text, row.values()))
    # On a narrow terminal the terminal wraps the lines: a number that is cut is another number.
    fixed = [max(len(name), *(len(row[name]) for row in rows)) + 2 for name in rows[0] if name != "end"]
    terminal = console()
    terminal.width = max(terminal.width, sum(fixed) + _MIN_END * ("end" in rows[0]))
    terminal.print(table)


@runs.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN|SWEEP...", shell_complete=complete.runs)
@runs_option
@click.option("--all", "everything", is_flag=True, help="Also delete the results, metrics and attempts.")
@_yes
def delete(names: tuple[str, ...], runs: str, everything: bool, yes: bool) -> None:
    """Delete runs: with --all as a whole, else all but the results.

    The record from which tables and curves are made stays (result.json, metrics, attempts), and with it the run in
    'status' and 'collect'. What would go is shown first. Runs that are queued or running are refused.

    \b
    rsb-cluster runs delete a1-resnet18-s0-0123abcd
    rsb-cluster runs delete --all 'digits-*'
    """
    from rsb_cluster.monitor import cleanup

    chosen = find_runs_to_change(names, runs, yes=yes)
    _confirm_and_remove(cleanup.plan_delete(chosen, everything, _all(runs)), yes)
    if not everything:
        log("results and metrics stay; 'runs delete --all' removes them, too")


@runs.command()
@run_arguments
@runs_option
@click.option(
    "--older-than",
    type=Since(),
    metavar="AGE|DATE",
    help="Only of runs in which nothing happened since: 30d, 2w, or a date.",
)
@_yes
def prune(names: tuple[str, ...], runs: str, older_than: float | None, yes: bool) -> None:
    """Remove what ended runs no longer need. What would go is shown first.

    Of finished runs: all checkpoints but the last and the best, logs, samples, scripts. Of others that have ended:
    checkpoints from which they cannot resume, logs and samples of all attempts but the last, scripts of all submits but
    the last. Of both: quarantined checkpoints, specs and wheels of cloud jobs. Runs that never started go as a whole.
    Results and metrics stay.

    \b
    rsb-cluster runs prune --older-than 30d
    rsb-cluster runs prune resnet-depths --yes
    """
    from rsb_cluster.monitor import cleanup
    from rsb_cluster.runs.lookup import list_folders

    chosen = find_all_runs(names, runs) if names else list_folders(runs_url(runs))
    plan = cleanup.plan_prune(chosen, older_than or time.time(), _all(runs), orphans=not names)
    for run_id, why in list(plan.left_alone.items())[:MAX_LISTED_RUNS]:
        log(f"left alone: {run_id} {why}")
    if (more := len(plan.left_alone) - MAX_LISTED_RUNS) > 0:
        log(f"… and {more} more")
    _confirm_and_remove(plan, yes)


def _all(runs: str) -> list[Run]:
    """Return all runs, and the evaluations that were submitted as jobs: each names folders of scripts."""
    from rsb_cluster.runs.lookup import list_evaluations, list_folders

    return [*list_folders(runs_url(runs)), *list_evaluations(runs_url(runs))]


def _confirm_and_remove(plan: Plan, yes: bool) -> None:
    """Show what would go, ask, and remove it. Raises ConfigError if there is nobody to ask."""
    from rsb_cluster.monitor import cleanup

    if not plan.removals:
        log("there is nothing to remove")
        return
    _show(plan)
    size = cleanup.format_bytes(plan.bytes)
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"{size} would be removed, and nothing was. Confirm with --yes.")
        click.confirm(f"Remove these {size}? This cannot be undone.", abort=True, err=True)
    cleanup.carry_out(plan)
    log(f"removed {size}")


def _show(plan: Plan) -> None:
    from rsb_cluster.monitor.cleanup import format_bytes

    table = new_table("run", "what", "files", "size")
    for column in table.columns[2:]:
        column.justify = "right"
    rows: dict[tuple[str, str], list[int]] = {}
    is_long = len(plan.removals) > MAX_LINES
    for removal in plan.removals:
        files_and_bytes = rows.setdefault(("" if is_long else removal.owner, removal.what), [0, 0, 0])
        for i, number in enumerate((1, removal.files, removal.bytes)):
            files_and_bytes[i] += number
    for (owner, what), (number, files, size) in rows.items():
        table.add_row(f"{number} folders" if is_long else owner, what, f"{files:,}", format_bytes(size))
    total = sum(removal.files for removal in plan.removals)
    table.add_row("total", "", f"{total:,}", format_bytes(plan.bytes))
    console().print(table)
