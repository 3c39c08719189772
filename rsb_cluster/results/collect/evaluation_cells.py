"""What every table of evaluations says: its columns, the text of each cell, and the remarks below."""

from __future__ import annotations

from rsb_cluster.results.collect.cells import published_text
from rsb_cluster.results.collect.collection import Collection, EvaluationRow

EVALUATION_COLUMNS = (
    *("weights", "model", "data", "labels", "px", "crop", "metric", "n", "%", "others", "published", "delta"),
    "verdict",
)
EVALUATION_WORDS = ("weights", "model", "data", "labels", "metric", "others", "verdict")  # aligned to the left


def evaluation_cells(line: EvaluationRow) -> dict[str, str]:
    """Return the text of a line's cells by column. ``others`` are the other metrics, and groups of images."""
    what, std = line.what, line.std
    mean = "" if line.mean is None else f"{line.mean:.2f}" + ("" if std is None else f" ± {std:.2f}")
    others = {metric: value for metric, value in what.values.items() if metric != what.metric}
    shown = [f"{metric.replace('_', ' ')} {value:.2f}" for metric, value in others.items()]
    shown += [f"{name} {group.value:.2f}" for name, group in what.groups.items()]
    total, counted = len(line.rows), len(line.counted)
    return {
        "weights": line.name,
        "model": line.model,
        "data": f"{what.data_set}/{what.part}",
        "labels": what.labels,
        "px": str(what.resolution),
        "crop": f"{what.crop:.4g}",
        "metric": what.metric.replace("_", " "),
        "n": str(counted) if counted == total else f"{counted}/{total}",
        "%": mean,
        "others": ", ".join(shown) if total == 1 else "",
        "published": published_text(line.references[0]) if line.references else "",
        "delta": "" if line.delta is None else f"{line.delta:+.2f}",
        "verdict": line.verdict,
    }


def evaluation_remarks(collection: Collection) -> dict[str, list[str]]:
    """Return what stands below the table of evaluations, by heading."""
    compared: list[str] = []
    notes: list[str] = []
    for line in collection.evaluations:
        what = line.what
        name = f"{line.name} on {what.data_set}/{what.part}" + (f", labels {what.labels}" if what.labels else "")
        if line.references:
            first, *others = (f"{published_text(r)} ({r.source})" for r in line.references)
            compared.append(f"{name}: {first}" + (f"; also {', '.join(others)}" if others else ""))
        if what.bad:
            notes.append(f"{name}: images that could not be decoded, and count as wrong: {what.bad:,}")
        if what.scored < what.samples:
            notes.append(f"{name}: {what.scored:,} of {what.samples:,} images have a label; the others are skipped")
        notes += [f"{name}: {note}" for note in line.notes]
    found = {
        "Evaluations compared with": compared,
        "Notes on evaluations": notes,
        "Evaluations not read": list(collection.unreadable),
    }
    return {heading: [" ".join(line.split()) for line in lines] for heading, lines in found.items() if lines}
