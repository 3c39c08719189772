"""One rank of one attempt: rendezvous, training, and an exit code that the scheduler understands."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import newer_version, read_record
from rsb_cluster.data.order import DRAWS
from rsb_cluster.errors import AccessError, MissingError, RsbError, StorageError
from rsb_cluster.node import starts
from rsb_cluster.node.exit_codes import EXIT_FAILED, EXIT_RESTART, EXIT_STOPPED
from rsb_cluster.node.interruption import Notice
from rsb_cluster.node.interruption_watch import NoticeWatch
from rsb_cluster.node.node_spec import COPY_LOGS
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.runs import gpu_hours, lease
from rsb_cluster.runs.lease import Lease
from rsb_cluster.runs.run import Attempt, Cause, Run, Spec, environment_changes
from rsb_cluster.storage.redact import redact
from rsb_cluster.storage.store import Store
from rsb_cluster.train.distributed import DeviceError, LostPeerError, ProcessGroup, is_lost_peer, is_nccl_error
from rsb_cluster.train.environment import describe_environment
from rsb_cluster.train.logfile import LogFile, logging_to
from rsb_cluster.train.result import write_result
from rsb_cluster.train.trackers import Trackers
from rsb_cluster.train.trainer import Trainer
from rsb_cluster.train.watchdog import StalledRank, Watchdog

log = logging.getLogger(__name__)

# How long a save that is being written may take when the watchdog ends the attempt, seconds.
FLUSH_S = 60.0

EXIT_CODES: dict[Cause, int] = {
    "preempted": EXIT_RESTART,
    "timed out": EXIT_RESTART,
    "lost peer": EXIT_RESTART,
    "crashed": EXIT_RESTART,
    "stuck": EXIT_RESTART,
    "failed": EXIT_FAILED,
    "stopped": EXIT_STOPPED,
    "superseded": EXIT_STOPPED,
}


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
    run = Run(Store(run_url), run_id)
    ranks = Ranks.from_environment()
    torch.set_num_threads(job.cpus_per_task)
    with logging_to(run.store, ranks) as log_file:
        if os.environ.get(COPY_LOGS):
            log_file.keep_copying()
        cause = _Attempt(run, job, ranks, flag, log_file, data).run()
        log.info("%s", cause)
    if cause != "finished":
        _exit(cause)


def _exit(cause: Cause) -> NoReturn:
    """Exit the process. Not by sys.exit, as the threads of a broken process group or of a slow save may never end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODES[cause])


class UnreachableError(RsbError):
    """The run's folder could not be read for a long time."""


