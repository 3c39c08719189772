"""What Slurm says of jobs: their states in the queue, and how they ended where accounting knows."""

from __future__ import annotations

import os
import pwd
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from rsb_cluster.backends.base import JobStatus, State
from rsb_cluster.backends.slurm.programs import on_cluster, output, run
from rsb_cluster.backends.slurm.script import SCRIPT
from rsb_cluster.errors import SubmitError
from rsb_cluster.runs.run import Submission

# Somebody who looks needs no newer answer, and a site's controller has other users.
LOOK_S = 30.0
SACCT_S = 10.0

# Slurm's states of jobs that are not running.
_STATE_OF: dict[str, State] = {
    "PENDING": "queued", "CONFIGURING": "queued", "REQUEUED": "queued", "REQUEUE_HOLD": "queued",
    "REQUEUE_FED": "queued", "SPECIAL_EXIT": "queued", "RESV_DEL_HOLD": "queued", "SUSPENDED": "queued",
}  # fmt: skip
# States of jobs that have ended: squeue tells of them, too, where a site's wrapper asks for all.
_OVER = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
    "LAUNCH_FAILED", "RECONFIG_FAIL",
)  # fmt: skip

# id, id of the array's task, state, reason, user, time of the submit, name, script; the last may hold any character
_FORMAT = "%i|%F_%K|%T|%r|%u|%V|%j|%o"
# A number is given to another job only after a very long time, or when a cluster is set up anew; clocks differ by less.
_CLOCKS_DIFFER_S = 86_400.0

# Why a job that is no longer in the queue has ended, where its ranks may not have known.
_ENDS = ("OUT_OF_MEMORY", "NODE_FAIL", "TIMEOUT", "CANCELLED", "BOOT_FAIL", "DEADLINE", "LAUNCH_FAILED")
# What accounting may still say of a job that has just left the queue.
_ACTIVE = ("RUNNING", "COMPLETING", "RESIZING", *_STATE_OF)


@dataclass(frozen=True)
class QueuedJob:
    """A line of squeue.

    Attributes:
        reason: Why it is pending.
        submitted: Unix time of the submit, or of the last requeue; 0 if unknown.
        script: Path of the script.
    """

    state: str
    reason: str
    user: str
    submitted: float
    name: str
    script: str

    @property
    def is_queued(self) -> bool:
        """Whether the job waits to be started."""
        return _STATE_OF.get(self.state) == "queued"

    def is_of(self, submission: Submission) -> bool:
        """Whether this is the submitted job, and not another one that has its number by now.

        A script of another name may be a copy that a site's wrapper submitted.
        """
        path = f"{submission.folder.rstrip('/')}/{SCRIPT}"
        return (
            self.user == (submission.user or self.user)
            and self.name == (submission.name or self.name)
            and (not submission.user or self.script == path or not self.script.endswith(f"/{SCRIPT}"))
            and (not self.submitted or self.submitted >= submission.time - _CLOCKS_DIFFER_S)
        )


def this_user() -> str:
    """Return the user that Slurm knows this process by; empty if the system has no name for it."""
    try:  # and not from USER, which a shell may have inherited from another user's
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""


@dataclass(frozen=True)
class _Answer:
    """An answer of squeue: the jobs that it was asked for, and those that it knows."""

    at: float
    asked: frozenset[str]
    jobs: dict[str, QueuedJob]


