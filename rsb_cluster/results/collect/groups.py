"""Groups of runs that differ only in their seed, and their verdicts."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rsb_cluster.config.catalog import differences
from rsb_cluster.config.paper import is_papers_batch
from rsb_cluster.results.collect.collection import Collection, Group, Verdict
from rsb_cluster.results.collect.rows import (
    RESOLUTIONS,
    Changes,
    FinishedRun,
    Reader,
    Science,
    UnfinishedRun,
    describe,
    published,
    resolutions,
)
from rsb_cluster.results.references import Reference
from rsb_cluster.runs.run import Run
from rsb_cluster.runs.sweep import Member, Sweep

ONE_SEED_POINTS = 0.3
FIGURE1_STD = 0.1
OTHER_DATA = {"data.set", "data.num_classes", "data.train_samples", "data.val_samples"}


def collect_runs(runs: Sequence[Run], sweeps: Sequence[Sweep] = (), *, now: float | None = None) -> Collection:
    """Read runs and compare them with published values. A run that cannot be read is listed with its error.

    Args:
        runs: The runs; one without a folder is listed as missing.
        sweeps: Sweeps, which list the missing runs.
        now: Unix time, to tell a killed run from a running one; None for the current time.
    """
    unique = list({run.url: run for run in runs}.values())
    members = {member.run_id: member for sweep in sweeps for member in sweep.members}
    reader = Reader(time.time() if now is None else now, members)
    found = {run.url: item for run, item in reader.read(unique)}
    groups: dict[str, list[FinishedRun]] = {}
    unfinished: list[UnfinishedRun] = []
    seen: dict[str, str] = {}
    for run in unique:
        item = found[run.url]
        if item is None:
            continue
        if isinstance(item, UnfinishedRun):
            unfinished.append(item)
        elif item.science.spec.run_id in seen:
            reason = f"the same run as {seen[item.science.spec.run_id]}, which is in the table"
            unfinished.append(UnfinishedRun(run.run_id, run.url, "duplicate", reason))
        else:
            seen[item.science.spec.run_id] = run.url
            groups.setdefault(item.science.key, []).append(item)
    unfinished.sort(key=lambda item: (_natural(item.run_id), item.url))
    pending: dict[str, list[UnfinishedRun]] = {}
    # Runs with a known recipe come first, so that missing runs find their group.
    for item in sorted(unfinished, key=lambda item: item.science is None):
        if item.science is not None and item.run_id not in seen:  # not an unfinished copy of a finished run
            pending.setdefault(item.science.key, []).append(item)
        elif item.member is not None:
            pending.setdefault(_key_of_missing(item.member, groups, pending), []).append(item)
    keys = dict.fromkeys([*groups, *pending])
    ordered = sorted((_group(groups.get(key, []), pending.get(key, [])) for key in keys), key=_order)
    return Collection(tuple(_tell_apart(ordered)), tuple(unfinished))


def judge(top1: Sequence[float], reference: Reference) -> tuple[float, float, Verdict]:
    """Return the difference, the tolerance and the verdict on the top-1 of one or more seeds.

    The rules are in the package's docstring.
    """
    delta = statistics.fmean(top1) - reference.top1
    tolerance = ONE_SEED_POINTS
    if len(top1) > 1:
        published_std = FIGURE1_STD if reference.std is None else reference.std
        std = max(statistics.stdev(top1), published_std)
        tolerance = min(tolerance, 2 * math.sqrt(std**2 / len(top1) + published_std**2 / reference.n))
    if abs(delta) <= tolerance + 1e-9:  # 80.54 - 80.24 is slightly more than 0.3 in binary
        return delta, tolerance, "reproduced"
    return delta, tolerance, "above" if delta > 0 else "below"


def _key_of_missing(
    member: Member, groups: Mapping[str, Sequence[FinishedRun]], pending: Mapping[str, Sequence[UnfinishedRun]]
) -> str:
    """Return the group of a run without a folder: the first with its recipe and model, and no changes."""
    for key in (*groups, *pending):
        science = _science([*groups.get(key, ()), *pending.get(key, ())])
        names = (member.recipe, member.model)
        if science and not science.changes and (science.recipe.name, science.recipe.model.name) == names:
            return key
    return f"missing {member.recipe} {member.model}"


def _group(finished: list[FinishedRun], unfinished: list[UnfinishedRun]) -> Group:
    rows = sorted(finished, key=lambda row: (row.science.spec.seed, row.science.spec.run_id))
    science = _science([*rows, *unfinished])
    if science is None:
        return _missing(unfinished)
    recipe, changes = science.recipe, science.changes
    virtual_ranks, global_batch = science.spec.virtual_ranks, recipe.train.global_batch
    counted = [row for row in rows if not row.flags]
    top1 = [row.result.top1 for row in counted]
    references, notes = _references(science)
    delta: float | None = None
    tolerance: float | None = None
    verdict: Verdict = "no reference"
    if references and top1:
        delta, tolerance, verdict = judge(top1, references[0])
        if recipe.reconstruction:  # whatever the difference, it is not the paper's procedure
            tolerance, verdict = None, "reconstruction"
    if changes:
        tolerance, verdict = None, "modified"
    costs = [item.result for item in rows] + [item.cost for item in unfinished if item.cost is not None]
    return Group(
        recipe=recipe.name,
        procedure=recipe.paper,
        model=recipe.model.name,
        changes=changes,
        virtual_ranks=virtual_ranks,
        micro_batch=global_batch // virtual_ranks,
        is_papers_batch=is_papers_batch(recipe.paper, recipe.model.name, virtual_ranks, global_batch),
        rows=tuple(rows),
        unfinished=tuple(unfinished),
        n=len(top1),
        mean=statistics.fmean(top1) if top1 else None,
        std=statistics.stdev(top1) if len(top1) > 1 else None,
        min=min(top1, default=None),
        max=max(top1, default=None),
        seed0=next((row.result.top1 for row in counted if row.science.spec.seed == 0), None),
        top5=statistics.fmean(row.result.top5 for row in counted) if counted else None,
        references=references,
        delta=delta,
        tolerance=tolerance,
        verdict=verdict if top1 else ("not counted" if rows else "no result"),
        notes=(*notes, *_initial_weights(science), *_differences(counted)),
        gpu_hours=math.fsum(item.gpu_hours for item in costs),
        rank_hours=math.fsum(item.rank_hours or 0.0 for item in costs),
        attempts=sum(item.attempts for item in costs),
        preemptions=sum(item.preemptions for item in costs),
        steps_repeated=sum(item.steps_repeated or 0 for item in costs),
        goodput=_goodput(rows),
    )


def _missing(unfinished: list[UnfinishedRun]) -> Group:
    """Return a group of runs without a folder, of which only names are known."""
    member = unfinished[0].member
    assert member is not None
    return Group(
        recipe=member.recipe,
        procedure="",
        model=member.model,
        unfinished=tuple(unfinished),
        verdict="no result",
    )


def _goodput(rows: Sequence[FinishedRun]) -> float | None:
    """Return useful time / total time over runs of different lengths."""
    useful = math.fsum(row.result.train_s for row in rows)
    return useful / math.fsum(row.result.train_s / max(row.result.goodput, 1e-9) for row in rows) if useful else None


def _references(science: Science) -> tuple[tuple[Reference, ...], tuple[str, ...]]:
    """Return the published values to compare with, and the reason if there are none although one would expect some."""
    recipe, changes = science.recipe, science.changes
    known = published(recipe, science.spec)
    if not recipe.paper or OTHER_DATA & changes.keys():
        return (), ()
    if known is None:
        init = " from such weights" if recipe.init.weights else ""
        return (), (f"nothing is published for {recipe.model.name} with {recipe.paper}{init}",)
    if known.doubt:
        return (), (f"not compared: {known.doubt}",)
    if resolutions(recipe) != known.px and not changes.keys() & set(RESOLUTIONS):
        train, test = known.px
        return (), (
            f"not compared: the paper trains this model at {train} px and tests it at {test} px. "
            f"Use --set augment.resolution={train} --set eval.resolution={test}",
        )
    return known.references, ()


def _initial_weights(science: Science) -> tuple[str, ...]:
    """Return a remark on the initial weights of a group."""
    init = science.spec.init
    return (f"starts from {init.source} (SHA-256 {init.sha256[:12]})",) if init else ()


def _differences(counted: Sequence[FinishedRun]) -> list[str]:
    """Return remarks on differences between the counted runs of a group, besides the seed."""
    # Of which all know the version: earlier versions recorded fewer.
    packages = set.intersection(*(set(row.science.spec.packages) for row in counted)) if counted else set()
    parts: dict[str, Callable[[FinishedRun], object]] = {
        "copies of the data (their indexes differ)": lambda row: (
            row.science.spec.train_digest,
            row.science.spec.val_digest,
        ),
        "versions of the code": lambda row: (row.science.code, row.science.spec.code.get("uncommitted")),
        "sets of package versions": lambda row: tuple(row.science.spec.packages[name] for name in packages),
    }
    numbers = {what: len({part(row) for row in counted}) for what, part in parts.items()}
    notes = [f"mixes {number} {what}" for what, number in numbers.items() if number > 1]
    notes += [f"seed {row.science.spec.seed}: {c}" for row in counted for c in row.result.environment_changes]
    repeated = [str(seed) for seed, times in Counter(row.science.spec.seed for row in counted).items() if times > 1]
    if repeated:
        notes.append(f"not all seeds are independent: more than one run has seed {', '.join(repeated)}")
    return notes


def _tell_apart(groups: Sequence[Group]) -> list[Group]:
    """Add remarks on the differences between groups of the same name."""
    first: dict[tuple[str, str, str], Group] = {}
    result = []
    for group in groups:
        other = first.setdefault((group.recipe, group.model, describe(group.changes)), group)
        if other is not group:
            here, there = (_science([*g.rows, *g.unfinished]) for g in (group, other))
            assert here is not None and there is not None  # a group without one has a unique name
            changes: Changes = dict(differences(there.recipe, here.recipe))
            changes.pop("train.virtual_ranks", None)  # the specs have it, those of earlier versions too
            if other.virtual_ranks != group.virtual_ranks:
                changes["virtual ranks"] = (other.virtual_ranks, group.virtual_ranks)
            if there.spec.draws != here.spec.draws:
                changes["version of the draws"] = (there.spec.draws, here.spec.draws)
            before, after = (s.spec.init.sha256[:12] if s.spec.init else "" for s in (there, here))
            if before != after:
                changes["initial weights"] = (before, after)
            group = replace(group, notes=(*group.notes, f"unlike the group of the same name: {describe(changes)}"))
        result.append(group)
    return result


def _science(items: Sequence[FinishedRun | UnfinishedRun]) -> Science | None:
    """Return what the runs of a group train; None if unknown."""
    return next((item.science for item in items if item.science is not None), None)


def _order(group: Group) -> tuple[Any, ...]:
    name = (_natural(group.recipe), _natural(group.model), len(group.changes), describe(group.changes))
    first = group.rows[0].run if group.rows else group.unfinished[0]
    return (*name, group.virtual_ranks, first.run_id)


def _natural(name: str) -> list[int | str]:
    """Return a sort key that orders resnet18 before resnet101."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
