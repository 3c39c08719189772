"""Carry out a plan: create the folders of its runs, then submit their jobs to the back ends."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from rsb_cluster import backends
from rsb_cluster.data.order import DRAWS
from rsb_cluster.errors import ConfigError, RefusedError, StorageError, SubmitError, plural
from rsb_cluster.runs import sharing
from rsb_cluster.runs.provenance import describe_code, describe_packages, save_diff
from rsb_cluster.runs.run import READERS, InitialWeights, Run, Spec, Submission
from rsb_cluster.runs.sweep import FOLDER, delete_sweep, write_sweep
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.data_location import require_data
from rsb_cluster.submission.job_arrays import Array
from rsb_cluster.submission.plan import Plan
from rsb_cluster.submission.planned_run import PlannedRun
from rsb_cluster.submission.resubmit import cancel_replaced

log = logging.getLogger(__name__)

# Ctrl-C, and what ends a process when its terminal or its connection does.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Waits before a failed write of a submission's record is retried, s: a job without a record cannot be cancelled by us.
RECORD_RETRY_S = (0.5, 1.0, 2.0, 4.0)


def submit(plan: Plan, *, with_diff: bool = False) -> list[Submission]:
    """Carry out a plan.

    Args:
        plan: The plan.
        with_diff: Also save the uncommitted changes of the code, once beside the runs.

    Raises:
        ConfigError: Another submit created one of the runs at the same time, with other inputs, or there is no checkout
            whose changes could be saved; nothing is queued.
        SubmitError: The scheduler refused an array; those before it are queued. Submit again for the rest. Or a job
            that is to be replaced has started meanwhile.
    """
    is_new_folder = not Store(plan.runs_url).exists()
    if with_diff:
        save_diff(Store(plan.runs_url))
    created = create_runs([p for p in plan.runs if p.state == "new"])
    for planned in plan.runs:
        if planned.point.job.share == "group":
            sharing.share_run(planned.run)
    is_new_sweep = plan.sweep is not None and write_sweep(plan.runs_url, plan.sweep)
    try:
        cancel_replaced(plan.runs)
        return submit_arrays(plan.arrays)
    except (RefusedError, ConfigError):
        with suppress(StorageError):  # the error that is being handled says more
            _leave_nothing(plan, created, is_new_sweep, is_new_folder)
        raise


def _leave_nothing(plan: Plan, created: Sequence[Run], is_new_sweep: bool, is_new_folder: bool) -> None:
    """Remove the runs of a refused submit that it created and that no job has, and its sweep if no run has one."""
    unsent = [run for run in created if not run.submissions() and not run.attempt_numbers()]
    for run in unsent:
        Store(run.runs_url).delete(run.run_id)
    if is_new_sweep and plan.sweep is not None and not any(p.run.exists() for p in plan.runs):
        delete_sweep(plan.runs_url, plan.sweep)
    folders = []
    for array in plan.arrays:
        if backends.backend_of(array.job).needs_object_store:
            continue
        if not any(s.folder.startswith(str(array.folder)) for run in array.runs for s in _submissions(run)):
            Store(array.folder.parent).delete(array.folder.name)
        folders += [array.folder.parent, array.folder.parent.parent]
    if is_new_folder and Store(plan.runs_url).is_local:
        folders += [Path(plan.runs_url, FOLDER), Path(plan.runs_url)]
        for folder in folders:
            with suppress(OSError):  # not empty, or not there
                folder.rmdir()


def _submissions(run: Run) -> list[Submission]:
    return run.submissions() if run.exists() else []


def create_runs(runs: Sequence[PlannedRun]) -> list[Run]:
    """Create the folders of new runs; a run that another submit created at the same time is kept as it is.

    Returns:
        Those that were created here.

    Raises:
        ConfigError: Such a run has other inputs than the plan.
        DataError: Shards are missing.
        StorageError: A folder cannot be written.
    """
    code, packages = describe_code(), describe_packages()
    now = time.time()
    weights = {p.init.sha256: p.init.read() for p in runs if p.init is not None}

    def create(planned: PlannedRun) -> str:
        require_data(planned.data)
        assert planned.data.train is not None and planned.data.val is not None
        planned.run.store.make_folder(sharing.mode_of(planned.point.job))
        spec = Spec(
            run_id=planned.run.run_id,
            seed=planned.seed,
            virtual_ranks=planned.virtual_ranks,
            data=planned.data.url,
            train_digest=planned.data.train.digest,
            val_digest=planned.data.val.digest,
            init=_copy_initial_weights(planned, weights),
            modified=planned.point.resolved.modified,
            code=code,
            packages=packages,
            created=now,
            draws=DRAWS,
        )
        if planned.run.create(planned.recipe, spec):
            created.append(planned.run)
            return ""
        return _conflict(planned, spec)

    created: list[Run] = []
    with ThreadPoolExecutor(READERS) as pool:
        conflicts = list(filter(None, pool.map(create, runs)))
    if conflicts:
        raise ConfigError(
            "\n".join([*conflicts, "Nothing was queued. Submit with the same inputs, or use another --runs."])
        )
    return created


def _conflict(planned: PlannedRun, spec: Spec) -> str:
    """Return how the inputs of a run that another submit created differ from the plan, or ""; packages may differ."""
    stored = planned.run.spec()
    differing = [
        f"{name} is {existing}, here {wanted}"
        for name, existing, wanted in (
            ("the training shards' digest", stored.train_digest, spec.train_digest),
            ("the validation shards' digest", stored.val_digest, spec.val_digest),
            ("the SHA-256 of init.weights", stored.init and stored.init.sha256, spec.init and spec.init.sha256),
        )
        if existing != wanted
    ]
    if not differing:
        return ""
    return f"{planned.run.run_id} was created by another submit at the same time: {'; '.join(differing)}"


def _copy_initial_weights(planned: PlannedRun, contents: Mapping[str, bytes]) -> InitialWeights | None:
    """Copy the initial weights of a run into its folder.

    Every attempt without a checkpoint must start from exactly these, on machines that may reach neither their source
    nor the Hugging Face Hub.
    """
    weights = planned.init
    if weights is None:
        return None
    file = weights.file.rpartition("/")[2]
    planned.run.init.write_bytes(file, contents[weights.sha256])
    return InitialWeights(
        source=weights.source,
        file=file,
        sha256=weights.sha256,
        architecture=planned.recipe.model.name,
        procedure=weights.procedure,
    )


def submit_arrays(arrays: Sequence[Array]) -> list[Submission]:
    """Submit arrays to their back ends, and record the submission in each run.

    Raises:
        RefusedError: The scheduler refused an array. Those before it are queued, those after it are not submitted.
        SubmitError: It did not say whether it took an array, or its submission could not be recorded, or Ctrl-C was
            pressed. Likewise.
    """
    submitted: list[Submission] = []
    for number, array in enumerate(arrays):
        queued = f"\n{number} of {len(arrays)} job arrays ({len(submitted)} runs) are queued." if number else ""
        if number:
            queued += " Once the reason is gone, the same command submits the rest."
        with _held_back() as interrupts:
            try:
                submissions = _submit(array)
            except SubmitError as error:
                raise type(error)(f"{error}{queued}") from error
            with ThreadPoolExecutor(READERS) as pool:
                problems = list(pool.map(_record, array.runs, submissions))
        if any(problems):
            raise SubmitError(_not_recorded(array, submissions, problems) + queued)
        submitted += submissions
        if interrupts:
            raise SubmitError(_interrupted(len(submitted), number + 1, len(arrays)))
    return submitted


@contextmanager
def _held_back() -> Iterator[list[int]]:
    """Hold back what would end this process between a job's submit and its record, which nobody would know then.

    A second Ctrl-C does end it.

    Yields:
        The signals that came.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def hold(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if came.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        with suppress(OSError):  # the terminal may be gone
            log.info("waiting for the scheduler's answer; with Ctrl-C again, a job may be queued that nobody knows ...")

    previous = {number: signal.getsignal(number) for number in _ENDING}
    held = [number for number, handler in previous.items() if handler is not signal.SIG_IGN]  # nohup ignores some
    for number in held:
        signal.signal(number, hold)
    try:
        yield came
    finally:
        for number in held:
            signal.signal(number, previous[number])


def _interrupted(runs: int, arrays: int, of: int) -> str:
    """Return what became of a submit that was interrupted after some of its arrays."""
    rest = "" if arrays == of else f" {arrays} of {of} job arrays are queued; the same command submits the rest."
    return f"interrupted after {plural(runs, 'run')} had been submitted: 'rsb-cluster cancel' ends them.{rest}"


def _submit(array: Array) -> list[Submission]:
    backend = backends.backend_of(array.job)
    backend.check_available(array.job)
    try:
        with sharing.umask_of(array.job):
            return backend.submit(array.job, array.tasks, array.folder, array.name)
    except OSError as error:
        raise SubmitError(
            f"cannot write scripts and logs to {array.folder}: {error.strerror}. Name another folder: --set "
            "job.submissions=FOLDER."
        ) from error


def _record(run: Run, submission: Submission) -> str:
    """Record a submission in its run; return why that failed, or an empty string."""
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


def _not_recorded(array: Array, submissions: Sequence[Submission], problems: Sequence[str]) -> str:
    lost = [(run, s) for run, s, problem in zip(array.runs, submissions, problems, strict=True) if problem]
    jobs = ", ".join(f"{submission.job_id} ({run.run_id})" for run, submission in lost)
    command = backends.backend_of(array.job).cancel_command([submission for _, submission in lost])
    return (
        f"back end {array.job.backend} accepted job {jobs}, but the submission could not be recorded: "
        f"{next(filter(None, problems))}\nThe jobs will run, but 'status' and 'cancel' cannot find them, and another "
        f"submit would queue them a second time. Cancel them first:\n{command}"
    )
