"""Renders a collection as the page of the report."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from rsb_cluster.config.schema import finite, flatten
from rsb_cluster.errors import ConfigError
from rsb_cluster.evaluation.record import plain_values
from rsb_cluster.results.collect import Collection, EvaluationRow, FinishedRun, Group, UnfinishedRun
from rsb_cluster.results.collect.cells import COLUMNS, TEXT_COLUMNS, cells, filled_columns, remarks
from rsb_cluster.results.collect.evaluation_cells import (
    EVALUATION_COLUMNS,
    EVALUATION_TEXT_COLUMNS,
    evaluation_cells,
    evaluation_remarks,
)
from rsb_cluster.results.collect.rows import describe, published
from rsb_cluster.results.report.history import History, read_history, short
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store

READERS = 16
MAX_CURVE_POINTS = 300  # a screen does not show more
MAX_POINTS = 60_000  # of all curves: a browser draws them in a second, from a file of a few megabytes
MAX_LOGS = 24

# Identifies our pages.
_GENERATOR = b'<meta name="generator" content="rsb-cluster">'
_HEAD_BYTES = 1 << 12

RUN_COLUMNS = (
    *("run", "state", "group", "seed", "top-1", "hours", "images/s", "waiting", "attempts", "preempted", "repeated"),
    "goodput",
)
RUN_TEXT_COLUMNS = ("run", "state", "group")


def default_output() -> Path:
    """Return the default file of the page.

    Raises:
        ConfigError: The file exists and was not written by this command: other tools write a report.html, too.
    """
    output = Path("report.html")
    try:
        with output.open("rb") as file:
            is_ours = _GENERATOR in file.read(_HEAD_BYTES)
    except OSError:
        return output  # it does not exist; any other error is raised when the page is written
    if not is_ours:
        raise ConfigError(f"{output.absolute()} was not made by this command. Name another file with -o.")
    return output


def report(collection: Collection, *, title: str, output: Path) -> str:
    """Return the page.

    Args:
        collection: The collection.
        title: Heading of the page.
        output: The page's file; links to the logs of local runs are relative to it.
    """
    lines, evaluations = _runs(collection), _evaluations(collection)
    histories = _histories([item for item, _ in lines])
    on_gpus = all(a["gpus"] for history in histories for a in history.attempts)
    recipes: dict[str, int] = {}
    environments: dict[str, int] = {}
    runs = []
    for (item, group), history in zip(lines, histories, strict=True):
        values = _run(item, group, history, output, on_gpus=on_gpus)
        values["evaluations"] = evaluations.get(values["id"], [])
        if item.science is not None:
            science = item.science
            values["recipe"] = _index(recipes, flatten(science.recipe))
            values["environment"] = _index(
                environments,
                {
                    "code": science.code,
                    "data": history.data or science.spec.data,
                    "virtual ranks": science.spec.virtual_ranks,
                    "BatchNorm over": f"{science.recipe.train.global_batch // science.spec.virtual_ranks} images",
                    **{k: v for k, v in science.spec.code.items() if k in ("python", "platform")},
                    **science.spec.packages,
                },
            )
        runs.append(values)
    data = {
        "hours": "GPU-hours" if on_gpus else "process-hours",
        "groups": [_group(group) for group in collection.groups],
        "runs": runs,
        "recipes": [json.loads(text) for text in recipes],
        "environments": [json.loads(text) for text in environments],
    }
    return _render(collection, data, title)


def _runs(collection: Collection) -> list[tuple[FinishedRun | UnfinishedRun, int | None]]:
    """Return all runs with the number of their group; those without a group last."""
    lines: list[tuple[FinishedRun | UnfinishedRun, int | None]] = []
    for number, group in enumerate(collection.groups):
        lines += [(row, number) for row in group.rows]
        lines += [(run, number) for run in group.unfinished]
    grouped = {id(item) for item, _ in lines}
    return lines + [(item, None) for item in collection.unfinished if id(item) not in grouped]


def _evaluations(collection: Collection) -> dict[str, list[tuple[str, str]]]:
    """Return what runs were evaluated on, and the values, by run."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in collection.evaluations:
        for row in line.rows:
            what = ", ".join(filter(None, (f"{row.data_set}/{row.part}", row.labels, f"{row.resolution} px")))
            values = "; ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in plain_values(row).items())
            found.setdefault(row.run_id, []).append((f"{what}{' (EMA)' if row.ema else ''}", values))
    return found


def _histories(items: Sequence[FinishedRun | UnfinishedRun]) -> list[History]:
    points = max(40, min(MAX_CURVE_POINTS, MAX_POINTS // max(1, len(items))))

    def read(item: FinishedRun | UnfinishedRun) -> History:
        if item.science is None:
            return History()
        if isinstance(item, FinishedRun):
            return read_history(item.run, item.science.recipe, "finished", points=points)
        return read_history(_run_at(item.url), item.science.recipe, item.state, points=points)

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, items))


def _run_at(url: str) -> Run:
    parent, _, name = url.rpartition("/")
    return Run.at(parent, name)


