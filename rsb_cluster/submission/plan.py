"""Planning: resolve a request into runs and job arrays, and refuse what cannot work.

Everything that can be checked is checked here: a job that waits a day in the queue must not die on a typo. What many
runs share (a recipe, a job, an index, the check of a model, the scheduler's queue) is read once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from rsb_cluster import backends
from rsb_cluster.config.sweep_file import Point, SweepFile, expand
from rsb_cluster.errors import ConfigError, RsbError, StorageError, SubmitError
from rsb_cluster.runs import sharing, sweep
from rsb_cluster.runs.lookup import runs_folder
from rsb_cluster.runs.run import READERS
from rsb_cluster.storage.local_files import describe_access, exists
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.job_arrays import Array, ToSubmit, make_arrays
from rsb_cluster.submission.model_check import check_models
from rsb_cluster.submission.plan_runs import plan_runs, refusing
from rsb_cluster.submission.planned_run import PlannedRun
from rsb_cluster.submission.request import Request
from rsb_cluster.submission.resubmit import check_replaced
from rsb_cluster.subprocesses.interpreter import check_python_path


@dataclass(frozen=True)
class Plan:
    """What a submit will do; the dry run prints it.

    Attributes:
        runs: All requested runs, including those that are finished or queued.
        arrays: The job arrays to submit.
        sweep: The sweep that the runs belong to, or None.
        refusals: Why a submit would be refused; only of a dry run, as a submit raises the first of them.
    """

    runs_url: str
    runs: tuple[PlannedRun, ...]
    arrays: tuple[Array, ...]
    sweep: sweep.Sweep | None = None
    notes: tuple[str, ...] = field(default=())
    refusals: tuple[RsbError, ...] = field(default=())


def plan(file: SweepFile, path: Path | None, request: Request, *, is_sweep: bool, dry_run: bool = False) -> Plan:
    """Resolve and check everything; nothing is written but a probe file in the folder of runs.

    Shards that a recipe makes itself may be missing: `data_location.make_missing_shards` makes them before a submit.

    Args:
        file: The recipes and models; a single recipe is a sweep of one point.
        path: Path of the sweep file, or None if the recipes come from the command line.
        request: The other options.
        is_sweep: Whether the runs form a sweep with an id.
        dry_run: What can be shown in spite of an error is, with the error as a refusal; and nothing is written at all.

    Raises:
        ConfigError: A recipe, job or option is wrong.
        DataError: Shards are missing.
        StorageError: The folder of runs cannot be written.
    """
    check_python_path()
    if request.seeds:
        file = file.model_copy(update={"grid": tuple(g.model_copy(update={"seeds": request.seeds}) for g in file.grid)})
    refusals: list[RsbError] = []
    points, job_notes = _expand(file, request, refusals if dry_run else None)
    first = points[0].job
    for job in {id(point.job): point.job for point in points}.values():
        request.site.check(job)
        backend = backends.backend_of(job)
        backend.check_job(job)
        if dry_run and not refusals and (refusal := backend.why_unreachable() or backend.why_refused(job)):
            refusals.append(SubmitError(refusal))
        job_notes += backend.notes(job)
    runs_url = runs_folder(request.runs, first.runs)
    runs, notes = plan_runs(
        points,
        runs_url,
        request.data,
        dry_run=dry_run,
        resubmit=request.resubmit,
        stats=request.stats,
        refusals=refusals,
    )
    notes += job_notes
    with refusing(refusals, dry_run):
        check_replaced(runs, notes)
    with refusing(refusals, dry_run):
        backends.backend_of(first).check_available(first)
    with refusing(refusals, dry_run):
        if dry_run:
            _check_looks_writable(runs_url)
        else:
            _check_writable(runs_url)
        for job in {id(point.job): point.job for point in points}.values():
            sharing.check_can_share(runs_url, job)
    planned_sweep = None
    if is_sweep:
        with refusing(refusals, dry_run):
            sharing.check_common_folder(runs_url, sweep.FOLDER)
        ids = [p.run.run_id for p in runs]
        members = [
            sweep.Member(run_id=p.run.run_id, recipe=p.recipe.name, model=p.recipe.model.name, seed=p.seed)
            for p in runs
        ]
        planned_sweep = sweep.Sweep(
            sweep_id=sweep.sweep_id(file.name, ids)
            if all(not p.run.run_id.endswith("-unknown") for p in runs)
            else f"{file.name}-unknown",
            file=str(path or ""),
            created=time.time(),
            members=tuple(members),
        )
    if request.exclude_failed_hosts:
        runs, more = _exclude_failed_hosts(runs)
        notes += more
    _check_data_is_reachable(runs)
    arrays = make_arrays(
        runs_url,
        [ToSubmit(p.run, p.point.job, p.data.url) for p in runs if p.should_submit],
        name=planned_sweep.sweep_id if planned_sweep else points[0].resolved.recipe.name,
    )
    for array in arrays:
        array.script  # noqa: B018 - raises if an option is invalid
        if not backends.backend_of(array.job).needs_object_store:
            with refusing(refusals, dry_run):
                sharing.check_submission_folder(array.folder.parent)
    recompute = {p.run.run_id for p in runs if p.point.job.gradient_checkpointing}  # may be new for a run that is not
    to_check = [p for p in runs if dry_run or p.state == "new" or (p.should_submit and p.run.run_id in recompute)]
    parameters = check_models(  # last, as it may take seconds
        [(p.recipe, p.init) for p in to_check], [p.run.run_id in recompute for p in to_check]
    )
    by_id = {p.run.run_id: count for p, count in zip(to_check, parameters, strict=True)}
    checked = tuple(replace(p, parameters=by_id.get(p.run.run_id, 0)) for p in runs)
    notes += [str(error) for error in refusals]
    return Plan(runs_url, checked, arrays, planned_sweep, tuple(dict.fromkeys(notes)), tuple(refusals))


def _check_writable(runs_url: str) -> None:
    """Refuse a folder of runs that cannot be written; one that is not there yet is not left behind by the try."""
    store = Store(runs_url)
    is_new = store.is_local and not store.exists()
    store.check_writable()
    if is_new:
        with suppress(OSError):
            Path(runs_url).rmdir()


def _check_looks_writable(runs_url: str) -> None:
    """Refuse a folder of runs that cannot be written, as far as that is known without a try. Raises StorageError."""
    if Store(runs_url).is_local:
        found = next(path for path in (Path(runs_url), *Path(runs_url).parents) if exists(path))
        if not Store(found).is_writable():
            raise StorageError(f"cannot write {runs_url}: {describe_access(found)}. Use another --runs.")


def _expand(file: SweepFile, request: Request, refusals: list[RsbError] | None) -> tuple[list[Point], list[str]]:
    """Return the points of a sweep, and notes.

    Without a named job they are for Slurm where it is installed, and not for this machine if it does not answer:
    nothing long may start on a login node because a controller is restarted. Only recipes that make their own small
    data train here wherever they are submitted.

    Raises:
        SubmitError: Slurm does not answer, and no job was named.
    """

    def points_with(job: str) -> list[Point]:
        points = expand(file, job=job, recipe_overrides=request.recipe_overrides, job_overrides=request.job_overrides)
        jobs = {id(point.job): backends.at_site(point.job) for point in points}
        return [replace(point, job=jobs[id(point.job)]) for point in points]

    if named := request.job or file.job:
        return points_with(named), []
    default = backends.default_job(request.nodes[1])
    points = points_with(default)
    is_small = all(point.resolved.recipe.data.make for point in points)
    if is_small and request.nodes[1] <= 1 and not request.site.slurm_options:
        here = points_with("local")
        is_elsewhere = points[0].job.backend != here[0].job.backend
        return here, [f"trains on this machine; use --job {default} to submit it there"] if is_elsewhere else []
    problem = backends.backend_of(points[0].job).why_unreachable()
    if not problem:
        return points, []
    message = (
        f"Slurm is installed here, but does not answer: {problem}\nSubmit again when it does, or name another job: "
        "--job local trains on this machine; 'rsb-cluster jobs list' shows all."
    )
    if refusals is None:
        raise SubmitError(message)
    refusals.append(SubmitError(message))
    return points, []


def _exclude_failed_hosts(runs: Sequence[PlannedRun]) -> tuple[list[PlannedRun], list[str]]:
    """Exclude from all jobs the nodes on which ranks of the runs' last attempts failed; and return notes."""
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda p: p.run.failed_hosts() if p.state == "unfinished" else [], runs))
    hosts = sorted({host for failed in found for host in failed})
    if not hosts:
        return list(runs), ["no rank of these runs is known to have failed on a host; no node is excluded."]
    unique = {id(p.point.job): p.point.job for p in runs}
    jobs = {key: backends.backend_of(job).exclude_hosts(job, hosts) for key, job in unique.items()}
    excluded = [replace(p, point=replace(p.point, job=jobs[id(p.point.job)])) for p in runs]
    return excluded, [f"excluded nodes, as ranks failed there: {', '.join(hosts)}"]


def _check_data_is_reachable(runs: Sequence[PlannedRun]) -> None:
    """Refuse data that the nodes of a job cannot read."""
    for planned in runs:
        job = planned.point.job
        if backends.backend_of(job).shares_files(job):
            continue
        if url := next((url for url in planned.data.folders if "://" not in url), ""):
            raise ConfigError(
                f"job '{job.name}': cloud machines cannot read {url}. Copy the shards to a bucket and use "
                "--data s3://bucket/folder."
            )
