"""What the commands share: talking to the terminal, and finding the runs that are meant."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from rsb_cluster.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from rsb_cluster.config.schema import Override
    from rsb_cluster.runs.run import Run
    from rsb_cluster.runs.sweep import Sweep

runs_option = click.option("--runs", default="", help="Folder or s3:// URL of the runs.  [default: runs]")
run_arguments = click.argument("names", nargs=-1, metavar="[RUN|SWEEP]...")
yes_option = click.option("--yes", is_flag=True, help="Do not ask where a name stands for several runs.")

SHOWN_RUNS = 20


def set_option(metavar: str, help: str) -> Callable[[Any], Any]:
    """Return the option ``--set``, which a command gets as ``overrides``: pairs of a field's path and its value."""

    def parsed(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> tuple[Override, ...]:
        from rsb_cluster.config.schema import parse_overrides

        return tuple(parse_overrides(texts))

    return click.option("--set", "overrides", multiple=True, metavar=metavar, help=help, callback=parsed)


def console(*, stderr: bool = False) -> Console:
    """Return a console on standard output or standard error; a file has no width to respect."""
    from rich.console import Console

    opened = Console(stderr=stderr)
    return opened if opened.is_terminal else Console(stderr=stderr, width=10_000)


def say(text: str) -> None:
    """Talk goes to standard error; standard output is for data."""
    click.echo(text, err=True)


def new_table(*columns: str | Text) -> Any:
    """Return an empty table in the style of all commands."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal while the block runs; call what it gives with (done, total)."""
    from rich.progress import Progress

    shown_on = console(stderr=True)
    with Progress(console=shown_on, transient=True, disable=not shown_on.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def runs_url(runs: str) -> str:
    """Return where the runs are: the option, ``RSB_RUNS``, or the default."""
    from rsb_cluster.runs.lookup import default_runs

    return runs or os.environ.get("RSB_RUNS") or default_runs()


def find(names: tuple[str, ...], runs: str) -> list[Run]:
    """Return the runs that names stand for; all without a name."""
    from rsb_cluster.runs.lookup import find_runs

    return find_runs(runs_url(runs), names)


def find_to_change(names: tuple[str, ...], runs: str, *, yes: bool) -> list[Run]:
    """Return the runs that names stand for, for a command that does something to them.

    The beginning of an id may be short of a word that was meant: where it stands for several runs the user is asked. A
    glob, a sweep and ``--yes`` say so themselves.

    Raises:
        ConfigError: There is nobody to ask.
    """
    from rsb_cluster.runs.lookup import match_names

    found = match_names(runs_url(runs), names)
    for named in found:
        if len(named.runs) == 1 or named.says_several or yes:
            continue
        shown = [run.run_id for run in named.runs[:SHOWN_RUNS]]
        if len(shown) < len(named.runs):
            shown.append(f"… and {len(named.runs) - len(shown)} more")
        which = "\n  ".join([f"'{named.name}' stands for {len(named.runs)} runs:", *shown])
        if not sys.stdin.isatty():
            raise ConfigError(f"{which}\nName one; or say that all are meant, with --yes or a glob.")
        click.confirm(f"{which}\nAll of them?", abort=True, err=True)
    return list({run.url: run for named in found for run in named.runs}.values())


def find_with_sweeps(names: tuple[str, ...], runs: str) -> tuple[list[Run], list[Sweep]]:
    """Return what names stand for, with what may be no run, and all sweeps: for those who read results."""
    from rsb_cluster.runs.lookup import find_runs, list_folders
    from rsb_cluster.runs.sweep import list_sweeps

    url = runs_url(runs)
    return find_runs(url, names, list_folders), list_sweeps(url)


def find_one(name: str, runs: str) -> Run:
    """Return the one run that a name stands for."""
    found = find((name,), runs)
    if len(found) > 1:
        raise ConfigError(f"'{name}' matches {len(found)} runs: {', '.join(r.run_id for r in found)}. Name one.")
    return found[0]
