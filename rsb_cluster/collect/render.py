"""A collection as text: a table, Markdown, JSON or CSV.

The table and Markdown have one line per group, and say below it what was compared with what and which runs do not
count. JSON has all: groups with their runs, and the unfinished runs. CSV has one line per run, the unfinished ones too,
with all that is known of the run and nothing of its group.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from rsb_cluster.collect.groups import Collection, Group
from rsb_cluster.collect.rows import describe

Format = Literal["table", "csv", "json", "md"]

COLUMNS = (
    *("recipe", "model", "n", "top-1", "top-5", "min–max", "paper", "delta", "verdict"),
    *("GPU-hours", "attempts", "preemptions", "goodput"),
)
WORDS = ("recipe", "model", "verdict")  # aligned to the left
DROPPED_FIRST = ("attempts", "min–max", "top-5", "goodput", "preemptions", "GPU-hours")
COLOURS = {"reproduced": "green", "above": "cyan", "below": "red", "modified": "yellow"}
RUN_COLUMNS = (
    *("state", "counted", "run_id", "recipe", "procedure", "model", "seed", "virtual_ranks", "modified"),
    *("top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss", "samples", "steps", "epochs"),
    *("gpu_hours", "train_s", "images_per_s", "goodput", "attempts", "preemptions", "finished"),
    *("code", "url", "reason"),
)
LONGEST_REASON = 300


def render(collection: Collection, format: Format, *, terminal: bool | None = None) -> str:
    """Return a collection as text that ends with a newline.

    Args:
        collection: What was collected.
        format: ``table``, ``csv``, ``json`` or ``md``; see the module.
        terminal: Whether a table may have colours and must fit the terminal's width, where it leaves out what fits
            least; None asks standard output.
    """
    if format == "json":
        return json.dumps(_plain(_to_json(collection)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if format == "csv":
        return _csv(collection)
    if format == "md":
        return _markdown(collection)
    return _table(collection, sys.stdout.isatty() if terminal is None else terminal)


def _to_json(collection: Collection) -> dict[str, Any]:
    groups = []
    for group in collection.groups:
        values = {key: value for key, value in vars(group).items() if key not in ("rows", "references")}
        values["references"] = [asdict(reference) for reference in group.references]
        groups.append(values | {"runs": [row.to_json() for row in group.rows]})
    return {"groups": groups, "unfinished": [run.to_json() for run in collection.unfinished]}


def _plain(value: Any) -> Any:
    """Turn NaN and infinity, which JSON lacks, into null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _csv(collection: Collection) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, RUN_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for group in collection.groups:
        writer.writerows(row.to_json() for row in group.rows)
    writer.writerows({**run.to_json(), "counted": False} for run in collection.unfinished)
    return text.getvalue()


def _markdown(collection: Collection) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    lines = [line(COLUMNS), line([":--" if name in WORDS else "--:" for name in COLUMNS])]
    lines += [line([_cells(group)[name] for name in COLUMNS]) for group in collection.groups]
    for heading, remarks in _remarks(collection).items():
        lines += ["", f"{heading}:", "", *(f"- {remark}" for remark in remarks)]
    return "\n".join(lines) + "\n"


def _table(collection: Collection, terminal: bool) -> str:
    from rich.console import Console  # here, so that JSON and CSV do not wait for it
    from rich.text import Text

    file = io.StringIO()
    # Without a terminal nothing is folded: a file or a pipe has no width.
    width = shutil.get_terminal_size((120, 24)).columns if terminal else 10_000
    console = Console(file=file, width=width, force_terminal=terminal, color_system="standard" if terminal else None)
    unlimited = console.options.update(width=10_000)
    shown = list(COLUMNS)
    for name in (None, *DROPPED_FIRST):
        if name:
            shown.remove(name)
        table = _rich_table(collection, shown)
        if console.measure(table, options=unlimited).maximum <= width:
            break
    if collection.groups:
        console.print(table)
    else:
        console.print(Text("No run has a result."))
    remarks = _remarks(collection)
    left_out = [name for name in COLUMNS if name not in shown]
    if left_out and collection.groups:
        remarks["Left out for want of width"] = [", ".join(left_out)]
    for heading, lines in remarks.items():
        console.print(Text(f"\n{heading}:", style="bold"))
        for remark in lines:
            console.print(Text(f"  {remark}"))
    return file.getvalue()


def _rich_table(collection: Collection, columns: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in WORDS else "right")
    for group in collection.groups:
        cells = _cells(group)
        colour = {"verdict": COLOURS.get(group.verdict, "")}
        table.add_row(*(Text(cells[name], style=colour.get(name, "")) for name in columns))
    return table


def _cells(group: Group) -> dict[str, str]:
    reference = group.references[0] if group.references else None
    return {
        "recipe": _label(group),
        "model": group.model,
        "n": str(group.n),
        "top-1": _with_std(_number(group.mean), group.std),
        "top-5": _number(group.top5),
        "min–max": f"{group.min:.2f}–{group.max:.2f}" if group.n > 1 else "",
        # As many digits as were published: 80.4 is not 80.40.
        "paper": _published(reference.top1, reference.std) if reference else "",
        "delta": "" if group.delta is None else f"{group.delta:+.2f}",
        "verdict": group.verdict,
        "GPU-hours": f"{group.gpu_hours:,.1f}",
        "attempts": str(group.attempts),
        "preemptions": str(group.preemptions),
        "goodput": f"{group.goodput:.1%}",
    }


def _label(group: Group) -> str:
    """Name a group by its recipe and, where that is short, by what was changed."""
    if not group.changes:
        return group.recipe
    if len(group.changes) > 2:
        return f"{group.recipe} with {len(group.changes)} changes"
    return f"{group.recipe} with " + ", ".join(f"{key}={here}" for key, (_, here) in sorted(group.changes.items()))


def _remarks(collection: Collection) -> dict[str, list[str]]:
    """Return what stands below the table, by heading."""
    compared: list[str] = []
    changed: list[str] = []
    notes: list[str] = []
    flagged: list[str] = []
    for group in collection.groups:
        name = f"{_label(group)}, {group.model}"
        if group.references:
            first, *others = (f"{_published(r.top1, r.std)} ({r.source})" for r in group.references)
            compared.append(f"{name}: {first}" + (f"; also {', '.join(others)}" if others else ""))
        if group.changes:
            changed.append(f"{name}: {describe(group.changes)}")
        notes += [f"{name}: {note}" for note in group.notes]
        flagged += [f"{row.run.run_id}: {'; '.join(row.flags)}" for row in group.rows if row.flags]
    unfinished = [f"{run.run_id}: {run.state}: {_short(run.reason)}" for run in collection.unfinished]
    remarks = {
        "Compared with": compared,
        "Changed (there → here)": changed,
        "Notes": notes,
        "Not counted": flagged,
        "No result": unfinished,
    }
    return {heading: [" ".join(line.split()) for line in lines] for heading, lines in remarks.items() if lines}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _with_std(text: str, std: float | None) -> str:
    return text if std is None else f"{text} ± {std:.2f}"


def _published(top1: float, std: float | None) -> str:
    return f"{top1:.2f} ± {std:.2f}" if std is not None else str(top1)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"
