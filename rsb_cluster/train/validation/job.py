"""One rank of one attempt of an evaluation that was submitted as a job.

It behaves to the scheduler as a training does: the exit codes, the records of attempts and of failed starts, and the
lease are the same. A preempted job starts the request again at which it was interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import traceback
from typing import Any

import torch

from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import read_record
from rsb_cluster.errors import StorageError
from rsb_cluster.evaluation.jobs import EvaluationJob, count_done, read_job, read_result, write_done, write_result
from rsb_cluster.node import starts
from rsb_cluster.node.node_spec import COPY_LOGS
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.runs import lease
from rsb_cluster.runs.lease import Lease
from rsb_cluster.runs.run import Attempt, Cause, Run
from rsb_cluster.runs.snapshot import write_summary
from rsb_cluster.storage.redact import redact
from rsb_cluster.storage.store import Store
from rsb_cluster.train.causes import classify, exit_with
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.environment import describe_environment
from rsb_cluster.train.logfile import LogFile, logging_to
from rsb_cluster.train.validation.evaluator import evaluate_sources
from rsb_cluster.train.validation.validate import EvaluationStopped

log = logging.getLogger(__name__)


def work(run_url: str, run_id: str, job_values: dict[str, Any], data: str, flag: StopFlag) -> None:
    """Evaluate as one rank until all is evaluated; otherwise exit the process.

    Args:
        run_url: The folder of the evaluation.
        run_id: Its id.
        job_values: The job's fields.
        data: Not used: the requests say where the data are.
        flag: The stop flag, already installed.
    """
    job = read_record(Job, job_values, "the submitted job")
    run, ranks = Run(Store(run_url), run_id), Ranks.from_environment()
    torch.set_num_threads(job.cpus_per_task)
    with logging_to(run.store, ranks) as log_file:
        if os.environ.get(COPY_LOGS):
            log_file.keep_copying()
        cause = EvaluationAttempt(run, job, ranks, flag, log_file).run()
        log.info("%s", cause)
    if cause != "finished":
        exit_with(cause)


class EvaluationAttempt:
    """An attempt of an evaluation, on one rank.

    Args:
        run: The folder of the evaluation.
        job: Where it runs.
        ranks: The place of this process.
        flag: Set when the rank is to stop.
        log_file: The rank's log.
    """

    def __init__(self, run: Run, job: Job, ranks: Ranks, flag: StopFlag, log_file: LogFile) -> None:
        self._run, self._job, self._ranks, self._flag, self._log_file = run, job, ranks, flag, log_file
        self._lease: Lease | None = None
        self._number = 0
        self._images = 0  # evaluated so far, for the heartbeat

    def run(self) -> Cause:
        """Evaluate, record the end, and return its cause. Raises nothing, as the cause determines the exit code."""
        message = ""
        try:
            cause = self._evaluate()
        except EvaluationStopped as stopped:
            cause, message = stopped.cause, self._flag.reason
            if cause == "preempted" and self._run.is_cancelled(self._ranks.job_id):
                cause = "stopped"
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            cause, message = classify(error)
            log.error("%s: %s", cause, message)
            with contextlib.suppress(StorageError):
                self._report(cause, message, error)
        if self._lease is not None:
            self._lease.release()
            self._record_end(cause, message)
        if cause == "lost peer" and self._number and self._run.attempt(self._number).cause == "failed":
            cause = "failed"  # the lost peer has said why
        if cause in ("failed", "stopped"):
            starts.record(starts.ENDED, self._ranks)
        return cause

    def _evaluate(self) -> Cause:
        spec = read_job(self._run)
        if read_result(self._run) is not None:
            log.info("this evaluation has finished already; nothing to do")
            return "finished"
        lease.check_not_ended(self._run, self._ranks.job_id, self._ranks.restart)
        group = ProcessGroup(
            self._ranks,
            self._run.store,
            wait_s=self._job.rendezvous_s,
            collective_s=self._job.collective_s,
            gpus=self._job.gpus_per_node,
        )
        done = 0
        if group.rank == 0:
            done = count_done(self._run)
            self._claim(group, done)
        said = group.broadcast("evaluation attempt", f"{self._lease.record.number} {done}" if self._lease else "")
        self._number, done = map(int, said.split())
        self._images = spec.images * done // len(spec.requests)
        self._log_file.name = f"logs/{self._number:04d}-rank{group.rank:05d}.log"
        log.info("attempt %d, rank %d of %d on %s", self._number, group.rank, group.world_size, group.host)
        for number in range(done, len(spec.requests)):
            self._evaluate_one(spec, number, group)
        if group.rank == 0:
            write_result(self._run, len(spec.requests))
        group.exit_together()
        group.close()
        return "finished"

    def _claim(self, group: ProcessGroup, done: int) -> None:
        """Claim the attempt. Its ``start_step`` is the number of requests that are done, by which progress is seen."""
        draft = Attempt(
            number=0,
            job_id=self._ranks.job_id,
            restart=self._ranks.restart,
            world_size=group.world_size,
            hosts=tuple(dict.fromkeys(group.hosts)),
            gpus=group.world_size if group.device.type == "cuda" else 0,
            started=time.time(),
            start_step=0,
            environment=describe_environment(group),
        )
        self._lease = lease.acquire(self._run, draft)
        self._number = self._lease.record.number
        self._lease.record = self._lease.record.model_copy(update={"start_step": done})
        self._run.write_attempt(self._lease.record)
        starts.record(starts.CLAIMED, self._ranks)
        lease.check_history(self._lease, self._job)
        self._lease.keep_alive(lambda: self._images, self._flag.supersede)

    def _evaluate_one(self, spec: EvaluationJob, number: int, group: ProcessGroup) -> None:
        def progress(done: int, total: int) -> None:
            self._images = before + done * group.world_size

        def agree() -> Cause | None:
            vector = torch.tensor(self._flag.to_vector(), device=group.device)
            return self._flag.agree(group.sum_(vector).tolist())

        before, asked = self._images, spec.requests[number]
        workers = asked.workers or self._job.loader_workers or self._job.cpus_per_task
        request = asked.model_copy(update={"workers": workers})
        for evaluation in evaluate_sources(request, group, progress=progress, agree=agree):
            self._images = before + evaluation.samples
            log.info("%s on %s: %s %s", spec.weights, spec.data[number], evaluation.metric, evaluation.value)
            if group.rank == 0:
                write_done(self._run, number, evaluation)

    def _report(self, cause: Cause, message: str, error: Exception) -> None:
        """Report a failure to the user and to later starts."""
        text = "".join(traceback.format_exception(error))
        if not self._number:
            starts.report(self._run, self._ranks, message, is_cause=cause != "lost peer")
        elif cause in ("crashed", "failed"):
            message = f"rank {self._ranks.rank}: {message}"
            failure = {"cause": cause, "message": message, "host": socket.gethostname(), "traceback": redact(text)}
            self._run.write_rank_failure(self._number, self._ranks.rank, failure)
            if self._lease is None:  # rank 0 may be killed while it waits for this one
                self._write_end(self._run.attempt(self._number), cause, message)
        if cause != "lost peer":
            log.error("%s", text)

    def _record_end(self, cause: Cause, message: str) -> None:
        """Record the end of the attempt, on rank 0; a peer that was lost may have recorded why."""
        assert self._lease is not None
        with contextlib.suppress(StorageError):
            if cause == "lost peer" and self._run.attempt(self._lease.record.number).cause:
                return
            self._write_end(self._lease.record, cause, message)
            write_summary(self._run)

    def _write_end(self, record: Attempt, cause: Cause, message: str) -> None:
        end = {"ended": time.time(), "end_step": count_done(self._run), "cause": cause, "message": message}
        self._run.write_attempt(record.model_copy(update=end))
