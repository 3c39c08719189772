"""Submitting: write what makes the runs of a plan exist, then hand them to the back end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from rsb_cluster import backends
from rsb_cluster.errors import ConfigError, StorageError, SubmitError
from rsb_cluster.runs.provenance import describe_code, describe_packages
from rsb_cluster.runs.run import READERS, InitialWeights, Run, Spec, Submission
from rsb_cluster.runs.sweep import write_sweep
from rsb_cluster.submission.data_location import require_data
from rsb_cluster.submission.plan import Array, Plan, PlannedRun
from rsb_cluster.submission.virtual_ranks import choose_virtual_ranks

# Waits before a submission is noted again where that failed, s: a job that is not on record cannot be ended by us.
RECORD_RETRY_S = (0.5, 1.0, 2.0, 4.0)


def submit(made: Plan) -> list[Submission]:
    """Carry a plan out.

    Raises:
        ConfigError: Another submit has created a run meanwhile, and not as this one asks; nothing is queued.
        SubmitError: The scheduler refused an array; those before it are queued, and submitting again sends the rest.
    """
    create_runs([p for p in made.runs if p.state == "new"])
    if made.sweep is not None:
        write_sweep(made.runs_url, made.sweep)
    return submit_arrays(made.arrays)


def create_runs(runs: Sequence[PlannedRun]) -> None:
    """Write what makes runs exist; of one that another submit has created meanwhile, what is there counts.

    Raises:
        ConfigError: What is there is not what is asked for here.
        DataError: Shards are missing.
        StorageError: A folder cannot be written.
    """
    code, packages = describe_code(), describe_packages()
    created = time.time()
    starts = {p.init.sha256: p.init.read() for p in runs if p.init is not None}

    def create(planned: PlannedRun) -> str:
        require_data(planned.data)
        assert planned.data.train is not None and planned.data.val is not None
        spec = Spec(
            run_id=planned.run.run_id,
            seed=planned.seed,
            virtual_ranks=planned.virtual_ranks,
            data=planned.data.url,
            train_digest=planned.data.train.digest,
            val_digest=planned.data.val.digest,
            init=_copy_start(planned, starts),
            modified=planned.point.resolved.modified,
            code=code,
            packages=packages,
            created=created,
        )
        return "" if planned.run.create(planned.recipe, spec) else _conflict(planned, spec)

    with ThreadPoolExecutor(READERS) as pool:
        conflicts = list(filter(None, pool.map(create, runs)))
    if conflicts:
        raise ConfigError("\n".join([*conflicts, "Nothing was queued. Ask for the same, or use another --runs."]))


def _conflict(planned: PlannedRun, spec: Spec) -> str:
    """Say in what a run that another submit has created differs from what is asked for; packages may differ."""
    stored = planned.run.spec()
    differing = [
        f"{name} is {theirs}, here {ours}"
        for name, theirs, ours in (
            ("data", stored.data, spec.data),
            ("the training shards' digest", stored.train_digest, spec.train_digest),
            ("the validation shards' digest", stored.val_digest, spec.val_digest),
            ("the SHA-256 of init.weights", stored.init and stored.init.sha256, spec.init and spec.init.sha256),
        )
        if theirs != ours
    ]
    try:  # the number was chosen without the one that the run has by now
        point = planned.point
        choose_virtual_ranks(planned.recipe, point.job, point.job_path, stored.virtual_ranks)
    except ConfigError as error:
        differing.append(f"it has {stored.virtual_ranks} virtual ranks, here {spec.virtual_ranks}: {error}")
    if not differing:
        return ""
    return f"{planned.run.run_id} was created by another submit meanwhile: {'; '.join(differing)}"


def _copy_start(planned: PlannedRun, contents: Mapping[str, bytes]) -> InitialWeights | None:
    """Copy the weights that a run starts from into its folder.

    An attempt that has no checkpoint to go on from must start from these and no others, on machines that may reach
    neither the source nor the hub.
    """
    found = planned.init
    if found is None:
        return None
    file = found.file.rpartition("/")[2]
    planned.run.store.make_private()
    planned.run.init.write_bytes(file, contents[found.sha256])
    return InitialWeights(
        source=found.source,
        file=file,
        sha256=found.sha256,
        architecture=planned.recipe.model.name,
        procedure=found.procedure,
    )


def submit_arrays(arrays: Sequence[Array]) -> list[Submission]:
    """Give arrays to their back ends, and note in each run that it was sent.

    Raises:
        SubmitError: The scheduler refused one, or what it took could not be noted. Those before it are queued, those
            after it are not handed over.
    """
    sent: list[Submission] = []
    for number, array in enumerate(arrays):
        queued = f"\n{number} of {len(arrays)} job arrays ({len(sent)} runs) are queued." if number else ""
        try:
            submissions = _submit(array)
        except SubmitError as error:
            raise SubmitError(f"{error}{queued}") from error
        with ThreadPoolExecutor(READERS) as pool:
            problems = list(pool.map(_note, array.runs, submissions))
        if any(problems):
            raise SubmitError(_not_noted(array, submissions, problems) + queued)
        sent += submissions
    return sent


def _submit(array: Array) -> list[Submission]:
    backend = backends.backend_of(array.job)
    backend.check_available(array.job)
    return backend.submit(array.job, array.tasks, array.folder, array.name)


def _note(run: Run, submission: Submission) -> str:
    """Note in a run that it was sent; return why that cannot be done, or an empty string."""
    problem = ""
    for wait_s in (0.0, *RECORD_RETRY_S):
        time.sleep(wait_s)
        try:
            run.add_submission(submission)
        except StorageError as error:
            problem = str(error)
        else:
            return ""
    return problem


def _not_noted(array: Array, submissions: Sequence[Submission], problems: Sequence[str]) -> str:
    lost = [s for s, problem in zip(submissions, problems, strict=True) if problem]
    named = [
        f"{submission.job_id} ({run.run_id})"
        for run, submission, problem in zip(array.runs, submissions, problems, strict=True)
        if problem
    ]
    by_hand = backends.backend_of(array.job).cancel_command(lost)
    return (
        f"back end {array.job.backend} has taken job {', '.join(named)}, but this could not be noted: "
        f"{next(filter(None, problems))}\nThe jobs will run, but 'status' and 'cancel' do not know them, and to submit "
        f"again would send them twice. End them before you do so:\n{by_hand}"
    )
