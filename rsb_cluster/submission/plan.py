"""Planning: resolve a request into runs and job arrays, and refuse what cannot work.

Everything that can be checked is checked here: a job that waits a day in the queue must not die on a typo. What many
runs share (a recipe, a job, an index, the check of a model, the scheduler's queue) is read once.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from rsb_cluster import backends
from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import SEEDS, Override
from rsb_cluster.config.sweep_file import Point, SweepFile, expand
from rsb_cluster.data.order import DRAWS
from rsb_cluster.errors import ConfigError, RsbError, StorageError
from rsb_cluster.node.task import Task
from rsb_cluster.runs import sweep
from rsb_cluster.runs.gpu_hours import BudgetExceededError, check_budget
from rsb_cluster.runs.lookup import default_runs
from rsb_cluster.runs.run import READERS, Run, Submission, check_same_recipe
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.data_location import DataLocation, find_data, require_data
from rsb_cluster.submission.model_check import check_models
from rsb_cluster.submission.virtual_ranks import choose_virtual_ranks
from rsb_cluster.subprocesses.interpreter import check_python_path
from rsb_cluster.weights.resolve import WeightsFile, initial_weights


@dataclass(frozen=True)
class Request:
    """The options of a submit besides recipes and models, as typed; they apply to all runs.

    Attributes:
        nodes: Minimum and maximum number of nodes; 0: the job's.
        exclude_failed_hosts: Exclude the nodes on which ranks of these runs failed.
    """

    job: str = ""
    nodes: tuple[int, int] = (0, 0)
    gpus_per_node: int | None = None
    exclude_failed_hosts: bool = False
    parallel: int = 0
    max_gpu_hours: float | None = None
    seeds: tuple[int, ...] = ()
    data: str = ""
    runs: str = ""
    init: str = ""
    virtual_ranks: int = 0
    cache_dir: str = ""
    overrides: tuple[Override, ...] = ()

    @property
    def job_overrides(self) -> list[Override]:
        """The overrides of fields of the job."""
        found = [(path.removeprefix("job."), value) for path, value in self.overrides if path.startswith("job.")]
        if self.nodes[1]:
            found += [("min_nodes", self.nodes[0]), ("nodes", self.nodes[1])]
        if self.gpus_per_node is not None:
            found.append(("gpus_per_node", self.gpus_per_node))
        if self.parallel:
            found.append(("array_parallelism", self.parallel))
        if self.max_gpu_hours is not None:
            found.append(("max_gpu_hours", self.max_gpu_hours))
        if self.cache_dir:
            found.append(("cache_dir", self.cache_dir))
        return found

    @property
    def recipe_overrides(self) -> list[Override]:
        """The overrides of fields of the recipes."""
        found = [(path, value) for path, value in self.overrides if not path.startswith("job.")]
        if self.init:
            found.append(("init.weights", self.init))
        if self.virtual_ranks:
            found.append(("train.virtual_ranks", self.virtual_ranks))
        return found


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan.

    Attributes:
        point: The recipe and the job.
        init: The initial weights; None for random weights, or if a dry run could not find them.
        state: new, unfinished, already submitted, finished, or over budget.
        parameters: Number of parameters of the model; 0 if it was not built, as it was when the run was created.
    """

    run: Run
    point: Point
    data: DataLocation
    seed: int
    virtual_ranks: int
    init: WeightsFile | None = None
    state: str = "new"
    parameters: int = 0

    @property
    def recipe(self) -> Recipe:
        """What to train."""
        return self.point.resolved.recipe

    @property
    def should_submit(self) -> bool:
        """Whether the run needs a new job."""
        return self.state in ("new", "unfinished")


@dataclass(frozen=True)
class ToSubmit:
    """A run to submit with a job.

    Attributes:
        data: Where the run's data are now.
    """

    run: Run
    job: Job
    data: str


