"""Evaluations against what is published: groups of runs that differ in their seed, and single weights.

A run counts with its last weights, and only if the whole part of the data set was evaluated. A verdict of a group of
runs is that of its training runs (see the package), with the value of the metric in place of top-1. Besides:

- ``agrees``, ``differs``: released weights, of which timm measured the same: at most 0.05 points away, or more. That
  says something of the evaluation and nothing of a training.
- ``reconstruction``: the recipe's values, or the images, are not public; a match would not be a reproduction.
- ``not public``: others cite the paper with this data set, and there is no number to compare with.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from rsb_cluster.data.datasets import known_data_sets
from rsb_cluster.evaluation.record import Evaluation, read_evaluations
from rsb_cluster.results.collect.collection import Collection, EvaluationRow, EvaluationVerdict, Group
from rsb_cluster.results.collect.groups import collect_runs, judge
from rsb_cluster.results.collect.rows import Science
from rsb_cluster.results.references.other_data import PublishedValue, doubt, not_public, published_on
from rsb_cluster.runs.run import Run
from rsb_cluster.runs.sweep import Sweep

AGREES_POINTS = 0.05


def collect(
    runs: Sequence[Run], sweeps: Sequence[Sweep] = (), *, weights_in: str = "", now: float | None = None
) -> Collection:
    """Read runs, and their evaluations, and compare them with what is published.

    Args:
        runs: As in `collect_runs`, like ``sweeps`` and ``now``.
        sweeps: Say what the missing runs would be.
        weights_in: A folder of runs, of which the evaluations of other weights are wanted too.
        now: Unix time.
    """
    collection = collect_runs(runs, sweeps, now=now)
    found: list[Evaluation] = []
    unreadable: list[str] = []
    for url in dict.fromkeys((*(run.runs_url for run in runs), *([weights_in] if weights_in else []))):
        read, problems = read_evaluations(url)
        found += [one for one in read if one.run_id or url == weights_in]
        unreadable += problems
    return replace(
        collection, evaluations=tuple(evaluation_rows(found, collection.groups)), unreadable=tuple(unreadable)
    )


def evaluation_rows(found: Iterable[Evaluation], groups: Sequence[Group]) -> list[EvaluationRow]:
    """Return the lines for all evaluations, of runs first.

    Args:
        found: Records; those of runs that are in no group are left out.
        groups: The runs.
    """
    group_of = {row.run.run_id: group for group in groups for row in group.rows}
    group_of |= {run.run_id: group for group in groups for run in group.open if run.science is not None}
    place = {id(group): number for number, group in enumerate(groups)}
    lines: dict[tuple[Any, ...], dict[str, Evaluation]] = {}
    for one in found:
        group = group_of.get(one.run_id)
        if group is None and one.run_id:
            continue
        owner = place[id(group)] if group else len(groups)
        same = (one.data_set, one.part, one.labels, one.data_digest, one.resolution, one.crop, one.metric)
        key = (owner, "" if group else one.owner, *same, one.interpolation, one.ema)
        rows = lines.setdefault(key, {})
        before = rows.get(one.owner)
        if before is None or (one.step, one.finished) > (before.step, before.finished):
            rows[one.owner] = one
    return [
        _of_group(groups[key[0]], tuple(rows.values())) if key[0] < len(groups) else _of_weights(*rows.values())
        for key, rows in sorted(lines.items())
    ]


def _of_group(group: Group, rows: tuple[Evaluation, ...]) -> EvaluationRow:
    known: list[Science | None] = [*(row.science for row in group.rows), *(run.science for run in group.open)]
    science = next(one for one in known if one is not None)
    recipe, what = science.recipe, rows[0]
    start = science.spec.init.procedure if science.spec.init else ""
    problems = {row.run_id: _problem(row, recipe.total_steps) for row in rows}
    counted = tuple(row for row in rows if not problems[row.run_id])
    candidates = published_on(what.data_set, what.labels, recipe.paper, group.model, start)
    values = [row.value for row in counted if row.value is not None]
    chosen, notes = ([], ()) if what.ema else _comparable(candidates, what, recipe.paper)
    notes += tuple(f"{run_id} is not counted: {problem}" for run_id, problem in problems.items() if problem)
    delta: float | None = None
    verdict: EvaluationVerdict = "not public" if not_public(what.data_set) else "no reference"
    if chosen and values:
        delta, _, verdict = judge(values, chosen[0].reference)
        if recipe.reconstruction or not chosen[0].is_same:
            verdict = "reconstruction"
    if group.changes:
        verdict = "modified"
    return EvaluationRow(
        name=group.label + (" (EMA)" if what.ema else ""),
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


def _of_weights(row: Evaluation) -> EvaluationRow:
    """Return the line of weights that are no run's."""
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
    candidates: Sequence[PublishedValue], what: Evaluation, procedure: str
) -> tuple[list[PublishedValue], tuple[str, ...]]:
    """Return what to compare with, and what one should know of it."""
    notes = [said] if (said := not_public(what.data_set)) else []
    of_metric = [one for one in candidates if one.metric == _comparison(what)]
    here = (what.resolution, what.crop)
    chosen = [
        one for one in of_metric if one.px in (None, here[0]) and (one.crop is None or abs(one.crop - here[1]) < 1e-6)
    ]
    if of_metric and not chosen:
        there = dict.fromkeys(f"{one.px} px" + (f", crop {one.crop:.4g}" if one.crop else "") for one in of_metric)
        notes.append(f"not compared: published at {'; '.join(there)}")
    if chosen and (said := doubt(what.data_set, procedure, what.model)):
        notes.append(said)
        if what.data_set == "imagenet-1k":  # the paper contradicts itself
            chosen = []
    return chosen, tuple(notes)


def _comparison(what: Evaluation) -> str:
    """Return the metric under which the value is published: the paper writes top-1 on ReaL, too."""
    return "top1" if what.metric == "label_set_top1" else what.metric


def _problem(row: Evaluation, steps: int) -> str:
    """Say why an evaluation does not count; nothing where it does."""
    known = known_data_sets().get(row.data_set)
    expected = known.samples.get(row.part) if known and row.part in ("train", "val") else None  # type: ignore[call-overload]
    if expected is not None and row.samples != expected:
        return f"{row.samples:,} images of {row.data_set}/{row.part}, which has {expected:,}"
    if row.step != steps:
        return f"weights of step {row.step} of {steps}"
    return "no image has a label" if row.value is None else ""
