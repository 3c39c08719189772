"""The content of all tables of evaluations: columns, cells, and the remarks below."""

from __future__ import annotations

from rsb_cluster.results.collect.cells import published_text
from rsb_cluster.results.collect.collection import Collection, EvaluationRow

EVALUATION_COLUMNS = (
    *("weights", "model", "data", "labels", "px", "crop", "metric", "n", "%", "others", "published", "delta"),
    "verdict",
)
EVALUATION_TEXT_COLUMNS = ("weights", "model", "data", "labels", "metric", "others", "verdict")  # aligned to the left


def evaluation_cells(line: EvaluationRow) -> dict[str, str]:
    """Return the text of a row's cells by column. ``others`` are the other metrics, and groups of images."""
    evaluation, std = line.evaluation, line.std
    mean = "" if line.mean is None else f"{line.mean:.2f}" + ("" if std is None else f" ± {std:.2f}")
    others = {metric: value for metric, value in evaluation.values.items() if metric != evaluation.metric}
    shown = [f"{metric.replace('_', ' ')} {value:.2f}" for metric, value in others.items()]
    shown += [f"{name} {group.value:.2f}" for name, group in evaluation.groups.items()]
    total, counted = len(line.rows), len(line.counted)
    return {
        "weights": line.name,
        "model": line.model,
        "data": f"{evaluation.data_set}/{evaluation.part}",
        "labels": evaluation.labels,
        "px": str(evaluation.resolution),
        "crop": f"{evaluation.crop:.4g}",
        "metric": evaluation.metric.replace("_", " "),
        "n": str(counted) if counted == total else f"{counted}/{total}",
        "%": mean,
        "others": ", ".join(shown) if total == 1 else "",
        "published": published_text(line.references[0]) if line.references else "",
        "delta": "" if line.delta is None else f"{line.delta:+.2f}",
        "verdict": line.verdict,
    }


def evaluation_remarks(collection: Collection) -> dict[str, list[str]]:
    """Return the remarks below the table of evaluations, by heading."""
    compared: list[str] = []
    notes: list[str] = []
    for line in collection.evaluations:
        row = line.evaluation
        name = f"{line.name} on {row.data_set}/{row.part}" + (f", labels {row.labels}" if row.labels else "")
        if line.references:
            first, *others = (f"{published_text(r)} ({r.source})" for r in line.references)
            compared.append(f"{name}: {first}" + (f"; also {', '.join(others)}" if others else ""))
        if row.bad:
            notes.append(f"{name}: images that could not be decoded, and count as wrong: {row.bad:,}")
        if row.scored < row.samples:
            notes.append(f"{name}: {row.scored:,} of {row.samples:,} images have a label; the others are skipped")
        notes += [f"{name}: {note}" for note in line.notes]
    found = {
        "Evaluations compared with": compared,
        "Notes on evaluations": notes,
        "Evaluations not read": list(collection.unreadable),
    }
    return {heading: [" ".join(line.split()) for line in lines] for heading, lines in found.items() if lines}