def _run(
    item: FinishedRun | UnfinishedRun, group: int | None, history: History, output: Path, *, on_gpus: bool
) -> dict[str, Any]:
    """Return the page's data on a run."""
    known = item.to_json()
    hours = known.get("gpu_hours" if on_gpus else "rank_hours")
    url = known["url"]
    link = os.path.relpath(url, output.absolute().parent) if Store(url).is_local else ""
    return {
        "id": known["run_id"],
        "url": url,
        "group": group,
        "state": known["state"],
        "counted": known["counted"],
        "reason": known["reason"],
        "seed": known.get("seed"),
        "top1": _rounded(known.get("top1")),
        "top5": _rounded(known.get("top5")),
        "hours": None if hours is None else short(hours),
        "attempts": known.get("attempts"),
        "preemptions": known.get("preemptions"),
        "repeated": known.get("steps_repeated"),
        "goodput": _rounded(known.get("goodput")),
        "modified": known.get("modified", ""),
        "images_per_s": history.images_per_s,
        "waiting": history.waiting,
        "measured": history.measured,
        "spans": list(history.attempts),
        "loss": history.loss,
        "scores": history.top1,
        "logs": [[name.removeprefix("logs/"), f"{link}/{name}" if link else ""] for name in history.logs[:MAX_LOGS]],
        "changes": "; ".join(history.changes),
        "damage": history.damage,
    }


def _group(group: Group) -> dict[str, Any]:
    first = group.references[0] if group.references else None
    science = group.rows[0].science if group.rows else None
    known = published(science.recipe, science.spec) if science else None
    return {
        "label": f"{group.label} · {group.model}",
        "verdict": group.verdict,
        "mean": _rounded(group.mean),
        "std": _rounded(group.std),
        "tolerance": _rounded(group.tolerance),
        "paper": None if first is None else {"top1": first.top1, "std": first.std, "source": first.source},
        "paper_hours": known.v100_hours if known and first else None,
    }


def _rounded(value: float | None) -> float | None:
    """Round to what a chart can show; the tables round further."""
    return None if value is None else round(value, 4)


def _index(known: dict[str, int], value: dict[str, Any]) -> int:
    """Return the number of a value, the same for equal values: a thousand runs share a few recipes."""
    return known.setdefault(json.dumps(value, default=str), len(known))


def _render(collection: Collection, data: dict[str, Any], title: str) -> str:
    def text(name: str, package: str = __package__) -> str:
        return (files(package) / name).read_text(encoding="utf-8")

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    groups, runs = data["groups"], data["runs"]
    costs = [run for run in runs if run["hours"] is not None]
    group_cells = list(map(cells, collection.groups))
    evaluation_rows = list(map(evaluation_cells, collection.evaluations))
    page = environment.from_string(text("report.html.jinja")).render(
        title=title,
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        hours=data["hours"],
        states=Counter(run["state"] for run in runs).most_common(),
        verdicts=Counter(group["verdict"] for group in groups).most_common(),
        finished=sum(run["state"] == "finished" for run in runs),
        counted=sum(run["counted"] for run in runs),
        total={key: sum(run[key] or 0 for run in costs) for key in ("hours", "attempts", "preemptions", "repeated")},
        columns=filled_columns(COLUMNS, group_cells),
        text_columns=TEXT_COLUMNS,
        groups=list(zip(range(len(group_cells)), collection.groups, group_cells, strict=True)),
        remarks=remarks(collection),
        changes=[describe(group.changes) for group in collection.groups],
        evaluation_columns=filled_columns(EVALUATION_COLUMNS, evaluation_rows),
        evaluation_text_columns=EVALUATION_TEXT_COLUMNS,
        evaluations=[(_group_of(e, runs), row) for e, row in zip(collection.evaluations, evaluation_rows, strict=True)],
        evaluation_remarks=evaluation_remarks(collection),
        run_columns=RUN_COLUMNS,
        run_text_columns=RUN_TEXT_COLUMNS,
        runs=[(index, run, _run_cells(run, data)) for index, run in enumerate(runs)],
        style=text("report.css"),
        script=text("report.js"),
        data=_script_data(data),
        plotly=text("plotly.min.js", "plotly.package_data").replace("</script", "<\\/script"),
    )
    return page.rstrip("\n") + "\n"


def _script_data(data: dict[str, Any]) -> str:
    text = json.dumps(finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")  # which could end the element; the rest stays readable


def _group_of(line: EvaluationRow, runs: Sequence[dict[str, Any]]) -> int | None:
    """Return the number of the group whose runs were evaluated; None for other weights."""
    run_id = line.rows[0].run_id
    return next((run["group"] for run in runs if run_id and run["id"] == run_id), None)


def _run_cells(run: dict[str, Any], data: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return a run's cells by column: the text, and the value to sort by."""

    def cell(key: str, form: str) -> tuple[str, Any]:
        value = run[key]
        return ("", "") if value is None else (format(value, form), value)

    group = "" if run["group"] is None else data["groups"][run["group"]]["label"]
    return {
        "run": (run["id"], run["id"]),
        "state": (run["state"] if run["counted"] or run["state"] != "finished" else "not counted", run["state"]),
        "group": (group, group),
        "seed": cell("seed", "d"),
        "top-1": cell("top1", ".2f"),
        "hours": cell("hours", ",.4g"),
        "images/s": cell("images_per_s", ",.0f"),
        "waiting": cell("waiting", ".1%"),
        "attempts": cell("attempts", "d"),
        "preempted": cell("preemptions", "d"),
        "repeated": cell("repeated", ",d"),
        "goodput": cell("goodput", ".1%"),
    }