@dataclass(frozen=True)
class Array:
    """Runs with the same resources, submitted together: a job array, or a single job for one run.

    Attributes:
        data: Where the data of each run are now.
    """

    job: Job
    name: str
    folder: Path
    runs: tuple[Run, ...]
    data: tuple[str, ...]

    @property
    def tasks(self) -> list[Task]:
        """The tasks of the array, one per run."""
        job = self.job.model_dump(mode="json")
        return [Task(run.url, run.run_id, job, data) for run, data in zip(self.runs, self.data, strict=True)]

    @property
    def script(self) -> str:
        """The exact script that the engine will get; empty on this machine."""
        return backends.backend_of(self.job).script(self.job, self.tasks, self.folder, self.name)


@dataclass(frozen=True)
class Plan:
    """What a submit will do; the dry run prints it.

    Attributes:
        runs: All requested runs, including those that are finished or queued.
        arrays: The job arrays to submit.
        sweep: The sweep that the runs belong to, or None.
    """

    runs_url: str
    runs: tuple[PlannedRun, ...]
    arrays: tuple[Array, ...]
    sweep: sweep.Sweep | None = None
    notes: tuple[str, ...] = field(default=())


def plan(file: SweepFile, path: Path | None, request: Request, *, is_sweep: bool, dry_run: bool = False) -> Plan:
    """Resolve and check everything; nothing is written but a probe file in the folder of runs.

    Shards that a recipe makes itself may be missing: `data_location.make_missing_shards` makes them before a submit.

    Args:
        file: The recipes and models; a single recipe is a sweep of one point.
        path: Path of the sweep file, or None if the recipes come from the command line.
        request: The other options.
        is_sweep: Whether the runs form a sweep with an id.
        dry_run: Missing data is a note instead of an error, and nothing is written at all.

    Raises:
        ConfigError: A recipe, job or option is wrong.
        DataError: Shards are missing.
        StorageError: The folder of runs cannot be written.
    """
    check_python_path()
    job_name = request.job or file.job or backends.default_job(request.nodes[1])
    if request.seeds:
        file = file.model_copy(update={"grid": tuple(g.model_copy(update={"seeds": request.seeds}) for g in file.grid)})
    points = expand(file, job=job_name, recipe_overrides=request.recipe_overrides, job_overrides=request.job_overrides)
    first = points[0].job
    for job in {id(point.job): point.job for point in points}.values():
        backends.backend_of(job).check_job(job)
    runs_url = Store(request.runs or first.runs or os.environ.get("RSB_RUNS") or default_runs()).url
    runs, notes = plan_runs(points, runs_url, request.data, dry_run=dry_run)
    if not dry_run:
        backends.backend_of(first).check_available(first)
        Store(runs_url).check_writable()
    planned_sweep = None
    if is_sweep:
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
    to_check = [p for p in runs if dry_run or p.state == "new"]
    parameters = check_models([(p.recipe, p.init) for p in to_check])  # last, as it may take seconds
    by_id = {p.run.run_id: count for p, count in zip(to_check, parameters, strict=True)}
    checked = tuple(replace(p, parameters=by_id.get(p.run.run_id, 0)) for p in runs)
    return Plan(runs_url, checked, arrays, planned_sweep, tuple(dict.fromkeys(notes)))


def make_arrays(runs_url: str, runs: Sequence[ToSubmit], *, name: str) -> tuple[Array, ...]:
    """Group runs into as few job arrays as their resources and the site's limit allow."""
    by_job: dict[str, list[ToSubmit]] = {}
    for member in runs:
        by_job.setdefault(member.job.model_dump_json(), []).append(member)
    parts: list[list[ToSubmit]] = []
    for members in by_job.values():
        size = backends.backend_of(members[0].job).max_array_size() if len(members) > 1 else 1
        parts += [members[i : i + size] for i in range(0, len(members), size)]
    stamp = time.strftime(f"%Y%m%d-%H%M%S-{name}-{os.getpid()}")
    arrays = []
    for number, members in enumerate(parts):
        job = members[0].job
        job_name = members[0].run.run_id if len(runs) == 1 else name
        folder = _submissions_folder(job, runs_url) / (stamp if len(parts) == 1 else f"{stamp}-{number}")
        if "%" in str(folder):
            raise ConfigError(
                f"the scripts and logs of jobs cannot be written to {folder}: to Slurm and submitit a '%' in a path "
                "stands for the job's number (%j) and the like. Use other --runs, or --set job.submissions=FOLDER."
            )
        arrays.append(Array(job, job_name, folder, tuple(m.run for m in members), tuple(m.data for m in members)))
    return tuple(arrays)


