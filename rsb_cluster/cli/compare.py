"""The command that compares two runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from rsb_cluster.cli import complete
from rsb_cluster.cli.terminal import console, find_run, new_table, print_json, runs_option

if TYPE_CHECKING:
    from rsb_cluster.results.compare import Comparison, Curves

_LINES = 12  # of differences of a kind, so that all fits a screen
_WIDTH = 40  # of a value


@click.command()
@click.argument("run_a", shell_complete=complete.runs)
@click.argument("run_b", shell_complete=complete.runs)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all differences.")
@runs_option
def compare(run_a: str, run_b: str, as_json: bool, runs: str) -> None:
    """Show how two runs differ, and where their curves part.

    It lists what differs in recipe, data, versions and hardware, the first step at which the logged losses are not
    bitwise equal, the first from which on they differ by more than the losses' own scatter, and the final scores.

    \b
    rsb-cluster compare a1-resnet50-s0 a1-resnet50-s1
    """
    from rsb_cluster.results.compare import compare as compare_runs

    found = compare_runs(find_run(run_a, runs), find_run(run_b, runs))
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)


def _print(found: Comparison) -> None:
    from rich.text import Text

    table = new_table("", *map(Text, found.run_ids), Text("difference"))
    table.add_row("state", *found.states, "")
    for kind, pairs in found.differences.items():
        table.add_row(Text(kind, style="bold"), "", "", "")
        for name, values in list(pairs.items())[:_LINES]:
            table.add_row(Text(f"  {name}"), *(Text(_shown(value)) for value in values), "")
        if (hidden := len(pairs) - _LINES) > 0:
            table.add_row(f"  … and {hidden} more: --json", "", "", "")
    table.add_row(Text("scores", style="bold"), "", "", "")
    for name, (one, other) in found.scores.items():
        form = "+.2f" if name.endswith(("top1", "top5")) else "+.4g"
        change = "" if one is None or other is None or one == other else format(other - one, form)
        table.add_row(f"  {name.replace('_', ' ')}", _number(name, one), _number(name, other), change)
    console().print(table)
    if found.same:
        click.echo(f"\nthe same: {', '.join(found.same)}")
    click.echo(f"{'' if found.same else chr(10)}training loss: {_describe(found.curves)}")


def _describe(curves: Curves) -> str:
    if not curves.common:
        return "no step was logged by both runs"
    logged = f"{curves.common:,} step{'' if curves.common == 1 else 's'} logged by both"
    if curves.first_different is None or curves.losses is None:
        return f"{logged}, all bitwise equal"
    one, other = curves.losses
    start = f"bitwise equal up to step {curves.last_equal:,}" if curves.last_equal else "different from the first on"
    text = f"{logged}, {start}; at step {curves.first_different:,} {one!r} and {other!r}"
    if curves.parted is None or curves.parted_losses is None:
        text += "; never further apart than the losses' own scatter"
    else:
        one, other = curves.parted_losses
        text += f"; further apart than their own scatter from step {curves.parted:,} on ({one:.5g} and {other:.5g})"
    if curves.intervals[0] != curves.intervals[1]:
        text += f". A loss is a mean over {curves.intervals[0]} and {curves.intervals[1]} steps"
    return text


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name.endswith(("top1", "top5")):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"


def _shown(value: Any) -> str:
    text = "–" if value is None or value == "" else value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH // 2 - 1]}…{text[-_WIDTH // 2 :]}"
