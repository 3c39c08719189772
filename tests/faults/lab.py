"""Attempts of a run in this process, from the shards to the record of how they ended: all of a rank but its exit."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from rsb_cluster.config.catalog import load_job, load_recipe
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.data.index import load_index
from rsb_cluster.data.sources import DataSource, open_set
from rsb_cluster.data.subset import choose_classes
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.runs.run import Attempt, Cause, Run, Spec
from rsb_cluster.storage.store import Store
from rsb_cluster.train import worker
from rsb_cluster.train.logfile import logging_to

# 18 steps of some 10 ms: the machinery, and nothing else. In an epoch: 96 // 16.
TINY = (
    "model.name=test_resnet", "data.train_samples=96", "data.val_samples=32", "data.shuffle_samples=30",
    "augment.resolution=16", "eval.resolution=16", "schedule.epochs=3", "schedule.warmup_epochs=1",
    "eval.every_epochs=1", "train.global_batch=16",
)  # fmt: skip
SAMPLES = {"train": 96, "val": 32}
STEPS = 18
PACE = ("log_every_steps=1", "checkpoint.every_steps=3")


def few_digits() -> dict[str, DataSource]:
    """As many of scikit-learn's digits as are needed."""
    return {name: dataclasses.replace(s, entries=s.entries[: SAMPLES[name]]) for name, s in open_set("digits").items()}


def fill(disk: Path) -> None:
    """Write a file ``filler`` until there is no room for more."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()


class Killed(BaseException):
    """Raised where a rank is to be killed: no handler of its own has a say."""


class StopAfter(StopFlag):
    """Is set when it has been asked so many times: once a step, and once a batch of an evaluation."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._left = times

    def to_vector(self) -> list[float]:
        self._left -= 1
        if self._left == 0:
            self.cause = "preempted"
        return super().to_vector()


class AtStep(StopFlag):
    """Does something when a run has made so many steps; never stops it.

    Args:
        actions: What to do, by the number of questions to the flag: one a step, and one a batch of an evaluation.
    """

    def __init__(self, actions: Mapping[int, Callable[[], object]]) -> None:
        super().__init__()
        self._asked, self._actions = 0, actions

    def to_vector(self) -> list[float]:
        self._asked += 1
        self._actions.get(self._asked, lambda: None)()
        return super().to_vector()


def new_run(folder: str | Path, data: str | Path, *assignments: str, recipe: str = "digits") -> Run:
    """A run of a recipe that was never started, with four virtual ranks."""
    store = Store(folder)
    found = load_recipe(recipe, overrides=parse_overrides(assignments)).recipe
    digests = {
        name: choose_classes(load_index(Store(data).child(name)), found.data.classes, name).digest for name in SAMPLES
    }
    spec = Spec(
        run_id=store.url.rsplit("/", 1)[1], seed=0, virtual_ranks=found.train.virtual_ranks, data=Store(data).url,
        train_digest=digests["train"], val_digest=digests["val"],
    )  # fmt: skip
    run = Run(store, spec.run_id)
    run.create(found, spec)
    return run


class Lab:
    """One run.

    Args:
        folder: The run's, local or on S3.
        data: Its shards'.
        assignments: To the recipe's fields.
    """

    def __init__(self, folder: str | Path, data: str | Path, *assignments: str) -> None:
        self._train(new_run(folder, data, *TINY, *assignments))

    @staticmethod
    def of(folder: str | Path, data: str | Path, recipe: str, *assignments: str) -> Lab:
        """One run of a recipe as it is, and not of the few digits."""
        lab = Lab.__new__(Lab)
        lab._train(new_run(folder, data, *assignments, recipe=recipe))
        return lab

    def _train(self, run: Run) -> None:
        self.run, self.store = run, run.store
        self.job, _ = load_job("local", overrides=parse_overrides(list(PACE)))
        self._job_id, self._starts = 0, -1

    def resubmit(self) -> None:
        """Let what follows be the starts of another job, as after a submit by the user."""
        self._job_id, self._starts = self._job_id + 1, -1

    def attempt(self, flag: StopFlag | None = None) -> Attempt:
        """Start the run once, and return how that ended."""
        self.start(flag)
        return self.run.attempts()[-1]

    def start(self, flag: StopFlag | None = None) -> Cause:
        """Start the run once, and return the cause that its rank ends with. `Killed` ends it as SIGKILL would."""
        torch.set_num_threads(1)  # as many as the job's cpus_per_task
        self._starts += 1
        ranks = Ranks(0, 0, world_size=1, job_id=f"lab{self._job_id}", restart=self._starts, allocated=1)
        with logging_to(self.store, ranks) as log_file:
            attempt = worker._Attempt(self.run, self.job, ranks, flag or StopFlag(), log_file)
            try:
                return attempt.run()
            except Killed as killed:
                # Its threads would go with it: those of the loader end with the frames that hold it.
                traceback.clear_frames(killed.__traceback__)
                assert attempt._record.lease is not None and attempt._watchdog is not None
                attempt._record.lease.release()
                attempt._watchdog.close()
                raise

    @property
    def checkpoints(self) -> Store:
        return self.store.child("checkpoints")
