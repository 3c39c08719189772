"""A collection as a table for a terminal, or for a file of plain text."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rsb_cluster.results.collect.cells import COLUMNS, WORDS, cells, remarks
from rsb_cluster.results.collect.collection import Collection
from rsb_cluster.results.collect.evaluation_cells import (
    EVALUATION_COLUMNS,
    EVALUATION_WORDS,
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
    """Return the table and the remarks below it.

    Args:
        collection: What was collected.
        terminal: Whether to use colours, and to leave out what the terminal's width has no room for.
    """
    file = io.StringIO()
    # Without a terminal nothing is folded: a file or a pipe has no width.
    width = shutil.get_terminal_size((120, 24)).columns if terminal else 10_000
    console = Console(file=file, width=width, force_terminal=terminal, color_system="standard" if terminal else None)
    below = remarks(collection)
    if collection.groups:
        rows = [cells(group) for group in collection.groups]
        if left_out := _print_table(console, rows, COLUMNS, WORDS):
            below["Left out for want of width"] = [", ".join(left_out)]
    else:
        console.print(Text("No run has a result."))
    _print_remarks(console, below)
    if collection.evaluations:
        console.print()
        rows = [evaluation_cells(line) for line in collection.evaluations]
        _print_table(console, rows, EVALUATION_COLUMNS, EVALUATION_WORDS)
    _print_remarks(console, evaluation_remarks(collection))
    return file.getvalue()


def _print_table(
    console: Console, rows: Sequence[Mapping[str, str]], columns: Sequence[str], words: Sequence[str]
) -> list[str]:
    """Print a table with the columns that there is room for; return the others."""
    unlimited = console.options.update(width=10_000)
    shown = list(columns)
    for name in (None, *(name for name in DROPPED_FIRST if name in columns)):
        if name:
            shown.remove(name)
        made = _rich_table(rows, shown, words)
        if console.measure(made, options=unlimited).maximum <= console.width:
            break
    console.print(made)
    return [name for name in columns if name not in shown]


def _print_remarks(console: Console, below: Mapping[str, Sequence[str]]) -> None:
    for heading, lines in below.items():
        console.print(Text(f"\n{heading}:", style="bold"))
        for remark in lines:
            console.print(Text(f"  {remark}"))


def _rich_table(rows: Sequence[Mapping[str, str]], columns: Sequence[str], words: Sequence[str]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        made.add_column(name, justify="left" if name in words else "right")
    for texts in rows:
        colour = {"verdict": COLOURS.get(texts["verdict"], "")}
        made.add_row(*(Text(texts[name], style=colour.get(name, "")) for name in columns))
    return made
