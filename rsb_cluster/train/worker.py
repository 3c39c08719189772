"""One rank of one attempt: rendezvous, training, and an exit code that the scheduler understands."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import newer_version, read_record
from rsb_cluster.data.global_batch import GlobalBatch
from rsb_cluster.data.order import DRAWS
from rsb_cluster.errors import AccessError, MissingError, RsbError, StorageError
from rsb_cluster.node import starts
from rsb_cluster.node.interruption import Notice
from rsb_cluster.node.interruption_watch import NoticeWatch
from rsb_cluster.node.node_spec import COPY_LOGS
from rsb_cluster.node.notify import State, notify
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.runs import gpu_hours, lease
from rsb_cluster.runs.lease import Lease
from rsb_cluster.runs.run import Attempt, Cause, Run, Spec, environment_changes
from rsb_cluster.runs.snapshot import write_summary
from rsb_cluster.storage.store import Store
from rsb_cluster.train.attempt_record import AttemptRecord
from rsb_cluster.train.causes import exit_with, explain_end
from rsb_cluster.train.determinism import set_determinism
from rsb_cluster.train.devices import DeviceError
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.environment import describe_environment
from rsb_cluster.train.input.decoder_process import DecoderServer
from rsb_cluster.train.logfile import LogFile, logging_to
from rsb_cluster.train.rehearsal import fit_micro_batch
from rsb_cluster.train.result import write_result
from rsb_cluster.train.trackers import Trackers
from rsb_cluster.train.trainer import Trainer
from rsb_cluster.train.watchdog import Watchdog

log = logging.getLogger(__name__)

# How long a save that is being written may take when the watchdog ends the attempt, seconds.
FLUSH_S = 60.0


def work(run_url: str, run_id: str, job_values: dict[str, Any], data: str, flag: StopFlag) -> None:
    """Train as one rank until the run is finished; otherwise exit the process.

    Args:
        run_url: The run's folder.
        run_id: The run.
        job_values: The job's fields.
        data: Where the run's data are now; empty: where its spec says.
        flag: The stop flag, already installed.
    """
    job = read_record(Job, job_values, "the submitted job")
    # While this process has no threads, no GPU and no connections.
    decoders = DecoderServer.start() if job.loader_workers and job.loader_processes else None
    run = Run(Store(run_url), run_id)
    ranks = Ranks.from_environment()
    torch.set_num_threads(job.cpus_per_task)
    with logging_to(run.store, ranks) as log_file:
        if os.environ.get(COPY_LOGS):
            log_file.keep_copying()
        cause = _Attempt(run, job, ranks, flag, log_file, data, decoders).run()
        log.info("%s", cause)
    if cause != "finished":
        exit_with(cause)


class UnreachableError(RsbError):
    """The run's folder could not be read for a long time."""


