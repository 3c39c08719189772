"""One rank of one attempt: meet the others, train, and end in the way that the scheduler understands."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rsb_cluster.cost import cost, spans
from rsb_cluster.errors import RsbError, StorageError
from rsb_cluster.exits import EXIT_AGAIN, EXIT_FAILED, EXIT_STOPPED
from rsb_cluster.job import Job
from rsb_cluster.metrics import MetricsWriter
from rsb_cluster.recipe import validate
from rsb_cluster.run import Attempt, Cause, Run
from rsb_cluster.storage import Store, redact
from rsb_cluster.train.distributed import Group, LostPeerError, Ranks, is_lost_peer
from rsb_cluster.train.stopping import StopFlag
from rsb_cluster.train.trainer import Trainer

log = logging.getLogger(__name__)

EXIT_OF: dict[Cause, int] = {
    "preempted": EXIT_AGAIN,
    "timed out": EXIT_AGAIN,
    "lost peer": EXIT_AGAIN,
    "crashed": EXIT_AGAIN,
    "failed": EXIT_FAILED,
    "stopped": EXIT_STOPPED,
}

# Slurm may send the signal ahead of a time limit up to 60 s early (sbatch --signal); the rest is for Python's start.
SIGNAL_SLACK_S = 90


class _CrashLoopError(RsbError):
    """The last attempts crashed without a new step."""


def work(run_url: str, run_id: str, job_values: dict[str, Any]) -> None:
    """Train as one rank until the run is finished. Any other end leaves the process.

    Args:
        run_url: The run's folder.
        run_id: The run.
        job_values: The job's fields.
    """
    job = validate(Job, job_values, "the submitted job")
    flag = StopFlag(limit_s=job.time_min * 60 - job.signal_delay_s - SIGNAL_SLACK_S)
    flag.install()
    run = Run(Store(run_url), run_id)
    ranks = Ranks.from_environment()
    torch.set_num_threads(job.cpus_per_task)
    with _logging(run.store, ranks) as log_file:
        cause = _Attempt(run, job, ranks, flag, log_file).run()
        log.info("%s", cause)
    if cause != "finished":
        # Not sys.exit: the threads of a broken process group may never end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_OF[cause])


class _Attempt:
    """An attempt, seen from one rank."""

    def __init__(self, run: Run, job: Job, ranks: Ranks, flag: StopFlag, log_file: _LogFile) -> None:
        self._run, self._job, self._ranks, self._flag, self._log_file = run, job, ranks, flag, log_file
        self._record: Attempt | None = None
        self._number = 0
        self._trainer: Trainer | None = None

    def run(self) -> Cause:
        """Train, and note how it ended."""
        try:
            cause = self._train()
            message = ""
        except Exception as error:
            cause, message = _classify(error)
            log.error("%s: %s", cause, message)
            if cause in ("crashed", "failed"):
                self._report_failure(cause, message, error)
            if self._trainer is not None and self._trainer.saver is not None:
                self._trainer.saver.close()
        with contextlib.suppress(StorageError):
            self._close(cause, message)
        return cause

    def _train(self) -> Cause:
        spec, recipe = self._run.spec(), self._run.recipe()
        if self._run.result() is not None:
            log.info("this run has finished already; nothing to do")
            return "finished"
        group = Group(self._ranks, self._run.store, wait_s=self._job.rendezvous_s, collective_s=self._job.collective_s)
        previous = self._run.attempts() if group.rank == 0 else []
        self._number = int(group.share("attempt number", str(previous[-1].number + 1 if previous else 1)))
        self._log_file.name = f"logs/{self._number:04d}-rank{group.rank:05d}.log"
        log.info(
            "attempt %d, rank %d of %d on %s (%s)", self._number, group.rank, group.world_size, group.host, group.device
        )
        metrics = MetricsWriter(self._run.store, self._number)
        trainer = self._trainer = Trainer(self._run, spec, recipe, self._job, group, self._flag, metrics)
        if group.rank == 0:
            self._begin(group, trainer.progress.step, previous)
        cause = trainer.train()
        if cause == "preempted" and self._run.is_cancelled(self._ranks.job_id):
            cause = "stopped"
        self._close(cause, "")
        if cause == "finished" and group.rank == 0:
            self._write_result(trainer)
        group.leave_together()
        group.close()
        return cause

    def _begin(self, group: Group, start_step: int, previous: list[Attempt]) -> None:
        gpus = group.world_size if group.device.type == "cuda" else 0
        self._record = Attempt(
            number=self._number,
            job_id=self._ranks.job_id,
            restart=self._ranks.restart,
            world_size=group.world_size,
            hosts=tuple(dict.fromkeys(group.hosts)),
            gpus=gpus,
            started=time.time(),
            start_step=start_step,
        )
        self._run.write_attempt(self._record)
        last = previous[-2:]
        if len(last) == 2 and all(a.cause in ("crashed", "lost peer") and a.start_step == start_step for a in last):
            raise _CrashLoopError(
                f"the last two attempts crashed without one new step after step {start_step} ({last[-1].message}). "
                "Mend the cause ('rsb-cluster logs'), then submit the run again."
            )

    def _close(self, cause: Cause, message: str) -> None:
        if self._record is None or self._record.cause:
            return
        step = self._trainer.progress.step if self._trainer else self._record.start_step
        if cause == "lost peer":
            # What the lost peer said itself is the better explanation.
            for rank, failure in self._run.rank_failures(self._number).items():
                cause, message = failure["cause"], f"rank {rank}: {failure['message']}"
        self._record = self._record.model_copy(
            update={"ended": time.time(), "end_step": step, "cause": cause, "message": message}
        )
        self._run.write_attempt(self._record)

    def _report_failure(self, cause: Cause, message: str, error: BaseException) -> None:
        text = io.StringIO()
        traceback.print_exception(error, file=text)
        log.error("%s", text.getvalue())
        report = {
            "cause": cause,
            "message": message,
            "traceback": redact(text.getvalue()),
            "host": socket.gethostname(),
        }
        with contextlib.suppress(StorageError):
            self._run.store.write_json(f"attempts/{self._number:04d}-rank{self._ranks.rank:05d}.json", report)

    def _write_result(self, trainer: Trainer) -> None:
        """Write the last of all files: it makes the run a finished one."""
        recipe, spec = trainer.recipe, trainer.spec
        spent = cost(spans(self._run))
        images = recipe.total_steps * recipe.train.global_batch
        score = trainer.scores[""]
        result: dict[str, Any] = {
            "run_id": spec.run_id,
            "recipe": recipe.name,
            "model": recipe.model.name,
            "seed": spec.seed,
            "steps": recipe.total_steps,
            "epochs": recipe.schedule.epochs,
            "top1": score.top1,
            "top5": score.top5,
            "loss": score.loss,
            "samples": score.samples,
            "modified": spec.modified,
            **asdict(spent),
            "train_s": trainer.progress.train_s,
            "images_per_s": images / max(trainer.progress.train_s, 1e-9),
            "goodput": min(1.0, trainer.progress.train_s / max(spent.wall_s, 1e-9)),
            "finished": time.time(),
            # So that a table of ten thousand runs reads one file of each.
            "science": {"recipe": recipe.model_dump(mode="json"), "spec": spec.brief().model_dump(mode="json")},
        }
        if "ema_" in trainer.scores:
            ema = trainer.scores["ema_"]
            result["ema"] = {"top1": ema.top1, "top5": ema.top5, "loss": ema.loss}
        self._run.store.write_json("result.json", result)


def _classify(error: BaseException) -> tuple[Cause, str]:
    """Say what an exception means for the run: go on elsewhere, try once more, or end it."""
    text = redact(str(error)) or type(error).__name__
    if isinstance(error, LostPeerError) or is_lost_peer(error):
        return "lost peer", text
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "failed", (
            f"out of memory: {text.splitlines()[0]} A smaller micro-batch needs less: submit with more "
            "--virtual-ranks, or a larger --set job.mem_gb."
        )
    if isinstance(error, StorageError):
        return "crashed", text  # a network that fails for a while deserves another attempt
    if isinstance(error, RsbError):
        return "failed", text
    return "crashed", f"{type(error).__name__}: {text}"


class _LogFile:
    """Where a rank's log goes: straight into the run's folder, or to a local file that is copied there."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.name = ""
        self.path = Path(tempfile.mkstemp(prefix="rsb-", suffix=".log")[1])

    def copy(self) -> None:
        if self.name:
            self._store.write_bytes(self.name, self.path.read_bytes())
        self.path.unlink()


@contextlib.contextmanager
def _logging(store: Store, ranks: Ranks) -> Iterator[_LogFile]:
    """Log to standard error, which the scheduler keeps while we run, and to a file that goes to the run's folder."""
    log_file = _LogFile(store)
    formatter = logging.Formatter(
        f"%(asctime)s %(levelname).1s rank{ranks.rank} %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
    )
    handlers: list[logging.Handler] = [logging.StreamHandler(), logging.FileHandler(log_file.path)]
    root = logging.getLogger("rsb_cluster")
    root.setLevel(logging.INFO)
    root.propagate = False
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    warnings.filterwarnings("ignore", message=".*Palette images with Transparency.*")
    try:
        yield log_file
    finally:
        for handler in handlers:
            handler.flush()
            root.removeHandler(handler)
        handlers[1].close()
        try:
            log_file.copy()
        except StorageError as error:
            sys.stderr.write(f"could not keep the log: {error}\n")
