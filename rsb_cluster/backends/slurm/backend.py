"""The back end ``slurm``."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rsb_cluster.backends.base import STARTED, Backend, Check, JobStatus, new_submission
from rsb_cluster.backends.slurm import programs
from rsb_cluster.backends.slurm.programs import on_cluster
from rsb_cluster.backends.slurm.queue import Queue, by_cluster, this_user
from rsb_cluster.backends.slurm.script import make_script, sbatch_options, submit
from rsb_cluster.config.job import Job
from rsb_cluster.errors import SubmitError
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Submission
from rsb_cluster.runs.sharing import make_submission_folder

DEFAULT_ARRAY_SIZE = 1001  # slurm.conf(5)
CONFIG_S = 5.0  # time limit of scontrol show config
REACH_S = 20.0  # the same, where something depends on the answer
SCANCEL_S = 4.0  # time limit of scancel for a task of an array


class Slurm(Backend):
    """The back end ``slurm``."""

    name = "slurm"
    script_title = "sbatch script"
    can_run_after = True
    has_partitions = True

    def __init__(self) -> None:
        self._queue = Queue()

    def check_job(self, job: Job) -> None:
        """Accept every job: invalid options are found when the script is made."""

    def doctor_checks(self) -> Mapping[str, Check]:
        """Check with ``sbatch --test-only`` whether Slurm would accept the job, and show its limits."""

        def accepts(job: Job) -> str:
            self.check_available(job)
            return self.test_only(job)

        return {
            "this shell": lambda job: "; ".join(self.notes(job)) or "sets nothing that changes a job",
            "Slurm accepts the job": accepts,
            "job arrays": lambda job: f"up to {self.max_array_size():,} tasks per job array",
        }

    def notes(self, job: Job) -> list[str]:
        """Return what this shell adds to a job, and what of it does not apply."""
        options = sbatch_options(job)
        found = [
            f"{name}={value} of this shell applies, as the job sets none"
            for name, value in programs.site_defaults(options).items()
        ]
        if ignored := programs.ignored_variables(options):
            variables = " ".join(f"{name}={value}" for name, value in ignored.items())
            found.append(f"ignored in this shell, as the job file decides: {variables}")
        if inside := os.environ.get("SLURM_JOB_ID"):
            found.append(f"this shell is inside job {inside}: its SLURM_* variables are not passed on")
        return found

    def why_refused(self, job: Job) -> str:
        """Return why ``sbatch --test-only`` refuses a job, where there is an sbatch whose controller answers."""
        if shutil.which("sbatch") and not self.why_unreachable():
            try:
                self.test_only(job)
            except SubmitError as error:
                return str(error)
        return ""

    def why_unreachable(self) -> str:
        """Return why slurmctld does not answer; empty also where Slurm is not installed."""
        if not shutil.which("sbatch"):
            return ""
        try:
            programs.output("scontrol", "show", "config", timeout_s=REACH_S, env=programs.environment())
        except SubmitError as error:
            return str(error)
        return ""

    def exclude_hosts(self, job: Job, hosts: Sequence[str]) -> Job:
        """Return a copy of the job with the hosts added to its option ``exclude``, by Slurm's names for them.

        A host may call itself otherwise (``n1.cluster`` for ``n1``), and sbatch refuses names that it does not know.
        """
        excluded = [str(job.slurm["exclude"])] if "exclude" in job.slurm else []
        command = ["sinfo", *on_cluster(programs.named_cluster(job.slurm)), "-h", "-N", "-o", "%n|%N"]
        try:
            lines = programs.output(*command).split()
        except SubmitError:  # a dry run works on any machine
            lines = []
        known = [(host, node) for host, bar, node in (line.partition("|") for line in lines) if bar]
        for name in hosts:
            same = [node for host, node in known if name in (host, node)]
            short = [node for host, node in known if host.partition(".")[0] == name.partition(".")[0]]
            excluded += same or short or [name]
        return job.model_copy(update={"slurm": {**job.slurm, "exclude": ",".join(dict.fromkeys(excluded))}})

    def check_available(self, job: Job) -> None:
        """Refuse if Slurm's programs are not installed."""
        if not shutil.which("sbatch"):
            raise SubmitError(
                "there is no 'sbatch' on this machine. Submit from a login node of the cluster, or use --job local."
            )

    def max_array_size(self) -> int:
        """Return the site's ``MaxArraySize``, or Slurm's default if it is unknown."""
        try:
            config = programs.output("scontrol", "show", "config", timeout_s=CONFIG_S, env=programs.environment())
        except SubmitError:  # a dry run works on any machine
            return DEFAULT_ARRAY_SIZE
        match = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
        return int(match[1]) if match else DEFAULT_ARRAY_SIZE

    def script(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> str:
        """Return the sbatch script that ``submit`` submits."""
        return make_script(job, folder, name, len(tasks))

    def test_only(self, job: Job) -> str:
        """Return the answer of ``sbatch --test-only``, which submits nothing.

        Raises:
            SubmitError: Slurm would refuse the job.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "job.sh"
            path.write_text(self.script(job, [Task("/", "doctor", {})], Path(folder), "doctor"), encoding="utf-8")
            env = programs.environment(sbatch_options(job)) | {"SLURM_TIME_FORMAT": "standard"}  # people read it
            done = programs.run("sbatch", "--test-only", str(path), env=env)
        if done.returncode:
            why = programs.why_refused(done)
            raise SubmitError(f"sbatch would refuse it: {why}. Check partition, account and limits in the job file.")
        lines = done.stderr.strip().splitlines() or [""]  # among them those of a site's plugins
        return next((line for line in lines if " to start at " in line), lines[-1]).removeprefix("sbatch: ")

    def submit(self, job: Job, tasks: Sequence[Task], folder: Path, name: str) -> list[Submission]:
        """Submit runs as one job or one job array.

        Args:
            job: Where to train.
            tasks: One per run.
            folder: New folder for scripts and logs, on a file system that all nodes share.
            name: Name of the job in Slurm.

        Raises:
            SubmitError: Slurm refused the job.
        """
        job_ids, cluster = submit(job, tasks, folder, name)
        known = {"cluster": cluster, "user": this_user(), "name": name}
        return [
            new_submission(job, job_id, folder, task.data).model_copy(update=known)
            for job_id, task in zip(job_ids, tasks, strict=True)
        ]

    def query(self, submissions: Sequence[Submission], *, fresh: bool = True) -> list[JobStatus]:
        """Return the status of jobs; one squeue for all of a cluster, and one sacct for those that have left it."""
        return self._queue.query(submissions, fresh=fresh)

    def cancel(self, submissions: Sequence[Submission]) -> list[str]:
        """Cancel jobs: a running one saves and stops, a queued one leaves the queue. Return why not, for each.

        scancel fails as a whole if it could not signal one of many jobs; in some versions also if one has already
        ended. Jobs that were signalled all the same are completing, or no longer in the queue.
        """
        problems: dict[str, str] = {}
        for cluster, group in by_cluster(submissions).items():
            try:
                programs.output("scancel", *on_cluster(cluster), *(submission.job_id for submission in group))
            except SubmitError as error:
                problems[cluster] = str(error)
        if not problems:
            return [""] * len(submissions)
        found = self._queue.find(submissions, fresh=True)
        return [
            "" if job is None or job.state == "COMPLETING" else problems.get(submission.cluster, "")
            for submission, job in zip(submissions, found, strict=True)
        ]

    def cancel_queued(self, submissions: Sequence[Submission]) -> list[str]:
        """Cancel jobs that are pending. Return why not, for each.

        slurmctld decides at once whether a job still is. For a task of an array scancel is told no state: with one it
        cancels all pending tasks of the array (seen with 22.05). A task that starts meanwhile saves and stops.
        """
        problems: dict[str, str] = {}
        before = self._queue.find(submissions, fresh=True)
        queued = [s for s, job in zip(submissions, before, strict=True) if job is not None and job.is_queued]
        for cluster, group in by_cluster(queued).items():
            job_ids = [submission.job_id for submission in group]
            alone, tasks = ([i for i in job_ids if ("_" in i) == is_task] for is_task in (False, True))
            for options, chosen in ((["--state=PENDING"], alone), ([], tasks)):
                if chosen and (done := programs.run("scancel", *on_cluster(cluster), *options, *chosen)).returncode:
                    problems[cluster] = str(programs.failed(done))
        found = self._queue.find(submissions, fresh=True)
        return [
            "" if job is None else problems.get(s.cluster, "it is still queued") if job.is_queued else STARTED
            for s, job in zip(submissions, found, strict=True)
        ]

    def preempt(self, submissions: Sequence[Submission]) -> None:
        """Preempt running jobs: they save and return to the queue."""
        with ThreadPoolExecutor(min(32, len(submissions))) as pool:
            list(pool.map(self._send_signal, submissions))

    def cancel_command(self, submissions: Sequence[Submission]) -> str:
        """Return a shell command that cancels jobs."""
        return "; ".join(
            shlex.join(["scancel", *on_cluster(cluster), *(submission.job_id for submission in group)])
            for cluster, group in by_cluster(submissions).items()
        )

    def run_after(
        self, job: Job, submissions: Sequence[Submission], command: Sequence[str], folder: Path, name: str
    ) -> str:
        """Submit a job that runs a command when all these jobs have ended, successfully or not; return its id.

        It requests one CPU, with the account and the partition of the job. A requeued job has not ended.

        Raises:
            SubmitError: Slurm refused the job.
        """
        self.check_available(job)
        clusters = list(by_cluster(submissions))
        if len(clusters) > 1:
            raise SubmitError(f"the jobs are on several clusters ({', '.join(clusters)}), and a job waits for its own.")
        arrays = dict.fromkeys(submission.job_id.partition("_")[0] for submission in submissions)
        make_submission_folder(folder, job)
        own = sbatch_options(job)
        keys = ("account", "partition", "qos", "reservation", *(["clusters"] if not any(clusters) else []))
        site = [f"--{key}={own[key]}" for key in keys if key in own] + [o for c in clusters for o in on_cluster(c)]
        options = [*site, f"--job-name={name}", f"--output={folder}/%j.log", "--time=60", "--ntasks=1"]
        options += ["--mem=4G"] if own.get("mem") is not False else []  # some sites refuse the option
        waits = [f"--dependency=afterany:{':'.join(arrays)}"] if arrays else []
        lines = "\n".join([*job.setup, shlex.join(command)])
        command = ["sbatch", "--parsable", *waits, *options, "--wrap", lines]
        answer = programs.output(*command, timeout_s=programs.SBATCH_S, env=programs.environment(own))
        return programs.parse_job_ids(answer)[0][0]

    def _send_signal(self, submission: Submission) -> None:
        """Send SIGTERM to a job.

        While another task of the same array is pending, scancel delivers the signal and then retries for minutes (seen
        with 22.05), the first time after 5 s. A retry would hit the next attempt, so scancel is killed before.
        """
        where = on_cluster(submission.cluster)
        is_task = "_" in submission.job_id
        timeout_s = SCANCEL_S if is_task else programs.TIMEOUT_S  # a controller may be slow
        try:
            done = programs.run("scancel", *where, "--signal=TERM", submission.job_id, timeout_s=timeout_s)
        except programs.NoAnswerError:
            if not is_task:
                raise
            self._queue.find([submission], fresh=True)  # raises if it was slurmctld that did not answer
            return
        if done.returncode:
            (job,) = self._queue.find([submission], fresh=True)
            if job is not None and job.state != "COMPLETING":  # else it has just ended
                raise programs.failed(done)
