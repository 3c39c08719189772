"""Submitting: build a plan that can be printed, refuse what cannot work, then hand it to the back end.

Everything that can be checked is checked here: a job that waits a day must not die on a typo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rsb_cluster import scheduler
from rsb_cluster.catalog import Resolved, load_job, load_recipe
from rsb_cluster.data.index import INDEX_NAME, ShardIndex, load_index
from rsb_cluster.errors import ConfigError, DataError, RsbError
from rsb_cluster.job import Job
from rsb_cluster.recipe import Recipe
from rsb_cluster.run import Run, Spec, Submission, check_same, default_runs, describe_code, describe_packages
from rsb_cluster.storage import Store
from rsb_cluster.task import Task


@dataclass(frozen=True)
class Request:
    """What the user asked for, as typed."""

    recipe: str
    job: str = ""
    model: str = ""
    nodes: int = 0
    gpus_per_node: int | None = None
    seeds: tuple[int, ...] = (0,)
    data: str = ""
    runs: str = ""
    virtual_ranks: int = 0
    cache_dir: str = ""
    assignments: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSource:
    """Where the samples will come from.

    Attributes:
        url: Folder with ``train/`` and ``val/``.
        train: Index of the training shards, or None where there are none (a dry run may go on without).
        val: Index of the validation shards, or None.
    """

    url: str
    train: ShardIndex | None = None
    val: ShardIndex | None = None

    @property
    def digest(self) -> str:
        """Stands for the content of both parts; unknown without data."""
        return f"{self.train.digest}+{self.val.digest}" if self.train and self.val else "unknown"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan."""

    run: Run
    seed: int
    virtual_ranks: int
    state: str = "new"

    @property
    def is_to_submit(self) -> bool:
        """Whether there is anything left to do for it."""
        return self.state in ("new", "unfinished")


@dataclass(frozen=True)
class Plan:
    """What a submit will do; the dry run prints it."""

    resolved: Resolved
    job: Job
    job_path: Path
    data: DataSource
    runs_url: str
    runs: tuple[PlannedRun, ...]
    folder: Path
    parameters: int
    notes: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """What the scheduler shows."""
        return self.runs[0].run.run_id if len(self.runs) == 1 else f"{self.resolved.recipe.name}-{len(self.runs)}-runs"

    @property
    def tasks(self) -> list[Task]:
        """One per run that is to be submitted."""
        job = self.job.model_dump(mode="json")
        return [Task(p.run.url, p.run.run_id, job) for p in self.runs if p.is_to_submit]


def plan(request: Request, *, dry_run: bool = False) -> Plan:
    """Resolve and check everything; nothing is written but a probe file in the folder of runs.

    Args:
        request: What the user asked for.
        dry_run: Missing data is a note and not an error, and nothing is written at all.

    Raises:
        ConfigError: The recipe, job or an option is wrong.
        DataError: Shards are missing or not those of the recipe.
        StorageError: The folder of runs cannot be written.
    """
    job_name = request.job or scheduler.default_backend_job(request.nodes)
    for_job = [a.removeprefix("job.") for a in request.assignments if a.startswith("job.")]
    for_recipe = [a for a in request.assignments if not a.startswith("job.")]
    if request.nodes:
        for_job.append(f"nodes={request.nodes}")
    if request.gpus_per_node is not None:
        for_job.append(f"gpus_per_node={request.gpus_per_node}")
    if request.cache_dir:
        for_job.append(f"cache_dir={json.dumps(request.cache_dir)}")
    if request.virtual_ranks:
        for_recipe.append(f"train.virtual_ranks={request.virtual_ranks}")
    resolved = load_recipe(request.recipe, model=request.model or None, assignments=for_recipe)
    job, job_path = load_job(job_name, assignments=for_job)
    recipe = resolved.recipe

    runs_url = Store(request.runs or job.runs or os.environ.get("RSB_RUNS") or default_runs()).url
    data, notes = _find_data(recipe, request.data, job, dry_run=dry_run)
    planned = tuple(_plan_run(recipe, job, job_path, data, runs_url, seed) for seed in request.seeds)
    if planned[0].virtual_ranks < recipe.augment.repeats:
        notes.append(
            f"{planned[0].virtual_ranks} virtual ranks cannot keep {recipe.augment.repeats} copies of an image apart "
            "(augment.repeats): some will share a micro-batch, and its BatchNorm. Use more --virtual-ranks."
        )
    if not dry_run:
        scheduler.check_available(job)
        Store(runs_url).check_writable()
    folder = _submissions_folder(job, runs_url) / time.strftime(f"%Y%m%d-%H%M%S-{recipe.name}-{os.getpid()}")
    made = Plan(resolved, job, job_path, data, runs_url, planned, folder, 0, tuple(notes))
    if job.backend == "slurm":
        sbatch(made)  # refuses options that Slurm's script cannot have
    return replace(made, parameters=_check_model(recipe))  # last, as it takes seconds