def parse_seeds(seed: int | None, count: int | None) -> tuple[int, ...]:
    """Return the seeds of ``--seed 3`` or ``--seeds 5`` (0 to 4)."""
    if seed is not None and count is not None:
        raise ConfigError("--seed is one seed, --seeds a number of seeds from 0: use one of them.")
    if max(seed or 0, (count or 1) - 1) >= SEEDS:
        raise ConfigError(
            f"the seed {seed or count} is too large: seeds of {SEEDS} and more share draws with small ones."
        )
    return tuple(range(count)) if count else (seed or 0,)


# --- parts of a plan ----------------------------------------------------------------------------------------------


def plan_runs(
    points: Sequence[Point], runs_url: str, data: str, *, dry_run: bool
) -> tuple[list[PlannedRun], list[str]]:
    """Return the runs of the points, complete but for the check of their models, and notes for the user."""
    notes: list[str] = []
    locations: dict[tuple[str, ...], DataLocation] = {}
    initial: dict[tuple[str, str], WeightsFile | None] = {}
    checked: set[str] = set()
    runs: list[PlannedRun] = []
    for point in points:
        recipe = point.resolved.recipe
        data_key = (recipe.data.set, recipe.data.make, point.job.data)
        if data_key not in locations:
            find = _find_data_offline if dry_run else find_data
            locations[data_key] = find(recipe.data.set, data, point.job, recipe.data.make)
            if not dry_run:
                require_data(locations[data_key])
        location = locations[data_key]
        if (text := f"{location.url} {recipe.data.model_dump_json()}") not in checked:
            location.check(recipe)
            checked.add(text)
        virtual_ranks = choose_virtual_ranks(recipe, point.job, point.job_path)
        if (weights_key := (recipe.init.weights, recipe.model.name)) not in initial:
            initial[weights_key], problem = _find_initial_weights(recipe, runs_url, dry_run)
            notes += problem
        weights = initial[weights_key]
        is_known = location.is_found and (weights is not None or not recipe.init.weights)
        for seed in point.seeds:
            digest = recipe.digest(seed, location.digest, weights.sha256 if weights else "", DRAWS)
            run = Run.at(runs_url, f"{recipe.name}-{recipe.model.name}-s{seed}-{digest if is_known else 'unknown'}")
            runs.append(PlannedRun(run, point, location, seed, virtual_ranks, weights))
    notes += [location.problem for location in locations.values() if location.problem]
    try:
        runs, elsewhere = _with_states(runs, runs_url)
        notes += elsewhere
    except StorageError as error:
        if not dry_run:  # a dry run works without a network
            raise
        notes.append(f"could not check which of the runs exist: {error}")
    runs, over_budget = _mark_over_budget(runs)
    notes += over_budget
    for planned in runs:
        if planned.virtual_ranks < (repeats := planned.recipe.augment.repeats):
            notes.append(
                f"with {planned.virtual_ranks} virtual ranks, some of {repeats} copies of an image (augment.repeats) "
                "fall into the same micro-batch and share its BatchNorm statistics. Use more --virtual-ranks."
            )
    return runs, notes


def _find_initial_weights(recipe: Recipe, runs_url: str, dry_run: bool) -> tuple[WeightsFile | None, list[str]]:
    """Return the initial weights of a recipe, and notes: in a dry run an error is only a note."""
    try:
        return initial_weights(recipe, runs_url), []
    except RsbError as error:
        if not dry_run:
            raise
        return None, [str(error)]


