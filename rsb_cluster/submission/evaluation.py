"""Evaluations: on which data, and as jobs where GPUs are.

Like a training, an evaluation has an id that is a digest of everything that can change the result, and the same one is
not submitted twice.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rsb_cluster import backends
from rsb_cluster.config.catalog import load_job
from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import Override
from rsb_cluster.data.index import INDEX_NAME, load_index, shards_of
from rsb_cluster.data.subset import choose_classes
from rsb_cluster.errors import CheckpointError, ConfigError, DataError, RefusedError, StorageError
from rsb_cluster.evaluation import jobs
from rsb_cluster.evaluation.record import EvaluationRequest
from rsb_cluster.evaluation.target import open_target
from rsb_cluster.runs import lookup, sharing, sweep
from rsb_cluster.runs.run import EVALUATION_JOBS, Run, Submission
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.job_arrays import ToSubmit, make_arrays
from rsb_cluster.submission.site import Site
from rsb_cluster.submission.submit import submit_arrays
from rsb_cluster.weights.resolve import WeightsFile, checkpoints, fetch_from_hub, find_weights

State = str  # new, unfinished, already submitted or finished, as of a planned run


# --- what is evaluated, on which data -----------------------------------------------------------------------------


def expand_sources(sources: Sequence[str], runs_url: str) -> tuple[list[str], list[str]]:
    """Return the sources with each sweep and each glob replaced by its runs, and notes on runs that are left out."""
    expanded: list[str] = []
    notes: list[str] = []
    sweeps = sweep.sweep_ids(runs_url)
    for source in sources:
        is_sweep = source in sweeps or any(sweep.has_prefix(sweep_id, source) for sweep_id in sweeps)
        if "/" in source or not (is_sweep or any(character in source for character in "*?[")):
            expanded.append(source)
            continue
        for run in lookup.find_runs(runs_url, [source]):
            if run.exists() and checkpoints(run):
                expanded.append(run.url)
            else:
                notes.append(f"{run.run_id} is left out: it has no checkpoint yet")
    if not expanded:
        raise CheckpointError("\n".join(notes))
    return list(dict.fromkeys(expanded)), notes


def own_data(source: str, runs_url: str) -> str:
    """Return where the data of a run are, whose part ``val`` is as it was when the run was created.

    Args:
        source: A run, or a checkpoint of one.
        runs_url: The folder of runs in which an id is looked up.

    Raises:
        ConfigError: The source is no run.
        DataError: The data are not where the run had them last, or have changed since.
    """

    def no_hub(name: str) -> WeightsFile:
        raise ConfigError("only a run knows its data. Name those of other weights with --data.")

    found = find_weights(source, runs_url, fetch=no_hub)
    if not found.run_url:
        raise ConfigError(f"{source}: only a run knows its data. Name those of other weights with --data.")
    run = _run_at(found.run_url)
    url, spec = run.data_url(), run.spec()
    val = Store(url).child("val")
    if not val.exists(INDEX_NAME):
        raise DataError(
            f"the data of {run.run_id} were in {url} when it was last submitted, and {val.locate(INDEX_NAME)} is not "
            "there now. Name the folder in which they are with --data."
        )
    if not choose_classes(load_index(val), run.recipe().data.classes, val.url).has_digest(spec.val_digest):
        raise DataError(
            f"{val.url} has changed since {run.run_id} was created: it is not the val part that the run was trained "
            f"with. To evaluate on what is there now, use --data {shlex.quote(url)}."
        )
    return url


def by_data(sources: Sequence[str], data: str, runs_url: str) -> dict[str, list[str]]:
    """Return the sources by their data: what was asked for, or each run's own."""
    if data:
        return {data: list(sources)}
    found: dict[str, list[str]] = {}
    for source in sources:
        found.setdefault(own_data(source, runs_url), []).append(source)
    return found


# --- as jobs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedEvaluation:
    """An evaluation to submit.

    Attributes:
        state: new, unfinished, already submitted or finished.
    """

    run: Run
    spec: jobs.EvaluationJob
    state: State = "new"

    @property
    def should_submit(self) -> bool:
        """Whether it needs a new job."""
        return self.state in ("new", "unfinished")


def evaluation_job(name: str, site: Site, *, gpus: int = 0, procs: int = 0) -> Job:
    """Return the job of evaluations: one node of a job file, with as many GPUs of it as were asked for.

    Args:
        name: Name or path of the job file.
        site: Where in a cluster.
        gpus: GPUs, all of one node; 0: one, if the job has GPUs.
        procs: Processes on the CPU, in place of GPUs.

    Raises:
        ConfigError: There is no such job, or it cannot be had so.
    """
    if gpus and procs:
        raise ConfigError("--procs is for the CPU and --gpus for GPUs. Use one of them.")
    plain, _ = load_job(name)
    gpus = 0 if procs else gpus or min(1, plain.gpus_per_node)
    changes: list[Override] = [("nodes", 1), ("min_nodes", 0), ("gpus_per_node", gpus)]
    changes.append(("tasks_per_node", procs or (0 if gpus else plain.ranks_per_node)))
    if plain.mem_gb and plain.gpus_per_node and gpus:
        changes.append(("mem_gb", plain.mem_gb * min(1.0, gpus / plain.gpus_per_node)))
    if plain.cloud.accelerators:
        kind = plain.cloud.accelerators.partition(":")[0]
        changes.append(("cloud.accelerators", f"{kind}:{gpus}" if gpus else ""))
    job = backends.at_site(load_job(name, overrides=[*changes, *site.job_overrides])[0])
    site.check(job)
    backends.backend_of(job).check_job(job)
    return job