class _Attempt:
    """An attempt, on one rank."""

    def __init__(self, run: Run, job: Job, ranks: Ranks, flag: StopFlag, log_file: LogFile, data: str = "") -> None:
        self._run, self._job, self._ranks, self._flag, self._log_file = run, job, ranks, flag, log_file
        self._data = data
        self._lease: Lease | None = None
        self._number = 0
        self._trainer: Trainer | None = None
        self._trackers: Trackers | None = None
        self._watchdog: Watchdog | None = None
        self._oom_kills = _oom_kills()

    def run(self) -> Cause:
        """Train, record the end, and return its cause. Raises nothing, as the cause determines the exit code."""
        message = ""
        try:
            cause = self._train()
        except Exception as error:
            # Frees the memory of the step: without memory, the threads that the steps below need cannot start.
            traceback.clear_frames(error.__traceback__)
            cause, message = self._explain(error)
            log.error("%s: %s", cause, message)
            self._try(self._report, cause, message, error)
            if self._watchdog is not None:
                # Under NCCL nothing else tells the other ranks; a rank that only lost a peer is no news to them.
                self._try(self._watchdog.close, "" if cause in ("lost peer", "superseded") else message)
            if self._trainer is not None and self._trainer.saver is not None and cause != "superseded":
                self._try(self._trainer.saver.close)
        self._try(self._record_end, cause, message)
        if self._trackers is not None:
            self._try(self._trackers.close, finished=cause == "finished")
        if cause == "lost peer":
            cause = self._resolve_lost_peer()
        if cause in ("failed", "stopped"):
            starts.record(starts.ENDED, self._ranks)
        return cause

    def _explain(self, error: Exception) -> tuple[Cause, str]:
        """Return the cause and the message of an exception; whether NCCL lost a peer, only the heartbeats tell."""
        if is_nccl_error(error) and not isinstance(error, torch.OutOfMemoryError) and self._watchdog is not None:
            if self._watchdog.find_lost():
                return "lost peer", f"lost a peer rank: {_classify(error)[1]}"
            return "crashed", (
                f"{_classify(error)[1]} All ranks are alive. If it is the network: set NCCL_SOCKET_IFNAME to the "
                "interface by which the nodes reach each other (ip addr), and NCCL_DEBUG=INFO to see what NCCL chose."
            )
        return _classify(error)

    def _try(self, action: Callable[..., object], *args: Any, **options: Any) -> None:
        """Do one step of the cleanup; its failure must not prevent the other steps."""
        try:
            action(*args, **options)
        except Exception:
            log.warning("at the end of the attempt:\n%s", traceback.format_exc())

    def _report(self, cause: Cause, message: str, error: Exception) -> None:
        """Report a failure for the user, the other ranks and later starts."""
        if not self._number:
            starts.report(self._run, self._ranks, message, is_cause=cause != "lost peer")
            if not isinstance(error, RsbError):
                log.error("%s", "".join(traceback.format_exception(error)))
        elif cause in ("crashed", "failed"):
            self._report_failure(cause, message, error)
        elif cause == "lost peer":
            self._report_lost_peers()

    def _train(self) -> Cause:
        spec, recipe = self._wait_for_storage(), self._run.recipe()
        if spec.draws > DRAWS:
            raise newer_version(self._run.store.locate("spec.json"), f"draws = {spec.draws}")
        spec = spec.model_copy(update={"data": self._data or spec.data})
        if self._run.result() is not None:
            log.info("this run has finished already; nothing to do")
            return "finished"
        lease.check_not_ended(self._run, self._ranks.job_id, self._ranks.restart)
        self._ranks = self._ranks.with_largest_world(spec.virtual_ranks)
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
        if group.rank == 0:
            self._lease = lease.acquire(self._run, self._draft(group))
            starts.record(starts.CLAIMED, self._ranks)
        self._number = int(group.broadcast("attempt number", str(self._lease.record.number) if self._lease else ""))
        self._log_file.name = f"logs/{self._number:04d}-rank{group.rank:05d}.log"
        log.info(
            "attempt %d, rank %d of %d on %s (%s)", self._number, group.rank, group.world_size, group.host, group.device
        )
        if self._job.notice and self._ranks.local_rank == 0:
            NoticeWatch(self._job.notice, self._flag, self._on_notice).start()
        if self._lease is not None:
            for change in environment_changes([*self._lease.earlier, self._lease.record]):
                log.warning("the environment has changed: %s", change)
            lease.check_history(self._lease, self._job)
            self._enforce_budget(self._lease)
            self._lease.keep_alive(self._current_step, self._flag.supersede)
        self._watchdog = Watchdog(
            group,
            stalled_s=self._job.watchdog_s,
            peer_timeout_s=self._job.peer_timeout_s,
            report=self._report_suspects,
            exit_rank=self._exit_by_watchdog,
        )
        self._watchdog.start()
        trainer = self._trainer = Trainer(
            self._run, spec, recipe, self._job, group, self._flag, self._watchdog, self._lease
        )
        if trainer.saver is not None and self._job.trackers:
            self._trackers = Trackers(self._job.trackers, self._run, recipe, trainer.saver.metrics, self._number)
        if self._lease is not None and trainer.progress.step != self._lease.record.start_step:
            self._write_record(start_step=trainer.progress.step)  # the newest checkpoint was damaged
        cause = trainer.train()
        if cause == "preempted" and self._run.is_cancelled(self._ranks.job_id):
            cause = "stopped"
        self._record_end(cause, trainer.message or (self._flag.reason if cause == self._flag.cause else ""))
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
            self._run.write_notice(self._number, socket.gethostname(), asdict(notice))
        except StorageError as error:
            log.warning("the interruption notice could not be recorded: %s", error)

    def _current_step(self) -> int:
        if self._trainer is not None:
            return self._trainer.progress.step
        return self._lease.record.start_step if self._lease else 0

    def _record_end(self, cause: Cause, message: str) -> None:
        """Record the end of the attempt, on rank 0."""
        if self._lease is None or self._lease.record.cause not in ("", "finished") or self._lease.record.cause == cause:
            return  # "finished" is overwritten if result.json could not be written
        self._lease.release()
        if cause in ("lost peer", "stuck", "superseded") and self._run.attempt(self._number).cause:
            return  # a peer has recorded it while this rank was unreachable or suspended, and knows more
        if cause == "lost peer":
            # The lost peer's own report explains more.
            for failure in self._run.rank_failures(self._number).values():
                cause, message = failure["cause"], failure["message"]
        cause, message = self._with_notices(cause, message)
        self._write_record(ended=time.time(), end_step=self._current_step(), cause=cause, message=message)

    def _with_notices(self, cause: Cause, message: str) -> tuple[Cause, str]:
        """Add the interruption notices of this attempt to its end; a peer lost after a notice was preempted."""
        if not self._job.notice or cause not in ("preempted", "lost peer"):
            return cause, message
        notices = [
            f"{notice['source']} reclaims {host} at {time.strftime('%H:%M:%S UTC', time.gmtime(notice['deadline']))}"
            for host, notice in self._run.notices(self._number).items()
        ]
        return ("preempted" if notices else cause), "; ".join([*notices, *filter(None, [message])])

    def _write_record(self, **update: Any) -> None:
        assert self._lease is not None
        self._lease.record = self._lease.record.model_copy(update=update)
        self._run.write_attempt(self._lease.record)

    def _record_end_for_rank_0(self, cause: Cause, message: str) -> None:
        """Record the end of the attempt in place of rank 0, which cannot."""
        record = self._run.attempt(self._number)
        if not record.cause:
            cause, message = self._with_notices(cause, message)
            # This rank's step, as all ranks are at the same step and rank 0's last heartbeat may be some steps old.
            update = {
                "ended": time.time(),
                "end_step": max(record.start_step, self._current_step()),
                "cause": cause,
                "message": message,
            }
            self._run.write_attempt(record.model_copy(update=update))

    def _resolve_lost_peer(self) -> Cause:
        """Return the cause with which another rank ended the attempt permanently, if one did; else "lost peer".

        Otherwise this rank's exit code would request a restart, which counts if each node has its own exit code.
        """
        with contextlib.suppress(StorageError):
            causes = [self._run.attempt(self._number).cause] if self._number else []
            causes += [failure["cause"] for failure in self._run.rank_failures(self._number).values()]
            return next((cause for cause in causes if cause in ("failed", "stopped")), "lost peer")
        return "lost peer"

    def _report_lost_peers(self) -> None:
        """Report the lost ranks that could not report their failure themselves."""
        if self._watchdog is None or self._run.rank_failures(self._number):
            return
        if self._ranks.rank and (self._watchdog.reaches_rank_0() or self._run.attempt(self._number).cause):
            return  # rank 0 reports it
        lost = self._watchdog.find_lost()
        self._record_suspects("lost peer", lost)
        if any(suspect.rank == 0 for suspect in lost):
            self._record_end_for_rank_0("lost peer", "; ".join(self._describe(suspect) for suspect in lost))

    def _record_suspects(self, cause: Cause, suspects: Sequence[StalledRank]) -> None:
        """Record the ranks that are the cause of an end, if they could not do so themselves."""
        known = self._run.rank_failures(self._number)
        for suspect in suspects:
            if suspect.rank not in known:
                message = self._describe(suspect)
                log.error("%s", message)
                failure = {"cause": cause, "message": message, "host": suspect.host, "traceback": redact(suspect.stack)}
                self._run.write_rank_failure(self._number, suspect.rank, failure)

    def _describe(self, suspect: StalledRank) -> str:
        if suspect.host == socket.gethostname() and _oom_kills() > self._oom_kills:
            return (
                f"{suspect.message}; the kernel killed a process on this host because it ran out of memory. Request "
                "more memory (job.mem_gb), or use fewer loader workers"
            )
        return suspect.message

    def _report_suspects(self, cause: Cause, suspects: Sequence[StalledRank]) -> None:
        """Record the ranks that ended the attempt; called by the watchdog on its own thread, as the main one waits."""
        with contextlib.suppress(StorageError):
            self._record_suspects(cause, suspects)
            message = "; ".join(map(self._describe, suspects))
            if self._lease is not None:
                self._record_end(cause, message)
            else:
                self._record_end_for_rank_0(cause, message)

    def _exit_by_watchdog(self, cause: Cause) -> None:
        """Exit in place of the main thread, which waits in a collective and may do so forever."""
        if self._trainer is not None and self._trainer.saver is not None:
            self._try(self._trainer.saver.flush, within_s=FLUSH_S)
        with contextlib.suppress(StorageError):
            self._log_file.copy()
        if cause == "lost peer":
            cause = self._resolve_lost_peer()
        if cause in ("failed", "stopped"):
            starts.record(starts.ENDED, self._ranks)
        _exit(cause)

    def _report_failure(self, cause: Cause, message: str, error: Exception) -> None:
        text = "".join(traceback.format_exception(error))
        log.error("%s", text)
        message = f"rank {self._ranks.rank}: {message}"
        failure = {"cause": cause, "message": message, "host": socket.gethostname(), "traceback": redact(text)}
        self._run.write_rank_failure(self._number, self._ranks.rank, failure)
        if self._lease is None:
            # Rank 0 may never notice the failure: under NCCL it waits for this rank until it is killed.
            self._record_end_for_rank_0(cause, message)