def _find_data_offline(name: str, data: str, job: Job, make: str) -> DataLocation:
    """Find the data of a dry run, which works without a network."""
    try:
        return find_data(name, data, job, make)
    except StorageError as error:
        return DataLocation(data or job.data, problem=f"could not search for the data: {error}")


def _with_states(runs: Sequence[PlannedRun], runs_url: str) -> tuple[list[PlannedRun], list[str]]:
    """Return the runs with their states, and notes; folders are read in parallel, each scheduler is queried once."""
    existing = set(Store(runs_url).names()) if any(planned.data.is_found for planned in runs) else set()

    def read(planned: PlannedRun) -> tuple[PlannedRun, list[Submission]]:
        run, point = planned.run, planned.point
        if not planned.data.is_found or run.run_id not in existing or not run.exists():
            return planned, []
        check_same_recipe(run, planned.recipe)
        stored = run.spec().virtual_ranks
        kept = replace(planned, virtual_ranks=choose_virtual_ranks(planned.recipe, point.job, point.job_path, stored))
        if run.result() is not None:
            return replace(kept, state="finished"), []
        return replace(kept, state="unfinished"), run.submissions()

    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(read, runs))
    states = iter(backends.states([s for _, submissions in found for s in submissions]))
    result, notes = [], []
    for planned, submissions in found:
        if set(itertools.islice(states, len(submissions))) - {"gone"}:
            planned = replace(planned, state="already submitted")
            if (data := submissions[-1].data) and data != planned.data.url:
                notes.append(
                    f"{planned.run.run_id} is already submitted, with its data in {data}. To use {planned.data.url}, "
                    "cancel it and submit again."
                )
        result.append(planned)
    return result, notes


def _mark_over_budget(runs: Sequence[PlannedRun]) -> tuple[list[PlannedRun], list[str]]:
    """Mark the runs that have used up their GPU-hour budget, as their jobs would stop at once; and return notes.

    Raises:
        BudgetExceededError: No other run is left to submit.
    """

    def check(planned: PlannedRun) -> str:
        try:
            if planned.state == "unfinished":
                check_budget(planned.run, planned.point.job)
        except BudgetExceededError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(READERS) as pool:
        problems = list(pool.map(check, runs))
    marked = [replace(p, state="over budget") if problem else p for p, problem in zip(runs, problems, strict=True)]
    notes = list(filter(None, problems))
    if notes and not any(p.should_submit for p in marked):
        raise BudgetExceededError("\n".join(notes))
    return marked, notes


def _exclude_failed_hosts(runs: Sequence[PlannedRun]) -> tuple[list[PlannedRun], list[str]]:
    """Exclude from all jobs the nodes on which ranks of the runs' last attempts failed; and return notes."""
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda p: p.run.failed_hosts() if p.state == "unfinished" else [], runs))
    hosts = sorted({host for failed in found for host in failed})
    if not hosts:
        return list(runs), ["no rank of these runs is known to have failed on a host; no node is excluded."]
    jobs = [backends.backend_of(p.point.job).exclude_hosts(p.point.job, hosts) for p in runs]
    excluded = [replace(p, point=replace(p.point, job=job)) for p, job in zip(runs, jobs, strict=True)]
    return excluded, [f"excluded nodes, as ranks failed there: {', '.join(hosts)}"]


def _check_data_is_reachable(runs: Sequence[PlannedRun]) -> None:
    """Refuse data that the nodes of a job cannot read."""
    for planned in runs:
        job, url = planned.point.job, planned.data.url
        if "://" not in url and not backends.backend_of(job).shares_files(job):
            raise ConfigError(
                f"job '{job.name}': cloud machines cannot read {url}. Copy the shards to a bucket and use "
                "--data s3://bucket/folder."
            )


def _submissions_folder(job: Job, runs_url: str) -> Path:
    if job.submissions:
        return Path(job.submissions).expanduser().absolute()
    store = Store(runs_url)
    return Path(store.url) / "submissions" if store.is_local else Path.cwd() / "submissions"