def sbatch(made: Plan) -> str:
    """Return the exact text that Slurm will get."""
    return scheduler.sbatch_text(made.job, made.folder, made.name, max(1, len(made.tasks)))


def submit(made: Plan) -> list[Submission]:
    """Carry a plan out: write what makes the runs exist, then hand them to the back end."""
    todo = [p for p in made.runs if p.is_to_submit]
    if not todo:
        return []
    if made.data.train is None or made.data.val is None:
        raise DataError(f"there are no shards at {made.data.url}.")
    code, packages = describe_code(), describe_packages()
    for planned in todo:
        if planned.state == "new":
            spec = Spec(
                run_id=planned.run.run_id,
                seed=planned.seed,
                virtual_ranks=planned.virtual_ranks,
                data=made.data.url,
                train_digest=made.data.train.digest,
                val_digest=made.data.val.digest,
                modified=made.resolved.modified,
                code=code,
                packages=packages,
                created=time.time(),
            )
            planned.run.create(made.resolved.recipe, spec)
    submissions = scheduler.launch(made.job, made.tasks, made.folder, made.name)
    for planned, submission in zip(todo, submissions, strict=True):
        planned.run.add_submission(submission)
    return submissions


def make_data(recipe: Recipe, data: str) -> str:
    """Make the shards of a recipe that brings its own data, where they are missing; return their folder.

    The index of ``val`` is the last file of a set that is made, so what was interrupted is made again.
    """
    from rsb_cluster.data.make import make_set
    from rsb_cluster.data.sources import open_set

    url = data or str(Path.cwd() / "data" / recipe.data.set)
    if not Store(url).exists(f"val/{INDEX_NAME}"):
        make_set(open_set(recipe.data.make), Store(url), overwrite=True)
    return url


# --- parts of a plan ----------------------------------------------------------------------------------------------


def _find_data(recipe: Recipe, given: str, job: Job, *, dry_run: bool) -> tuple[DataSource, list[str]]:
    candidates = data_candidates(recipe, given, job)
    for url in candidates:
        store = Store(url)
        if store.exists(f"train/{INDEX_NAME}"):
            source = DataSource(url, load_index(store.child("train")), load_index(store.child("val")))
            _check_data(recipe, source)
            return source, []
    looked = "\n".join(f"  {url}/train/{INDEX_NAME}" for url in candidates)
    message = (
        f"no shards of '{recipe.data.set}' were found. Looked for\n{looked}\n"
        "Say where they are with --data, or make them with 'rsb-cluster shards make'. Shards without an index need "
        "'rsb-cluster shards index'."
    )
    if dry_run:
        return DataSource(candidates[0]), [message]
    raise DataError(message)


def data_candidates(recipe: Recipe, given: str, job: Job) -> list[str]:
    """Return where shards are looked for, in order: a set's own folder, or a root that holds it by name."""
    root = given or job.data or os.environ.get("RSB_DATA") or str(Path.cwd() / "data")
    url = Store(root).url
    return [url, f"{url}/{recipe.data.set}"] if given else [f"{url}/{recipe.data.set}"]


def _check_data(recipe: Recipe, source: DataSource) -> None:
    assert source.train is not None and source.val is not None
    for name, index, wanted in (
        ("train", source.train, recipe.data.train_samples),
        ("val", source.val, recipe.data.val_samples),
    ):
        if index.num_samples != wanted:
            raise ConfigError(
                f"{source.url}/{name} holds {index.num_samples} samples, the recipe says "
                f"data.{name}_samples = {wanted}. If this is the right data, add "
                f"--set data.{name}_samples={index.num_samples}."
            )
        largest = int(index.labels.max(initial=-1))
        if largest >= recipe.data.num_classes:
            raise ConfigError(
                f"{source.url}/{name} has a sample of class {largest}, the recipe says data.num_classes = "
                f"{recipe.data.num_classes}. Use --set data.num_classes={max(largest + 1, index.num_classes)}."
            )