class _Attempt:
    """An attempt, on one rank."""

    def __init__(
        self,
        run: Run,
        job: Job,
        ranks: Ranks,
        flag: StopFlag,
        log_file: LogFile,
        data: str = "",
        decoders: DecoderServer | None = None,
    ) -> None:
        self._run, self._job, self._ranks, self._flag, self._log_file = run, job, ranks, flag, log_file
        self._data, self._decoders = data, decoders
        self._record = AttemptRecord(run, job, ranks)
        self._trainer: Trainer | None = None
        self._trackers: Trackers | None = None
        self._watchdog: Watchdog | None = None

    def run(self) -> Cause:
        """Train, record the end, and return its cause. Raises nothing, as the cause determines the exit code."""
        message = ""
        try:
            cause = self._train()
        except Exception as error:
            # Frees the memory of the step: without memory, the threads that the steps below need cannot start.
            traceback.clear_frames(error.__traceback__)
            cause, message = explain_end(error, self._watchdog, self._record.oom_kills)
            log.error("%s: %s", cause, message)
            self._try(self._report, cause, message, error)
            if self._watchdog is not None:
                # Under NCCL nothing else tells the other ranks; a rank that only lost a peer is no news to them.
                self._try(self._watchdog.close, "" if cause in ("lost peer", "superseded") else message)
            if self._trainer is not None and self._trainer.saver is not None and cause != "superseded":
                self._try(self._trainer.saver.close)
        self._try(self._record.end, cause, message)
        if self._record.lease is not None and cause != "superseded":
            self._try(write_summary, self._run)
        if self._trackers is not None:
            self._try(self._trackers.close, finished=cause == "finished")
        end = self._final_state(cause)
        if cause == "lost peer":
            cause = self._record.resolve_lost_peer()
        if cause in ("failed", "stopped"):
            starts.record(starts.ENDED, self._ranks)
        if end is not None:  # last of all, as this rank may be killed while it waits
            reason = self._record.lease.record.message if self._record.lease is not None else message
            notify(self._run, self._ranks, self._job.notify_command, end, reason or message)
        return cause

    def _final_state(self, cause: Cause) -> State | None:
        """Return the end of the run that the user is to be told; None for an end of this attempt alone."""
        if cause == "failed":  # this rank's own failure, or one that it has recorded: there may be no rank 0
            return "failed"
        if self._record.lease is None:
            return None
        if cause == "finished":
            return "finished"
        # With a message it is the budget; the user needs no word of what the user stopped.
        return "budget exceeded" if cause == "stopped" and self._record.lease.record.message else None

    def _try(self, action: Callable[..., object], *args: Any, **options: Any) -> None:
        """Do one step of the cleanup; its failure must not prevent the other steps."""
        try:
            action(*args, **options)
        except Exception:
            log.warning("at the end of the attempt:\n%s", traceback.format_exc())

    def _report(self, cause: Cause, message: str, error: Exception) -> None:
        """Report a failure for the user, the other ranks and later starts."""
        if not self._record.number:
            starts.report(
                self._run, self._ranks, message,
                is_cause=cause != "lost peer", host_fault=isinstance(error, DeviceError),
            )  # fmt: skip
            if not isinstance(error, RsbError):
                log.error("%s", "".join(traceback.format_exception(error)))
        elif cause in ("crashed", "failed"):
            self._record.report_failure(cause, message, error)
        elif cause == "lost peer" and self._watchdog is not None:
            self._record.report_lost_peers(self._watchdog)

    def _train(self) -> Cause:
        spec, recipe = self._wait_for_storage(), self._run.recipe()
        if spec.draws > DRAWS:
            raise newer_version(self._run.store.locate("spec.json"), f"draws = {spec.draws}")
        spec = spec.model_copy(update={"data": self._data or spec.data})
        set_determinism(recipe.train.deterministic)
        if self._run.result() is not None:
            log.info("this run has finished already; nothing to do")
            return "finished"
        lease.check_not_ended(self._run, self._ranks.job_id, self._ranks.restart)
        batch = GlobalBatch.of(recipe, spec.virtual_ranks, recomputes=self._job.gradient_checkpointing)
        self._ranks = self._record.ranks = self._ranks.sharing(batch)
        if self._ranks.is_idle:
            log.info("%d ranks share the virtual ranks; rank %d is idle", self._ranks.world_size, self._ranks.rank)
            ProcessGroup.wait_idle(self._ranks, self._run.store, wait_s=self._job.rendezvous_s)
            return "finished"
        group = ProcessGroup(
            self._ranks,
            self._run.store,
            wait_s=self._job.rendezvous_s,
            collective_s=self._job.collective_s,
            gpus=self._job.gpus_per_node,
        )
        parts = 1
        if group.device.type == "cuda":  # a host has no such error: the kernel ends the process
            images = batch.images_at_once(group.world_size)
            parts = fit_micro_batch(recipe, images, group, recompute=self._job.gradient_checkpointing)
        if group.rank == 0:
            self._record.lease = lease.acquire(self._run, self._draft(group))
            starts.record(starts.CLAIMED, self._ranks)
        claimed = self._record.lease
        number = int(group.broadcast("attempt number", str(claimed.record.number) if claimed is not None else ""))
        self._record.number = number
        self._log_file.name = f"logs/{number:04d}-rank{group.rank:05d}.log"
        log.info("attempt %d, rank %d of %d on %s (%s)", number, group.rank, group.world_size, group.host, group.device)
        if group.remark:
            starts.report(self._run, self._ranks, group.remark, host_fault=True)
        if self._job.notice and self._ranks.local_rank == 0:
            NoticeWatch(self._job.notice, self._flag, self._on_notice).start()
        if claimed is not None:
            for change in environment_changes([*claimed.earlier, claimed.record]):
                log.warning("the environment has changed: %s", change)
            lease.check_history(claimed, self._job)
            self._enforce_budget(claimed)
            claimed.keep_alive(self._record.step, self._flag.supersede, lambda why: self._flag.stop("stopped", why))
        self._watchdog = Watchdog(
            group,
            stalled_s=self._job.watchdog_s,
            peer_timeout_s=self._job.peer_timeout_s,
            report=self._record.report_suspects,
            exit_rank=self._exit_by_watchdog,
        )
        self._watchdog.start()
        trainer = self._trainer = Trainer(
            self._run, spec, recipe, self._job, group, self._flag, self._watchdog, claimed, self._decoders,
            parts,
        )  # fmt: skip
        self._record.progress = trainer.progress
        if trainer.saver is not None and self._job.trackers:
            self._trackers = Trackers(self._job.trackers, self._run, recipe, trainer.saver.metrics, number)
        if claimed is not None and trainer.progress.step != claimed.record.start_step:
            self._record.update(start_step=trainer.progress.step)  # the newest checkpoint was damaged
        cause = trainer.train()
        if cause == "preempted" and self._run.is_cancelled(self._ranks.job_id):
            cause = "stopped"
        self._record.end(cause, trainer.message or (self._flag.reason if cause == self._flag.cause else ""))
        if cause == "finished" and group.rank == 0:
            write_result(self._run, trainer)
        self._watchdog.close()
        group.exit_together()
        group.close()
        return cause

    def _wait_for_storage(self) -> Spec:
        """Read the spec, and wait if the storage fails: a start that fails here is not an attempt with limits."""
        deadline = time.monotonic() + self._job.rendezvous_s
        while True:
            try:
                return self._run.spec()
            except (AccessError, MissingError):
                raise
            except StorageError as error:
                if time.monotonic() > deadline:
                    raise UnreachableError(
                        f"the run's folder could not be read for {self._job.rendezvous_s} s: {error} "
                        "Submit the run again when it is readable."
                    ) from error
                log.warning("%s Retrying.", error)
                time.sleep(5.0)

    def _draft(self, group: ProcessGroup) -> Attempt:
        """Return the record of this attempt, without its number and start step."""
        return Attempt(
            number=0,
            job_id=self._ranks.job_id,
            restart=self._ranks.restart,
            world_size=group.world_size,
            hosts=tuple(dict.fromkeys(group.hosts)),
            gpus=self._ranks.allocated if group.device.type == "cuda" else 0,
            started=time.time(),
            start_step=0,
            environment=describe_environment(group),
        )

    def _enforce_budget(self, claimed: Lease) -> None:
        """Start a timer that sets this rank's stop flag when the run exceeds its GPU-hour budget.

        Raises:
            BudgetExceededError: The earlier attempts have exceeded it.
        """
        left_h = gpu_hours.check_budget(self._run, self._job, claimed.earlier)
        if self._job.max_gpu_hours:
            deadline = claimed.record.started + left_h * 3600 / gpu_hours.count_devices(claimed.record)
            reason = gpu_hours.budget_message(self._run, self._job.max_gpu_hours, self._job)
            timer = threading.Timer(max(0.0, deadline - time.time()), self._flag.stop, ("stopped", reason))
            timer.daemon = True
            timer.start()

    def _on_notice(self, notice: Notice) -> None:
        """Record the notice for rank 0, which writes the attempt's record, and for the user."""
        try:
            self._run.write_notice(self._record.number, socket.gethostname(), asdict(notice))
        except StorageError as error:
            log.warning("the interruption notice could not be recorded: %s", error)

    def _exit_by_watchdog(self, cause: Cause) -> None:
        """Exit in place of the main thread, which waits in a collective and may do so forever."""
        if self._trainer is not None and self._trainer.saver is not None:
            self._try(self._trainer.saver.flush, within_s=FLUSH_S)
        with contextlib.suppress(StorageError):
            self._log_file.copy()
        if cause == "lost peer":
            cause = self._record.resolve_lost_peer()
        if cause in ("failed", "stopped"):
            starts.record(starts.ENDED, self._ranks)
        exit_with(cause)
