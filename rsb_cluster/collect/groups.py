"""Groups of runs that differ only in their seed, and the verdict on each."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from rsb_cluster.catalog import differences
from rsb_cluster.collect.rows import RESOLUTIONS, Changes, Row, Unfinished, describe, published, read, resolutions
from rsb_cluster.recipe import Recipe
from rsb_cluster.references import Reference
from rsb_cluster.run import Run

Verdict = Literal["reproduced", "above", "below", "no reference", "modified", "not counted"]

READERS = 16  # an object store takes tens of milliseconds for an answer, and there may be ten thousand runs
ONE_SEED_POINTS = 0.3
FIGURE1_STD = 0.1
OTHER_DATA = {"data.set", "data.num_classes", "data.train_samples", "data.val_samples"}


@dataclass(frozen=True)
class Group:
    """Finished runs that differ only in their seed.

    Attributes:
        rows: All of them, also those that do not count.
        n: How many count; means and extremes are over these, in percent.
        std: Sample standard deviation; None unless n > 1.
        references: What is published; ``delta`` is ``mean`` minus the first.
        tolerance: The largest ``delta`` that is called reproduced, in points.
        gpu_hours: Sum over all rows, as are attempts and preemptions. What unfinished runs cost is not in it.
        goodput: Mean over all rows.
    """

    recipe: str
    procedure: str
    model: str
    changes: Changes
    virtual_ranks: int
    rows: tuple[Row, ...]
    n: int
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    top5: float | None
    references: tuple[Reference, ...]
    delta: float | None
    tolerance: float | None
    verdict: Verdict
    notes: tuple[str, ...]
    gpu_hours: float
    attempts: int
    preemptions: int
    goodput: float


@dataclass(frozen=True)
class Collection:
    """What was found: groups in natural order, and the runs that have no result."""

    groups: tuple[Group, ...]
    unfinished: tuple[Unfinished, ...]


def collect(runs: Sequence[Run]) -> Collection:
    """Read runs and compare them with what is published. A run that cannot be read is named, not raised."""
    unique = list({run.url: run for run in runs}.values())
    # One run of each object store before the others: threads that start together would each open a client.
    first = {run.url.partition("://")[0]: run for run in unique if "://" in run.url}
    found = {run.url: read(run) for run in first.values()}
    rest = [run for run in unique if run.url not in found]
    with ThreadPoolExecutor(READERS) as pool:
        found |= zip((run.url for run in rest), pool.map(read, rest), strict=True)
    groups: dict[str, list[Row]] = {}
    unfinished: list[Unfinished] = []
    seen: dict[str, str] = {}
    for run in unique:
        item = found[run.url]
        if isinstance(item, Unfinished):
            unfinished.append(item)
        elif item.spec.run_id in seen:
            reason = f"the same run as {seen[item.spec.run_id]}, which is in the table"
            unfinished.append(Unfinished(run.run_id, run.url, "duplicate", reason))
        else:
            seen[item.spec.run_id] = run.url
            groups.setdefault(_key(item), []).append(item)
    ordered = sorted(map(_group, groups.values()), key=_order)
    return Collection(tuple(_tell_apart(ordered)), tuple(sorted(unfinished, key=lambda u: (_natural(u.run_id), u.url))))


def judge(top1: Sequence[float], reference: Reference) -> tuple[float, float, Verdict]:
    """Return the difference, the tolerance and the verdict on the top-1 of one or more seeds.

    The rules are in the package's docstring.
    """
    delta = statistics.fmean(top1) - reference.top1
    tolerance = ONE_SEED_POINTS
    if len(top1) > 1:
        theirs = FIGURE1_STD if reference.std is None else reference.std
        ours = max(statistics.stdev(top1), theirs)
        tolerance = min(tolerance, 2 * math.sqrt(ours**2 / len(top1) + theirs**2 / reference.n))
    if abs(delta) <= tolerance + 1e-9:  # 80.54 - 80.24 is a little more than 0.3 in binary
        return delta, tolerance, "reproduced"
    return delta, tolerance, "above" if delta > 0 else "below"


def _key(row: Row) -> str:
    science = row.recipe.digest(0, "")  # always the same seed and data: seeds meet, and so do copies of a data set
    changes = {key: list(change) for key, change in row.changes.items()}
    return json.dumps([row.recipe.name, row.recipe.paper, changes, science, row.spec.virtual_ranks], sort_keys=True)


def _group(members: list[Row]) -> Group:
    rows = sorted(members, key=lambda row: (row.spec.seed, row.spec.run_id))
    recipe, changes = rows[0].recipe, rows[0].changes
    top1 = [row.result.top1 for row in rows if not row.flags]
    top5 = [row.result.top5 for row in rows if not row.flags]
    references, notes = _references(recipe, changes)
    delta: float | None = None
    tolerance: float | None = None
    verdict: Verdict = "no reference"
    if references and top1:
        delta, tolerance, verdict = judge(top1, references[0])
    if changes:
        tolerance, verdict = None, "modified"
    return Group(
        recipe=recipe.name,
        procedure=recipe.paper,
        model=recipe.model.name,
        changes=changes,
        virtual_ranks=rows[0].spec.virtual_ranks,
        rows=tuple(rows),
        n=len(top1),
        mean=statistics.fmean(top1) if top1 else None,
        std=statistics.stdev(top1) if len(top1) > 1 else None,
        min=min(top1, default=None),
        max=max(top1, default=None),
        top5=statistics.fmean(top5) if top5 else None,
        references=references,
        delta=delta,
        tolerance=tolerance,
        verdict=verdict if top1 else "not counted",
        notes=(*notes, *_unlike(rows)),
        gpu_hours=math.fsum(row.result.gpu_hours for row in rows),
        attempts=sum(row.result.attempts for row in rows),
        preemptions=sum(row.result.preemptions for row in rows),
        goodput=statistics.fmean(row.result.goodput for row in rows),
    )


def _references(recipe: Recipe, changes: Changes) -> tuple[tuple[Reference, ...], tuple[str, ...]]:
    """Return what to compare with, and why there is nothing where one would expect something."""
    known = published(recipe)
    if not recipe.paper or OTHER_DATA & changes.keys():
        return (), ()
    if known is None:
        return (), (f"nothing is published for {recipe.model.name} with {recipe.paper}",)
    if known.doubt:
        return (), (f"not compared: {known.doubt}",)
    if resolutions(recipe) != known.px and not changes.keys() & set(RESOLUTIONS):
        train, test = known.px
        return (), (
            f"not compared: the paper trains this model at {train} px and tests it at {test} px. "
            f"Use --set augment.resolution={train} --set eval.resolution={test}",
        )
    return known.references, ()


def _unlike(rows: Sequence[Row]) -> list[str]:
    """Return what differs between the counted runs of a group, besides the seed."""
    counted = [row for row in rows if not row.flags]
    parts: dict[str, Callable[[Row], object]] = {
        "copies of the data (their indexes differ)": lambda row: (row.spec.train_digest, row.spec.val_digest),
        "versions of the code": lambda row: (row.code, row.spec.code.get("uncommitted")),
        "sets of package versions": lambda row: tuple(sorted(row.spec.packages.items())),
    }
    numbers = {what: len({part(row) for row in counted}) for what, part in parts.items()}
    notes = [f"mixes {number} {what}" for what, number in numbers.items() if number > 1]
    repeated = [str(seed) for seed, times in Counter(row.spec.seed for row in counted).items() if times > 1]
    if repeated:
        notes.append(f"not all seeds are independent: more than one run has seed {', '.join(repeated)}")
    return notes


def _tell_apart(groups: Sequence[Group]) -> list[Group]:
    """Note what separates groups that carry the same name."""
    first: dict[tuple[str, str, str], Group] = {}
    result = []
    for group in groups:
        other = first.setdefault((group.recipe, group.model, describe(group.changes)), group)
        if other is not group:
            unlike: Changes = dict(differences(other.rows[0].recipe, group.rows[0].recipe))
            if other.virtual_ranks != group.virtual_ranks:
                unlike["virtual ranks"] = (other.virtual_ranks, group.virtual_ranks)
            group = replace(group, notes=(*group.notes, f"unlike the group of the same name: {describe(unlike)}"))
        result.append(group)
    return result


def _order(group: Group) -> tuple[Any, ...]:
    name = (_natural(group.recipe), _natural(group.model), len(group.changes), describe(group.changes))
    return (*name, group.virtual_ranks, group.rows[0].spec.run_id)


def _natural(name: str) -> list[int | str]:
    """Order resnet18 before resnet101."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
