"""A collection as a table for a terminal, or for a file of plain text."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rsb_cluster.collect.cells import COLUMNS, WORDS, cells, remarks
from rsb_cluster.collect.groups import Collection

DROPPED_FIRST = ("repeated", "attempts", "min–max", "top-5", "seed 0", "goodput", "preemptions", "timm", "GPU-hours")
COLOURS = {"reproduced": "green", "above": "cyan", "below": "red", "modified": "yellow", "reconstruction": "magenta"}


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
    unlimited = console.options.update(width=10_000)
    shown = list(COLUMNS)
    for name in (None, *DROPPED_FIRST):
        if name:
            shown.remove(name)
        made = _rich_table(collection, shown)
        if console.measure(made, options=unlimited).maximum <= width:
            break
    if collection.groups:
        console.print(made)
    else:
        console.print(Text("No run has a result."))
    below = remarks(collection)
    left_out = [name for name in COLUMNS if name not in shown]
    if left_out and collection.groups:
        below["Left out for want of width"] = [", ".join(left_out)]
    for heading, lines in below.items():
        console.print(Text(f"\n{heading}:", style="bold"))
        for remark in lines:
            console.print(Text(f"  {remark}"))
    return file.getvalue()


def _rich_table(collection: Collection, columns: Sequence[str]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        made.add_column(name, justify="left" if name in WORDS else "right")
    for group in collection.groups:
        texts = cells(group)
        colour = {"verdict": COLOURS.get(group.verdict, "")}
        made.add_row(*(Text(texts[name], style=colour.get(name, "")) for name in columns))
    return made
