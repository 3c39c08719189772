"""The runs of a plan: each with its data, weights, id and state, and what cannot work is refused.

What many runs share (an index, weights, the scheduler's queue) is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from rsb_cluster import backends
from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.sweep_file import Point
from rsb_cluster.data.order import DRAWS
from rsb_cluster.errors import ConfigError, DataError, RsbError, StorageError, SubmitError
from rsb_cluster.runs.run import Run
from rsb_cluster.submission.data_location import DataLocation, find_data, require_data
from rsb_cluster.submission.own_data import doubts, filled, fit_to_data
from rsb_cluster.submission.planned_run import PlannedRun
from rsb_cluster.submission.run_states import mark_over_budget, refuse_others, with_states
from rsb_cluster.submission.virtual_ranks import check_share, memory_note
from rsb_cluster.weights.resolve import WeightsFile, initial_weights


def plan_runs(
    points: Sequence[Point],
    runs_url: str,
    data: str,
    *,
    dry_run: bool,
    resubmit: bool = False,
    stats: bool = False,
    refusals: list[RsbError] | None = None,
) -> tuple[list[PlannedRun], list[str]]:
    """Return the runs of the points, complete but for the check of their models, and notes for the user.

    Args:
        points: The recipes and jobs.
        runs_url: Folder of the runs.
        data: Where their data are; empty: see `find_data`.
        dry_run: Continue where data, weights or a network are missing.
        resubmit: Replace the queued jobs of the runs.
        stats: Measure mean and standard deviation of the training images.
        refusals: Where a dry run puts the errors in spite of which it continues.
    """
    notes: list[str] = []
    refusals = [] if refusals is None else refusals
    locations: dict[tuple[str, ...], DataLocation] = {}
    initial: dict[tuple[str, str], WeightsFile | None] = {}
    checked: set[str] = set()
    runs: list[PlannedRun] = []
    for point in points:
        recipe = point.resolved.recipe
        data_key = (recipe.data.set, recipe.data.make, point.job.data, *recipe.data.classes)
        if data_key not in locations:
            find = _find_data_offline if dry_run else find_data
            found = find(recipe.data.set, data, point.job, recipe.data.make)
            locations[data_key] = found.choose(recipe.data.classes)
            if not dry_run:
                require_data(locations[data_key])
        location = locations[data_key]
        point = replace(point, resolved=fit_to_data(point.resolved, location, stats=stats))
        if from_data := filled(recipe, point.resolved.recipe):
            values = ", ".join(f"{key} = {value}" for key, value in from_data.items())
            notes.append(f"from {location.url} (modified): {values}")
        recipe = point.resolved.recipe
        notes += [f"{recipe.name}: {doubt}" for doubt in doubts(point.resolved, point.job, location)]
        if (text := f"{location.url} {recipe.data.model_dump_json()}") not in checked:
            location.check(recipe)
            checked.add(text)
        virtual_ranks = recipe.train.virtual_ranks
        check_share(recipe, virtual_ranks, point.job, point.job_path)
        if (weights_key := (recipe.init.weights, recipe.model.name)) not in initial:
            initial[weights_key] = None
            with refusing(refusals, dry_run):
                initial[weights_key] = initial_weights(recipe, runs_url)
        weights = initial[weights_key]
        is_known = location.is_found and (weights is not None or not recipe.init.weights)
        for seed in point.seeds:
            inputs, name = (seed, location.digest, weights.sha256 if weights else "", DRAWS), _run_name(recipe, seed)
            run = Run.at(runs_url, f"{name}-{recipe.digest(*inputs) if is_known else 'unknown'}")
            earlier = recipe.earlier_digests(*inputs) if is_known else []
            older = tuple(Run.at(runs_url, f"{name}-{digest}") for digest in dict.fromkeys(earlier))
            runs.append(PlannedRun(run, point, location, seed, virtual_ranks, weights, older=older))
    refusals += [DataError(location.problem) for location in locations.values() if location.problem]
    try:
        runs, more = with_states(runs, runs_url, resubmit=resubmit)
        notes += more
    except (StorageError, SubmitError) as error:
        if not dry_run:  # a dry run works without a network
            raise
        refusals.append(type(error)(f"could not check which of the runs exist: {error}"))
    with refusing(refusals, dry_run):
        refuse_others(runs)
    for planned in runs:
        if planned.should_submit:
            _check_memory(planned)
    runs, over_budget = mark_over_budget(runs)
    notes += over_budget
    for planned in runs:
        notes += filter(None, (_copies_note(planned), _memory_note(planned), _average_note(planned.recipe)))
    return runs, notes


@contextmanager
def refusing(refusals: list[RsbError], dry_run: bool) -> Iterator[None]:
    """In a dry run, keep an error as a refusal instead of raising it."""
    try:
        yield
    except RsbError as error:
        if not dry_run:
            raise
        refusals.append(error)


def _run_name(recipe: Recipe, seed: int) -> str:
    return f"{recipe.name}-{recipe.model.name}-s{seed}"


def _copies_note(planned: PlannedRun) -> str:
    """Return a remark on copies of an image in one micro-batch, unless the paper had them there, too."""
    repeats = planned.recipe.augment.repeats
    if planned.virtual_ranks >= repeats or planned.has_papers_virtual_ranks:
        return ""
    return (
        f"with {planned.virtual_ranks} virtual ranks, some of {repeats} copies of an image (augment.repeats) fall into "
        "the same micro-batch and share its BatchNorm statistics. Use more --virtual-ranks."
    )


def _average_note(recipe: Recipe) -> str:
    """Return a remark if much of the averaged weights is still the initial weights at the end of a run."""
    left = recipe.train.ema_decay**recipe.total_steps
    if recipe.train.ema_warmup or left < 0.01:
        return ""
    return (
        f"after {recipe.total_steps:,} steps, {left:.0%} of the averaged weights (train.ema_decay = "
        f"{recipe.train.ema_decay:g}) is still the initial ones. Use --set train.ema_warmup=true, or a smaller decay."
    )


def _memory_note(planned: PlannedRun) -> str:
    return memory_note(planned.recipe, planned.virtual_ranks, planned.point.job)


def _check_memory(planned: PlannedRun) -> None:
    """Refuse a run whose ranks need more memory than their node has."""
    job = planned.point.job
    available = backends.backend_of(job).memory_bytes(job)
    if available and (needed := planned.memory) is not None and available < needed.total:
        raise ConfigError(
            f"{planned.run.run_id} needs more memory than the {available / 1e9:.1f} GB of a node (job {job.name}): at "
            f"least {needed}. Request more (--set job.mem_gb=N), train on more nodes, or hold less: a smaller "
            "data.shuffle_samples (another order of samples, so another run) or more --virtual-ranks."
        )


def _find_data_offline(name: str, data: str, job: Job, make: str) -> DataLocation:
    """Find the data of a dry run, which works without a network."""
    try:
        return find_data(name, data, job, make)
    except StorageError as error:
        return DataLocation(data or job.data, problem=f"could not search for the data: {error}")
