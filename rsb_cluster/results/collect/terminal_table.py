"""A collection as a table for a terminal or a plain text file."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rsb_cluster.results.collect.cells import COLUMNS, TEXT_COLUMNS, cells, filled_columns, remarks
from rsb_cluster.results.collect.collection import Collection
from rsb_cluster.results.collect.evaluation_cells import (
    EVALUATION_COLUMNS,
    EVALUATION_TEXT_COLUMNS,
    evaluation_cells,
    evaluation_remarks,
)

DROPPED_FIRST = ("repeated", "attempts", "min–max", "top-5", "seed 0", "goodput", "preemptions", "timm", "GPU-hours")
COLOURS = {
    "reproduced": "green",
    "above": "cyan",
    "below": "red",
    "modified": "yellow",
    "reconstruction": "magenta",
    "agrees": "green",
    "differs": "red",
}


def table(collection: Collection, terminal: bool) -> str:
    """Return the tables and the remarks below them.

    Args:
        collection: The collection.
        terminal: Whether to use colours, and to omit columns that do not fit the terminal's width.
    """
    file = io.StringIO()
    # Without a terminal nothing is wrapped: a file or a pipe has no width.
    width = shutil.get_terminal_size((120, 24)).columns if terminal else 10_000
    has_colours = terminal and os.environ.get("TERM") != "dumb"
    console = Console(file=file, width=width, force_terminal=terminal, color_system="standard" if has_colours else None)
    below = remarks(collection)
    if collection.groups:
        rows = [cells(group) for group in collection.groups]
        if omitted := _print_table(console, rows, COLUMNS, TEXT_COLUMNS):
            below["Columns omitted, as the terminal is too narrow"] = [", ".join(omitted)]
    else:
        console.print(Text("No run has a result."))
    _print_remarks(console, below)
    if collection.evaluations:
        console.print()
        rows = [evaluation_cells(line) for line in collection.evaluations]
        _print_table(console, rows, EVALUATION_COLUMNS, EVALUATION_TEXT_COLUMNS)
    _print_remarks(console, evaluation_remarks(collection))
    return file.getvalue()


def _print_table(
    console: Console, rows: Sequence[Mapping[str, str]], columns: Sequence[str], text_columns: Sequence[str]
) -> list[str]:
    """Print a table with the columns that fit, on a terminal without empty ones; return those that do not fit."""
    unlimited = console.options.update(width=10_000)
    if console.is_terminal:
        columns = filled_columns(columns, rows)
    shown = list(columns)
    for name in (None, *(name for name in DROPPED_FIRST if name in columns)):
        if name:
            shown.remove(name)
        table = _rich_table(rows, shown, text_columns)
        needed = console.measure(table, options=unlimited).maximum
        if needed <= console.width:
            break
    # What does not fit even so is wrapped by the terminal: a number that is cut is another number.
    width, console.width = console.width, max(console.width, needed)
    console.print(table)
    console.width = width
    return [name for name in columns if name not in shown]


def _print_remarks(console: Console, below: Mapping[str, Sequence[str]]) -> None:
    for heading, lines in below.items():
        console.print(Text(f"\n{heading}:", style="bold"))
        for remark in lines:
            console.print(Text(f"  {remark}"))


def _rich_table(rows: Sequence[Mapping[str, str]], columns: Sequence[str], text_columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in text_columns else "right")
    for texts in rows:
        colour = {"verdict": COLOURS.get(texts["verdict"], "")}
        table.add_row(*(Text(texts[name], style=colour.get(name, "")) for name in columns))
    return table