def plan(
    requests: Sequence[EvaluationRequest], job: Job, *, fetch: Callable[[str], WeightsFile] = fetch_from_hub
) -> list[PlannedEvaluation]:
    """Check evaluations, and return one for each weights, with its state.

    Args:
        requests: What to evaluate; each source is evaluated on the data of all requests that name it.
        job: Where.
        fetch: As of `find_weights`.

    Raises:
        ConfigError: A request is wrong, or the nodes cannot read what it names.
        DataError: The data are not there.
    """
    backend = backends.backend_of(job)
    if requests[0].predictions and (len(requests[0].sources) > 1 or not backend.shares_files(job)):
        raise ConfigError("--save-predictions is for one SOURCE, and for nodes that see the files of this machine.")
    runs_url = requests[0].runs
    targets = [(request, open_target(request)) for request in requests]
    by_source: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        for source in request.sources:
            by_source.setdefault(source, []).append(number)
    planned = []
    for source, numbers in by_source.items():
        found = find_weights(source, runs_url, ema=bool(requests[numbers[0]].ema), fetch=fetch)
        place = _place(source, found)
        is_hub = not (place.startswith("/") or "://" in place)
        asked, digests = [], [found.sha256]
        for request, target in (targets[number] for number in numbers):
            folders = [target.store.url, shards_of(target.store, target.index).url]
            _check_reachable(job, *folders, *([] if is_hub else [place]), runs_url)
            changes: dict[str, Any] = {"sources": (place,), "data": target.store.url, "part": target.part}
            if request.predictions:
                changes["predictions"] = str(Path(request.predictions).absolute())
            asked.append(request.model_copy(update=changes))
            digests += [target.index.digest, target.labels_digest]
        spec = jobs.EvaluationJob(
            weights=_run_at(found.run_url).run_id if found.run_url else found.source.rsplit("/", 1)[-1],
            requests=tuple(asked),
            data=tuple(targets[number][1].name for number in numbers),
            images=sum(targets[number][1].index.num_samples for number in numbers),
            created=time.time(),
        )
        planned.append(PlannedEvaluation(jobs.job_run(runs_url, spec, digests), spec))
    unique = {one.run.url: one for one in planned}.values()
    return [replace(one, state=_state(one.run)) for one in unique]


def submit(planned: Sequence[PlannedEvaluation], job: Job) -> list[Submission]:
    """Submit evaluations: one job, or one job array. A submit that the scheduler refuses leaves nothing.

    Raises:
        ConfigError: The folder of runs, or that of the scripts, cannot be written.
        SubmitError: The scheduler refused a job.
    """
    new = [one for one in planned if one.should_submit]
    if not new:
        return []
    runs_url = new[0].run.runs_url.rpartition("/")[0]
    backend = backends.backend_of(job)
    backend.check_available(job)
    Store(runs_url).check_writable()
    sharing.check_can_share(runs_url, job)
    sharing.check_common_folder(runs_url, EVALUATION_JOBS)
    data = [one.spec.requests[0].data for one in new]
    arrays = make_arrays(runs_url, [ToSubmit(p.run, job, d) for p, d in zip(new, data, strict=True)], name="evaluate")
    for array in arrays:
        array.script  # noqa: B018 - raises if an option is invalid, before anything is written
    sharing.make_common_folder(runs_url, EVALUATION_JOBS)
    created = []
    for one in new:
        one.run.store.make_folder(sharing.mode_of(job))
        if one.run.store.create_json("spec.json", one.spec.model_dump(mode="json")):
            created.append(one.run)
    try:
        return submit_arrays(arrays)
    except (RefusedError, ConfigError):
        with suppress(StorageError):  # the error that is being handled says more
            for run in created:
                if not run.submissions():
                    Store(run.runs_url).delete(run.run_id)
        raise


def _place(source: str, found: WeightsFile) -> str:
    """Return a source as a node finds it. Of a run it is its folder, as a run that goes on removes checkpoints."""
    is_checkpoint = not found.run_url or Store(source).url == found.source
    return found.source if is_checkpoint else found.run_url


def _run_at(url: str) -> Run:
    parent, _, run_id = url.rpartition("/")
    return Run.at(parent, run_id)


def _state(run: Run) -> State:
    if not run.exists():
        return "new"
    if jobs.read_result(run) is not None:
        return "finished"
    active = backends.states(run.submissions())
    return "already submitted" if {"queued", "running"} & set(active) else "unfinished"


def _check_reachable(job: Job, *places: str) -> None:
    """Refuse what the nodes of a job cannot read."""
    if backends.backend_of(job).shares_files(job):
        return
    if local := next((place for place in places if "://" not in place), ""):
        raise ConfigError(
            f"job '{job.name}': cloud machines cannot read {local}. Copy it to a bucket, and name it there: "
            "s3://bucket/folder."
        )
