"""Submitting: write what makes the runs of a plan exist, then hand them to the back end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from rsb_cluster import scheduler
from rsb_cluster.dataset import require
from rsb_cluster.errors import SubmitError
from rsb_cluster.plan import Array, Plan, PlannedRun
from rsb_cluster.run import READERS, InitialWeights, Spec, Submission, describe_code, describe_packages
from rsb_cluster.sweep import sweep_ids, write_sweep


def submit(made: Plan) -> list[Submission]:
    """Carry a plan out.

    Raises:
        SubmitError: The scheduler refused an array; those before it are queued, and submitting again sends the rest.
    """
    create_runs([p for p in made.runs if p.state == "new"])
    if made.sweep is not None and made.sweep.sweep_id not in sweep_ids(made.runs_url):
        write_sweep(made.runs_url, made.sweep)  # sent again, it began with its first submit
    return hand_over(made.arrays)


def create_runs(runs: Sequence[PlannedRun]) -> None:
    """Write what makes runs exist.

    Raises:
        DataError: Shards are missing.
        StorageError: A folder cannot be written.
    """
    code, packages = describe_code(), describe_packages()
    created = time.time()
    starts = {p.init.sha256: p.init.read() for p in runs if p.init is not None}

    def create(planned: PlannedRun) -> None:
        require(planned.data)
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
        planned.run.create(planned.recipe, spec)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(create, runs))


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


def hand_over(arrays: Sequence[Array]) -> list[Submission]:
    """Give arrays to their back ends, and note in each run that it was sent.

    Raises:
        SubmitError: The scheduler refused one; those before it are queued.
    """
    sent: list[Submission] = []
    for number, array in enumerate(arrays):
        try:
            submissions = scheduler.launch(array.job, array.tasks, array.folder, array.name)
        except SubmitError as error:
            if not number:
                raise
            queued = f"{number} of {len(arrays)} job arrays ({len(sent)} runs) are queued."
            raise SubmitError(f"{error}\n{queued}") from error
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda pair: pair[0].add_submission(pair[1]), zip(array.runs, submissions, strict=True)))
        sent += submissions
    return sent
