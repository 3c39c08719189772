"""Evaluations compared with published values: groups of runs that differ only in their seed, and single weights.

A run counts with its last weights, and only if the whole split was evaluated. Groups of runs get the verdicts of
training runs (see the package), with the value of the metric in place of top-1. Further verdicts:

- ``agrees``, ``differs``: released weights, whose value is at most 0.05 points from timm's measurement, or more. That
  is a statement about the evaluation and not about training.
- ``reconstruction``: the recipe's values, or the images, are not public; a match would not be a reproduction.
- ``modified``: also an evaluation with other ``--mean`` or ``--std`` than the weights say.
- ``not public``: others report results on this data set and cite the paper, but there is no value to compare with.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from rsb_cluster.data.datasets import known_data_sets
from rsb_cluster.evaluation.record import Evaluation, read_evaluations
from rsb_cluster.results.collect.collection import Collection, EvaluationRow, EvaluationVerdict, Group
from rsb_cluster.results.collect.groups import collect_runs, judge
from rsb_cluster.results.references.other_data import PublishedValue, doubt, not_public, published_on
from rsb_cluster.runs.run import Run
from rsb_cluster.runs.sweep import Sweep

AGREES_POINTS = 0.05


def collect(
    runs: Sequence[Run], sweeps: Sequence[Sweep] = (), *, weights_in: str = "", now: float | None = None
) -> Collection:
    """Read runs and their evaluations, and compare them with published values.

    Args:
        runs: As in `collect_runs`, like ``sweeps`` and ``now``.
        sweeps: Sweeps, which list the missing runs.
        weights_in: A folder of runs, whose evaluations of other weights are included.
        now: Unix time.
    """
    collection = collect_runs(runs, sweeps, now=now)
    found: list[Evaluation] = []
    unreadable: list[str] = []
    for url in dict.fromkeys((*(run.runs_url for run in runs), *([weights_in] if weights_in else []))):
        read, problems = read_evaluations(url)
        found += [evaluation for evaluation in read if evaluation.run_id or url == weights_in]
        unreadable += problems
    return replace(
        collection, evaluations=tuple(evaluation_rows(found, collection.groups)), unreadable=tuple(unreadable)
    )


def evaluation_rows(found: Iterable[Evaluation], groups: Sequence[Group]) -> list[EvaluationRow]:
    """Return the rows of all evaluations, those of runs first.

    Args:
        found: The evaluations; those of runs in no group are left out.
        groups: The runs.
    """
    group_of = {row.run.run_id: group for group in groups for row in group.rows}
    group_of |= {run.run_id: group for group in groups for run in group.unfinished if run.science is not None}
    numbers = {id(group): number for number, group in enumerate(groups)}
    lines: dict[tuple[Any, ...], dict[str, Evaluation]] = {}
    for evaluation in found:
        group = group_of.get(evaluation.run_id)
        if group is None and evaluation.run_id:
            continue
        key = (
            *(numbers[id(group)] if group else len(groups), "" if group else evaluation.owner),
            *(evaluation.data_set, evaluation.part, evaluation.labels, evaluation.data_digest),
            *(evaluation.resolution, evaluation.crop, evaluation.metric, evaluation.interpolation, evaluation.ema),
            json.dumps(evaluation.overrides, sort_keys=True),
        )
        rows = lines.setdefault(key, {})
        before = rows.get(evaluation.owner)
        if before is None or (evaluation.step, evaluation.finished) > (before.step, before.finished):
            rows[evaluation.owner] = evaluation
    return [
        _group_row(groups[key[0]], tuple(rows.values())) if key[0] < len(groups) else _weights_row(*rows.values())
        for key, rows in sorted(lines.items())
    ]


def _group_row(group: Group, rows: tuple[Evaluation, ...]) -> EvaluationRow:
    sciences = [*(row.science for row in group.rows), *(run.science for run in group.unfinished)]
    science = next(science for science in sciences if science is not None)
    recipe, evaluation = science.recipe, rows[0]
    init_procedure = science.spec.init.procedure if science.spec.init else ""
    problems = {row.run_id: _problem(row, recipe.total_steps) for row in rows}
    counted = tuple(row for row in rows if not problems[row.run_id])
    candidates = published_on(evaluation.data_set, evaluation.labels, recipe.paper, group.model, init_procedure)
    values = [row.value for row in counted if row.value is not None]
    chosen, notes = ([], ()) if evaluation.ema else _comparable(candidates, evaluation, recipe.paper)
    notes += tuple(f"{run_id} is not counted: {problem}" for run_id, problem in problems.items() if problem)
    delta: float | None = None
    verdict: EvaluationVerdict = "not public" if not_public(evaluation.data_set) else "no reference"
    if chosen and values:
        delta, _, verdict = judge(values, chosen[0].reference)
        if recipe.reconstruction or not chosen[0].is_same:
            verdict = "reconstruction"
    if group.changes or _other_input(evaluation):
        verdict = "modified"
    return EvaluationRow(
        name=group.label + (" (EMA)" if evaluation.ema else ""),
        model=group.model,
        rows=rows,
        counted=counted,
        mean=statistics.fmean(values) if values else None,
        std=statistics.stdev(values) if len(values) > 1 else None,
        references=tuple(one.reference for one in chosen),
        delta=delta,
        verdict=verdict if values else "not counted",
        notes=notes,
    )


def _weights_row(row: Evaluation) -> EvaluationRow:
    """Return the row of weights that do not belong to a run."""
    problem = _problem(row, row.step)
    candidates = published_on(row.data_set, row.labels, row.procedure, row.model)
    candidates = [one for one in candidates if one.reference.released or not one.is_same]
    chosen, notes = _comparable(candidates, row, row.procedure)
    delta: float | None = None
    verdict: EvaluationVerdict = "not public" if not_public(row.data_set) else "no reference"
    if chosen and row.value is not None and not problem:
        delta = row.value - chosen[0].reference.top1
        verdict = "reconstruction"
        if chosen[0].is_same:
            verdict = "agrees" if abs(delta) <= AGREES_POINTS + 1e-9 else "differs"
    if _other_input(row):
        verdict = "modified"
    return EvaluationRow(
        name=row.weights,
        model=row.model,
        rows=(row,),
        counted=() if problem else (row,),
        mean=row.value,
        std=None,
        references=tuple(one.reference for one in chosen),
        delta=delta,
        verdict="not counted" if problem else verdict,
        notes=(*notes, *([problem] if problem else [])),
    )


def _comparable(
    candidates: Sequence[PublishedValue], evaluation: Evaluation, procedure: str
) -> tuple[list[PublishedValue], tuple[str, ...]]:
    """Return the published values that are comparable, and remarks on them."""
    if changed := _other_input(evaluation):
        return [], (f"not compared: evaluated with {changed}, which is not what the weights say",)
    notes = [note] if (note := not_public(evaluation.data_set)) else []
    of_metric = [one for one in candidates if one.metric == _published_metric(evaluation)]
    px, crop = evaluation.resolution, evaluation.crop
    chosen = [one for one in of_metric if one.px in (None, px) and (one.crop is None or abs(one.crop - crop) < 1e-6)]
    if of_metric and not chosen:
        published = dict.fromkeys(f"{one.px} px" + (f", crop {one.crop:.4g}" if one.crop else "") for one in of_metric)
        notes.append(f"not compared: published at {'; '.join(published)}")
    if chosen and (note := doubt(evaluation.data_set, procedure, evaluation.model)):
        notes.append(note)
        if evaluation.data_set == "imagenet-1k":  # the paper contradicts itself
            chosen = []
    return chosen, tuple(notes)


def _other_input(evaluation: Evaluation) -> str:
    """Return the options with which images were normalised otherwise than the weights say; empty if there are none."""
    changed = {name: evaluation.overrides[name] for name in ("mean", "std") if name in evaluation.overrides}
    return " and ".join(f"--{name} {','.join(f'{v:.4g}' for v in values)}" for name, values in changed.items())


def _published_metric(evaluation: Evaluation) -> str:
    """Return the metric as which the value is published: the paper calls it top-1 on ReaL as well."""
    return "top1" if evaluation.metric == "label_set_top1" else evaluation.metric


def _problem(row: Evaluation, steps: int) -> str:
    """Return why an evaluation does not count; empty if it does."""
    known = known_data_sets().get(row.data_set)
    expected = known.samples.get(row.part) if known and row.part in ("train", "val") else None  # type: ignore[call-overload]
    if expected is not None and row.samples != expected:
        return f"{row.samples:,} images of {row.data_set}/{row.part}, which has {expected:,}"
    if row.step != steps:
        return f"weights of step {row.step} of {steps}"
    return "no image has a label" if row.value is None else ""
