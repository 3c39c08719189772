"""What the commands share: terminal output, common options, and the lookup of runs by name."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from rsb_cluster.cli import complete
from rsb_cluster.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from rsb_cluster.config.schema import Override
    from rsb_cluster.runs.run import Run
    from rsb_cluster.runs.sweep import Sweep

runs_option = click.option(
    "--runs",
    default="",
    shell_complete=complete.folders,
    help="Folder or s3:// URL of the runs.  [default: runs, or that of 'config show']",
)
run_arguments = click.argument("names", nargs=-1, metavar="[RUN|SWEEP]...", shell_complete=complete.runs)
yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation if a name matches several runs.")

MAX_LISTED_RUNS = 20
PROGRESS_EVERY_S = 5.0

_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGE = re.compile(r"(\d+(?:\.\d+)?)([mhdw])")


class Since(click.ParamType):  # type: ignore[type-arg]  # generic in stubs only
    """A time: ``2h``, ``3d`` ago, or a local date such as ``2026-11-30`` or ``"2026-11-30 18:00"``."""

    name = "AGE|DATE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return unix time."""
        if isinstance(value, float):
            return value
        if match := _AGE.fullmatch(value):
            return time.time() - float(match[1]) * _SECONDS[match[2]]
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            self.fail(f"{value!r} is neither an age such as 90m, 2h or 3d nor a date such as 2026-11-30", param, ctx)


def set_option(metavar: str, help: str) -> Callable[[Any], Any]:
    """Return the option ``--set``; the command gets it as ``overrides``, pairs of a field's path and its value."""

    def parse(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> tuple[Override, ...]:
        from rsb_cluster.config.schema import parse_overrides

        return tuple(parse_overrides(texts))

    return click.option("--set", "overrides", multiple=True, metavar=metavar, help=help, callback=parse)


def console(*, stderr: bool = False) -> Console:
    """Return a console on standard output or standard error; lines are not wrapped where that is no terminal."""
    from rich.console import Console

    wrapped = Console(stderr=stderr)
    return wrapped if wrapped.is_terminal else Console(stderr=stderr, width=10_000)


def log(text: str) -> None:
    """Print a message to standard error; standard output is for data."""
    click.echo(text, err=True)


def print_json(value: Any) -> None:
    """Print plain values as JSON; NaN and infinity, which it lacks, as null."""
    from rsb_cluster.config.schema import finite

    click.echo(json.dumps(finite(value), indent=2, allow_nan=False))


def new_table(*columns: str | Text) -> Any:
    """Return an empty table in the style of all commands."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show progress while the block runs: a bar on a terminal, else a line now and then.

    Yields:
        The function that updates it, (done, total).
    """
    from rich.progress import Progress

    terminal = console(stderr=True)
    if not terminal.is_terminal:
        yield _progress_lines(what)
        return
    with Progress(console=terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _progress_lines(what: str) -> Callable[[int, int], None]:
    """Return a function that prints how far something is, at most every few seconds, and not if it is quick."""
    printed = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed >= PROGRESS_EVERY_S:
            printed = time.monotonic()
            log(f"{what}: {done:,} of {total:,}" if total else f"{what}: {done:,}")

    return update


def runs_url(runs: str) -> str:
    """Return the folder of the runs: the option ``--runs``, ``RSB_RUNS``, or the default."""
    from rsb_cluster.runs.lookup import runs_folder

    return runs_folder(runs)


def find_runs(names: tuple[str, ...], runs: str) -> list[Run]:
    """Return the runs that match the names; all runs if there are no names."""
    from rsb_cluster.runs import lookup

    return lookup.find_runs(runs_url(runs), names)


def find_runs_to_change(names: tuple[str, ...], runs: str, *, yes: bool) -> list[Run]:
    """Return the runs that match the names, for a command that changes them.

    If the beginning of an id matches several runs, the user must confirm: it may have been cut short by mistake. A
    glob, a sweep and ``--yes`` need no confirmation.

    Raises:
        ConfigError: Confirmation is needed, but standard input is no terminal.
    """
    from rsb_cluster.runs.lookup import match_names

    matches = match_names(runs_url(runs), names)
    for match in matches:
        if len(match.runs) == 1 or match.is_explicit or yes:
            continue
        question = _list_matches(match.name, match.runs)
        if not sys.stdin.isatty():
            raise ConfigError(f"{question}\nName one run, or select all of them with --yes or a glob.")
        click.confirm(f"{question}\nAll of them?", abort=True, err=True)
    return list({run.url: run for match in matches for run in match.runs}.values())


def find_runs_and_sweeps(names: tuple[str, ...], runs: str) -> tuple[list[Run], list[Sweep]]:
    """Return the runs that match the names, including folders that may hold no valid run, and all sweeps."""
    from rsb_cluster.runs import lookup
    from rsb_cluster.runs.sweep import list_sweeps

    url = runs_url(runs)
    found = lookup.find_runs(url, names, lookup.list_folders)
    if not found:
        log(lookup.no_runs(url))
    return found, list_sweeps(url)


def find_run(name: str, runs: str) -> Run:
    """Return the one run that matches a name. Raises ConfigError if several do."""
    found = find_runs((name,), runs)
    if len(found) > 1:
        raise ConfigError(f"{_list_matches(name, found)}\nName one run.")
    return found[0]


def _list_matches(name: str, found: Sequence[Run]) -> str:
    """Return a line that says how many runs a name matches, and a line for each of the first."""
    listed = [run.run_id for run in found[:MAX_LISTED_RUNS]]
    if len(listed) < len(found):
        listed.append(f"… and {len(found) - len(listed)} more")
    return "\n  ".join([f"'{name}' matches {len(found)} runs:", *listed])


def where_it_starts(run: Run) -> str:
    """Return at which step a run that is resubmitted starts."""
    from rsb_cluster.weights.resolve import checkpoints

    saved = checkpoints(run)
    return f"resumes from step {saved[-1].step:,}" if saved else "starts from the beginning"
