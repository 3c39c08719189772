"""The content of all tables of groups: columns, cells, and the remarks below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rsb_cluster.results.collect.collection import Collection, Group
from rsb_cluster.results.collect.rows import describe
from rsb_cluster.results.references import Reference

COLUMNS = (
    *("recipe", "model", "n", "top-1", "top-5", "min–max", "seed 0", "paper", "timm", "delta", "verdict"),
    *("GPU-hours", "attempts", "preemptions", "repeated", "goodput"),
)
TEXT_COLUMNS = ("recipe", "model", "verdict")  # aligned to the left
MAX_REASON = 300  # characters


def cells(group: Group) -> dict[str, str]:
    """Return the text of a group's cells by column.

    ``n`` is ``2/3`` if not all of the group's runs count. ``repeated`` are steps.
    """
    paper = next((r for r in group.references if not r.released), None)
    timm = next((r for r in group.references if r.released), None)
    total = len(group.rows) + len(group.unfinished)
    return {
        "recipe": group.label,
        "model": group.model,
        "n": str(group.n) if group.n == total else f"{group.n}/{total}",
        "top-1": _with_std(_number(group.mean), group.std),
        "top-5": _number(group.top5),
        "min–max": f"{group.min:.2f}–{group.max:.2f}" if group.n > 1 else "",
        "seed 0": _number(group.seed0),
        "paper": published_text(paper) if paper else "",
        "timm": published_text(timm) if timm else "",
        "delta": "" if group.delta is None else f"{group.delta:+.2f}",
        "verdict": group.verdict,
        "GPU-hours": f"{group.gpu_hours:,.1f}",
        "attempts": str(group.attempts),
        "preemptions": str(group.preemptions),
        "repeated": f"{group.steps_repeated:,}",
        "goodput": "" if group.goodput is None else f"{group.goodput:.1%}",
    }


def filled_columns(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the columns that say something: without published values, say, three are empty, and a screen is narrow."""
    return [name for name in columns if not rows or any(row[name] for row in rows)]


def remarks(collection: Collection) -> dict[str, list[str]]:
    """Return the remarks below the table, by heading."""
    compared: list[str] = []
    changed: list[str] = []
    notes: list[str] = []
    flagged: list[str] = []
    for group in collection.groups:
        name = f"{group.label}, {group.model}"
        if group.references:
            first, *others = (f"{published_text(r)} ({r.source})" for r in group.references)
            compared.append(f"{name}: {first}" + (f"; also {', '.join(others)}" if others else ""))
        if group.changes:
            changed.append(f"{name}: {describe(group.changes)}")
        notes += [f"{name}: {note}" for note in group.notes]
        flagged += [f"{row.run.run_id}: {'; '.join(row.flags)}" for row in group.rows if row.flags]
    unfinished = [f"{run.run_id}: {run.state}: {_short(run.reason)}" for run in collection.unfinished]
    found = {
        "Compared with": compared,
        "Global batch": _batches(collection),
        "Changed (there → here)": changed,
        "Notes": notes,
        "Not counted": flagged,
        "No result": unfinished,
    }
    return {heading: [" ".join(line.split()) for line in lines] for heading, lines in found.items() if lines}


def _batches(collection: Collection) -> list[str]:
    """Return the virtual ranks and the span of BatchNorm, with the groups that have them where these differ."""
    names: dict[str, list[str]] = {}
    for group in collection.groups:
        if group.virtual_ranks:
            plural = "s" if group.virtual_ranks > 1 else ""
            text = f"{group.virtual_ranks * group.micro_batch} = {group.virtual_ranks} virtual rank{plural} of "
            text += f"{group.micro_batch} images, BatchNorm over {group.micro_batch}"
            text += " as in the paper" if group.is_papers_batch else ""
            names.setdefault(text, []).append(f"{group.label}, {group.model}")
    return [text if len(names) == 1 else f"{text}: {'; '.join(found)}" for text, found in names.items()]


def published_text(reference: Reference) -> str:
    """Return a published value with its published digits: 80.4 is not 80.40."""
    std = reference.std
    return f"{reference.top1:.2f} ± {std:.2f}" if std is not None else str(reference.top1)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _with_std(text: str, std: float | None) -> str:
    return text if std is None else f"{text} ± {std:.2f}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 1] + "…"