class Queue:
    """Slurm's queues, one per cluster; an answer is kept for those who only look."""

    def __init__(self) -> None:
        self._answers: dict[str, _Answer] = {}
        self._ends: dict[tuple[str, str], str] = {}  # Slurm's states; empty where accounting knows no such job
        self._has_accounting = True

    def find(self, submissions: Sequence[Submission], *, fresh: bool) -> list[QueuedJob | None]:
        """Return the job of each submission; None for one that is not in the queue.

        Args:
            submissions: The submissions; one squeue for all of a cluster.
            fresh: Ask now; else an answer of the last half minute is used for jobs that it was asked for.

        Raises:
            SubmitError: squeue does not answer.
        """
        answers = {
            cluster: self._ask(cluster, {s.job_id.split("_")[0] for s in group}, fresh=fresh)
            for cluster, group in by_cluster(submissions).items()
        }
        found = [answers[submission.cluster].jobs.get(submission.job_id) for submission in submissions]
        return [job if job and job.is_of(s) else None for job, s in zip(found, submissions, strict=True)]

    def query(self, submissions: Sequence[Submission], *, fresh: bool) -> list[JobStatus]:
        """Return the status of the job of each submission, for somebody who looks with why it ended. See ``find``."""
        found = self.find(submissions, fresh=fresh)
        gone = [s for s, job in zip(submissions, found, strict=True) if job is None]
        if fresh:  # a decision needs no reason, and sacct can take seconds
            return [JobStatus("gone") if job is None else _status(job) for job in found]
        ends = self._why_ended(gone)
        return [
            _status(job) if job is not None else self._not_seen(s, ends.get((s.cluster, s.job_id), ""))
            for s, job in zip(submissions, found, strict=True)
        ]

    def _not_seen(self, submission: Submission, word: str) -> JobStatus:
        """Return the status of a job that is not in the queue, and of which accounting says a state, or nothing."""
        if not word and submission.user not in ("", this_user()) and self._hides_others:
            return JobStatus("unknown", reason=f"this cluster shows jobs of {submission.user} to nobody else")
        reason = word if word in _ENDS else ""
        return JobStatus("gone", reason=reason, is_cancelled=word == "CANCELLED" if word else None)

    @cached_property
    def _hides_others(self) -> bool:
        """Whether the site shows jobs only to their users, as far as it says so."""
        try:
            config = output("scontrol", "show", "config")
        except SubmitError:
            return False
        return bool(re.search(r"^PrivateData\s*=.*\bjobs\b", config, re.MULTILINE))

    def _ask(self, cluster: str, parents: set[str], *, fresh: bool) -> _Answer:
        known = self._answers.get(cluster)
        if known and not fresh and parents <= known.asked and time.monotonic() - known.at < LOOK_S:
            return known
        command = ["squeue", *on_cluster(cluster), "-h", "-r", "-o", _FORMAT, "-j", ",".join(sorted(parents))]
        done = run(*command)
        # squeue fails if it knows none of the jobs; then all of them have left the queue.
        if done.returncode and "Invalid job id" not in done.stderr:
            raise SubmitError(f"squeue failed: {done.stderr.strip() or done.returncode}. Is slurmctld running?")
        lines = dict(_parse(done.stdout.splitlines()))
        if not lines and re.search(rf"\b({'|'.join(parents)})\b", done.stdout):  # no job of ours may look gone by that
            raise SubmitError(f"squeue's answer is not in the form that was asked for: {done.stdout.strip()[:200]!r}.")
        jobs = {key: job for key, job in lines.items() if job.state not in _OVER}
        answer = _Answer(time.monotonic(), frozenset(parents), jobs)
        self._answers[cluster] = answer
        return answer

    def _why_ended(self, gone: Sequence[Submission]) -> dict[tuple[str, str], str]:
        """Return Slurm's last states of jobs, as far as accounting knows; nothing where a site has none."""
        active: set[tuple[str, str]] = set()
        for cluster, group in by_cluster([s for s in gone if (s.cluster, s.job_id) not in self._ends]).items():
            if not self._has_accounting:
                break
            job_ids = ",".join(submission.job_id for submission in group)
            command = ["sacct", *on_cluster(cluster), "-n", "-X", "-P", "-o", "JobID,User,State,JobName", "-j", job_ids]
            try:
                answer = output(*command, timeout_s=SACCT_S)
            except SubmitError:
                self._has_accounting = False
                break
            self._ends |= dict.fromkeys(((cluster, s.job_id) for s in group), "")
            of_id = {s.job_id: s for s in group}
            for line in answer.splitlines():
                job_id, user, state, name = [*line.split("|", 3), "", "", ""][:4]
                word = state.split(" ")[0]
                for sent in filter(None, map(of_id.get, _members(job_id))):
                    if user in (sent.user or user, "") and name in (sent.name or name, ""):
                        self._ends[cluster, sent.job_id] = word
                        if word in _ACTIVE:
                            active.add((cluster, sent.job_id))
        known = dict(self._ends)
        for key in active:  # to be asked for again
            del self._ends[key]
        return known


def by_cluster(submissions: Iterable[Submission]) -> dict[str, list[Submission]]:
    """Return the submissions of each cluster, the default one's under an empty name."""
    groups: dict[str, list[Submission]] = {}
    for submission in submissions:
        groups.setdefault(submission.cluster, []).append(submission)
    return groups


def _parse(lines: Iterable[str]) -> Iterable[tuple[str, QueuedJob]]:
    """Yield the jobs in squeue's answer by id; lines that are no jobs, as of a wrapper, are skipped."""
    for line in lines:
        fields = line.strip().split("|", 7)
        if len(fields) != 8 or not fields[0][:1].isdigit():
            continue
        job_id, array_task, state, reason, user, submitted, name, script = fields
        job = QueuedJob(state, reason, user, float(submitted) if submitted.isdigit() else 0.0, name, script)
        yield job_id, job
        yield array_task, job


def _members(job_id: str) -> list[str]:
    """Return the ids of the tasks that one id of sacct stands for: ``8_[0-2,5%4]`` are those that never started."""
    found = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", job_id)
    if not found:
        return [job_id]
    parts = (part.partition("-") for part in found[2].split(",") if part)
    return [f"{found[1]}_{i}" for first, _, last in parts for i in range(int(first), int(last or first) + 1)]


def _status(job: QueuedJob) -> JobStatus:
    state = _STATE_OF.get(job.state, "running")
    tells = state == "queued" and job.reason not in ("", "None", "(null)")
    return JobStatus(state, reason=f"pending: {job.reason}" if tells else "")
