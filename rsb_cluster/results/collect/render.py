"""A collection as text: a table, Markdown, LaTeX, HTML, JSON or CSV.

The tables have one row per group, and remarks below on the references and on the runs that do not count. JSON has
everything: groups with their runs, and the unfinished runs. CSV has one row per run, finished or not, without its
group; and one per evaluation.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import asdict
from typing import Any, Literal, get_args

from rsb_cluster.config.schema import finite
from rsb_cluster.evaluation.record import Evaluation
from rsb_cluster.results.collect.collection import Collection, EvaluationRow

Format = Literal["table", "csv", "json", "md", "latex", "html"]
FORMATS: tuple[str, ...] = get_args(Format)

RUN_COLUMNS = (
    *("state", "counted", "run_id", "recipe", "procedure", "model", "seed", "virtual_ranks", "modified"),
    *("top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss", "samples", "steps", "epochs"),
    *("gpu_hours", "rank_hours", "wall_s", "train_s", "images_per_s", "goodput"),
    *("attempts", "preemptions", "steps_repeated", "finished", "code", "url", "reason"),
)
EVALUATION_COLUMNS = ("data_set", "part", "labels", "resolution", "crop", "metric", "value", "scored")


def render(collection: Collection, format: Format, *, terminal: bool | None = None) -> str:
    """Return a collection as text that ends with a newline.

    Args:
        collection: The collection.
        format: See the module.
        terminal: Whether a table has colours and omits columns that do not fit the terminal's width; None: whether
            standard output is a terminal.
    """
    if format == "json":
        return json.dumps(finite(_to_json(collection)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if format == "csv":
        return _csv(collection)
    # Imported here, as JSON and CSV do not need rich and jinja.
    from rsb_cluster.results.collect import markup, terminal_table

    if format == "md":
        return markup.markdown(collection)
    if format == "latex":
        return markup.latex(collection)
    if format == "html":
        return markup.html(collection)
    return terminal_table.table(collection, sys.stdout.isatty() if terminal is None else terminal)


def _to_json(collection: Collection) -> dict[str, Any]:
    groups = []
    for group in collection.groups:
        values = {key: value for key, value in vars(group).items() if key not in ("rows", "unfinished", "references")}
        values["references"] = [asdict(reference) for reference in group.references]
        values["runs"] = [row.to_json() for row in group.rows]
        groups.append(values | {"unfinished": [run.run_id for run in group.unfinished]})
    evaluations = [line.to_json() for line in collection.evaluations]
    unfinished = [run.to_json() for run in collection.unfinished]
    return {"groups": groups, "unfinished": unfinished, "evaluations": evaluations}


def _csv(collection: Collection) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, RUN_COLUMNS + EVALUATION_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for group in collection.groups:
        writer.writerows(row.to_json() for row in group.rows)
    writer.writerows(run.to_json() for run in collection.unfinished)
    for line in collection.evaluations:
        writer.writerows(_evaluation_row(line, row) for row in line.rows)
    return text.getvalue()


def _evaluation_row(line: EvaluationRow, row: Evaluation) -> dict[str, Any]:
    """Return the values of an evaluation for the columns of runs and of evaluations."""
    columns = (*(name for name in RUN_COLUMNS if name != "code"), *EVALUATION_COLUMNS)
    values = {key: value for key, value in row.model_dump().items() if key in columns}
    values |= {"recipe": line.name, "steps": row.step, "url": row.weights_url, "value": row.value}
    return values | {"state": "evaluated", "counted": row in line.counted, "code": row.code.get("version", "")}