def _classify(error: BaseException) -> tuple[Cause, str]:
    """Return the cause of an attempt's end, and its message, for an exception."""
    text = redact(str(error)) or type(error).__name__
    if isinstance(error, lease.SupersededError):
        return "superseded", text
    if isinstance(error, gpu_hours.BudgetExceededError):
        return "stopped", text
    if isinstance(error, lease.EndedError):
        return error.cause, text
    if isinstance(error, DeviceError):
        return "crashed", text  # another host may have the GPUs
    if isinstance(error, LostPeerError) or is_lost_peer(error):
        return "lost peer", text
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _is_host_memory(error):
        return "failed", (
            f"out of memory: {text.splitlines()[0]} Submit with smaller micro-batches (more --virtual-ranks), or more "
            "host memory (--set job.mem_gb)."
        )
    if isinstance(error, StorageError) and not isinstance(error, AccessError):
        return "crashed", text  # may be a transient error of the network
    if isinstance(error, RsbError):
        return "failed", text
    return "crashed", f"{type(error).__name__}: {text}"


def _is_host_memory(error: BaseException) -> bool:
    """Whether torch ran out of host memory, for which it has no error class."""
    signs = (
        "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "std::bad_alloc",
        "can't start new thread",
    )  # fmt: skip
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _oom_kills() -> int:
    """Return the number of the kernel's OOM kills on this host since boot."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