def _plan_run(recipe: Recipe, job: Job, job_path: Path, data: DataSource, runs_url: str, seed: int) -> PlannedRun:
    digest = recipe.digest(seed, data.digest) if data.train else "unknown"
    run = Run.at(runs_url, f"{recipe.name}-{recipe.model.name}-s{seed}-{digest}")
    stored = 0
    state = "new"
    if data.train and run.exists():
        check_same(run, recipe)
        stored = run.spec().virtual_ranks
        state = _state_of(run)
    virtual_ranks = choose_virtual_ranks(recipe, job, job_path, stored)
    return PlannedRun(run, seed, virtual_ranks, state)


def _state_of(run: Run) -> str:
    if run.result() is not None:
        return "finished"
    submissions = run.submissions()
    if submissions and any(state != "gone" for state in scheduler.states(submissions)):
        return "already submitted"
    return "unfinished"


def choose_virtual_ranks(recipe: Recipe, job: Job, job_path: Path, stored: int = 0) -> int:
    """Return the number of parts of the global batch, or say why the job cannot train it.

    A run that exists keeps its number. Else it is the recipe's, or the smallest that gives each rank an equal share,
    fits ``job.max_micro_batch``, and lets the copies of repeated augmentation go to different micro-batches.
    """
    batch, world, where = recipe.train.global_batch, job.world_size, f"{job_path.name}: {job.shape}"
    if batch % world:
        below = batch // world * world
        options = [str(b) for b in (below, below + world) if b]
        raise ConfigError(
            f"train.global_batch = {batch} is not divisible by {world} ranks ({where}). Use {' or '.join(options)}."
        )
    fixed = stored or recipe.train.virtual_ranks
    if fixed:
        if batch % fixed:
            raise ConfigError(f"train.global_batch = {batch} is not divisible by {fixed} virtual ranks.")
        if fixed % world:
            shares = [str(w) for w in range(1, fixed + 1) if fixed % w == 0]
            what = "this run has" if stored else "the recipe has"
            raise ConfigError(
                f"{what} {fixed} virtual rank{'s' if fixed > 1 else ''}, which {world} ranks ({where}) cannot share "
                f"equally. Use a job with {' or '.join(filter(None, [', '.join(shares[:-1]), shares[-1]]))} "
                f"rank{'s' if fixed > 1 else ''} in all."
            )
        chosen = fixed
    else:
        repeats = min(recipe.augment.repeats, batch)
        mixes = bool(recipe.augment.mixup or recipe.augment.cutmix)
        fitting = [
            v
            for v in range(world, batch + 1, world)
            if batch % v == 0 and v >= repeats and batch // v <= job.max_micro_batch and not (mixes and batch // v % 2)
        ]
        if not fitting:
            raise ConfigError(
                f"train.global_batch = {batch} has no equal parts for {world} ranks ({where}) of at most "
                f"{job.max_micro_batch} images (job.max_micro_batch), even in number for Mixup. Use another batch."
            )
        chosen = fitting[0]
    micro_batch = batch // chosen
    if (recipe.augment.mixup or recipe.augment.cutmix) and micro_batch % 2:
        raise ConfigError(
            f"a micro-batch of {micro_batch} images ({batch} / {chosen} virtual ranks) is odd; Mixup mixes pairs. "
            "Use another --virtual-ranks."
        )
    return chosen


def _check_model(recipe: Recipe) -> int:
    """Build the model and the transforms in a process of their own: this one must stay light."""
    command = [sys.executable, "-m", "rsb_cluster.train.preflight"]
    done = subprocess.run(command, input=recipe.model_dump_json(), capture_output=True, text=True)
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise RsbError(f"the check of the model did not work:\n{done.stderr.strip()}") from error
    if "error" in answer:
        raise ConfigError(answer["error"])
    return int(answer["parameters"])


def _submissions_folder(job: Job, runs_url: str) -> Path:
    if job.submissions:
        return Path(job.submissions).expanduser().absolute()
    store = Store(runs_url)
    return Path(store.url) / "submissions" if store.is_local else Path.cwd() / "submissions"


def parse_seeds(seed: int | None, count: int | None) -> tuple[int, ...]:
    """Return the seeds of ``--seed 3`` or ``--seeds 5`` (0 to 4)."""
    if seed is not None and count is not None:
        raise ConfigError("--seed names one seed, --seeds counts from 0; give one of them.")
    return tuple(range(count)) if count else (seed or 0,)


def gpu_hours(recipe: Recipe, images_per_s: float, runs: Sequence[PlannedRun]) -> float:
    """Return the GPU-hours of the training images of all runs, at a rate per GPU."""
    return len(runs) * recipe.total_steps * recipe.train.global_batch / images_per_s / 3600
