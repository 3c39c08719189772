"""A run that faults are done to: where it is, who its processes are, and whether the end is as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rsb_cluster.backends import backend_of
from rsb_cluster.runs.metrics import read_rows
from rsb_cluster.runs.run import Attempt, Run
from tests.command import RsbCluster
from tests.equality import assert_bit_equal, final_state, rows_of
from tests.servers.daemons import GUARD_S, parent, poll, processes_with
from tests.servers.slurm import SlurmCluster

T = TypeVar("T")

# Two ranks, a checkpoint every ten steps; the smallest model that timm has for tests. The ranks are held
# (`RsbCluster.hold`), so each fault comes after a step that is known, on any machine.
SCIENCE = (
    "--recipe", "digits", "--model", "test_resnet", "--set", "schedule.epochs=8", "--set", "eval.every_epochs=4",
)  # fmt: skip
PACE = (
    "--set", "job.tasks_per_node=2", "--set", "job.log_every_steps=1", "--set", "job.checkpoint.every_steps=10",
    "--set", "job.watchdog_s=30",
)  # fmt: skip
TOTAL_STEPS, EVERY_STEPS = 176, 10

_BEGIN = re.compile(r"rank0 attempt (\d+), rank 0 ")
_STEP = re.compile(r"rank0 step (\d+)/")


DECODER = "rsb-decoder"


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


class Victim:
    """A submitted run.

    Args:
        rsb: The command line.
        run: The run.
        rank_env: What the environment of the rank of a number holds, besides the job's id.
        explain: Says where its scheduler stands, for error messages.
    """

    def __init__(
        self, rsb: RsbCluster, run: Run, rank_env: Callable[[str, int], list[str]], explain: Callable[[], str]
    ) -> None:
        self.rsb, self.run, self.rank_env, self.explain = rsb, run, rank_env, explain

    @property
    def job_id(self) -> str:
        return self.run.submissions()[-1].job_id

    def log(self) -> str:
        """What rank 0 says, all attempts of the last submission together."""
        last = self.run.submissions()[-1]
        return (backend_of(last).read_log(self.run, last, 0, 0) or b"").decode(errors="replace")

    def progress(self) -> tuple[int, int]:
        """Number of the attempt that rank 0 last began, and the last step that it logged since; 0 where none."""
        begun = list(_BEGIN.finditer(text := self.log()))
        if not begun:
            return 0, 0
        steps = _STEP.findall(text, begun[-1].end())
        return int(begun[-1][1]), int(steps[-1]) if steps else 0

    def wait(self, what: str, predicate: Callable[[], T | None], timeout: float = GUARD_S, interval: float = 0.1) -> T:
        result = poll(predicate, timeout, interval)
        if result is None:
            known = "\n".join(str(attempt) for attempt in self.run.attempts())
            raise AssertionError(f"not within {timeout} s: {what}\n{known}\n{self.rsb.logs()}\n{self.explain()}")
        return result

    def wait_for_steps(self, attempt: int, count: int = EVERY_STEPS + 5) -> int:
        """Let an attempt make so many steps of its own, one checkpoint's worth at least; return the last."""

        def began() -> Attempt | None:
            return next((a for a in self.run.attempts() if a.number == attempt), None)

        last = self.wait(f"attempt {attempt}", began).start_step + count
        self.rsb.allow(last)
        # Its start step is recorded before its first step.
        self.wait(f"{count} steps of attempt {attempt}", lambda: self.progress() >= (attempt, max(1, last)) or None)
        return self.progress()[1]

    def attempt(self, number: int) -> Attempt:
        return next(a for a in self.run.attempts() if a.number == number)

    def wait_for_end(self, attempt: int, *, one_rank_knows: bool = False) -> Attempt:
        """Wait until an attempt has recorded why it ended.

        Args:
            attempt: Its number.
            one_rank_knows: Have it make some steps every second, after which one rank can tell the others to stop.
        """

        def ended() -> Attempt | None:
            found = self.attempt(attempt)
            if one_rank_knows and not found.cause:
                self.rsb.allow(self.progress()[1] + 2)
            return found if found.cause else None

        return self.wait(f"the end of attempt {attempt}", ended, interval=1.0 if one_rank_knows else 0.1)

    def wait_for_state(self, *states: str, timeout: float = GUARD_S) -> dict[str, object]:
        def reached() -> dict[str, object] | None:
            (status,) = self.rsb.json("status", self.run.run_id, "--json")
            return status if status["state"] in states else None

        return self.wait(" or ".join(states), reached, timeout)

    def pid(self, rank: int) -> int:
        """The process of a rank that runs now."""
        (pid,) = (p for p in processes_with(self.rank_env(self.job_id, rank)) if _name(p) != DECODER)
        return pid

    def decoder(self, rank: int) -> int:
        """The process that decodes for a rank, whose parent is the one that forks such processes."""
        found = [p for p in processes_with(self.rank_env(self.job_id, rank)) if _name(p) == DECODER]
        (pid,) = (p for p in found if parent(p) in found)
        return pid

    def kill(self, rank: int, signal_: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid(rank), signal_)
        self.rsb.go_on()

    def steps_lost(self, attempt: int, reached: int) -> int:
        """Steps of one attempt that the next had to do again, given how far it is known to have come."""
        return max(0, reached - self.attempt(attempt + 1).start_step)

    def assert_as_if_nothing_had_been(self, unbroken: Run) -> None:
        """Every weight, all of the optimizer's state, and every row are those of an unbroken run, to the last bit."""
        steps = [row["step"] for row in read_rows(self.run) if row["kind"] == "train"]
        assert steps == list(range(1, TOTAL_STEPS + 1))
        assert rows_of(self.run) == rows_of(unbroken)
        assert_bit_equal(final_state(self.run), final_state(unbroken))


def submit(rsb: RsbCluster, data: Path, *options: str) -> Run:
    printed = rsb("submit", *SCIENCE, *PACE, "--data", str(data), *options)
    return Run.at(rsb.cwd / "runs", printed.split()[-1])


def on_slurm(rsb: RsbCluster, run: Run, cluster: SlurmCluster) -> Victim:
    # A task's environment and not the batch script's, which has a rank, too; of this cluster, as each has a job 1.
    def rank_env(job: str, rank: int) -> list[str]:
        wanted = {"SLURM_CONF": rsb.env["SLURM_CONF"], "SLURM_JOB_ID": job, "SLURM_STEP_ID": 0, "SLURM_PROCID": rank}
        return [f"\0{name}={value}\0" for name, value in wanted.items()]

    return Victim(rsb, run, rank_env, lambda: cluster.run("squeue") + cluster.run("sinfo", "-N") + cluster.log_tails())


def on_this_machine(rsb: RsbCluster, run: Run) -> Victim:
    def rank_env(job: str, rank: int) -> list[str]:
        return [f"\0SUBMITIT_LOCAL_JOB_ID={job}\0", f"\0SUBMITIT_LOCAL_GLOBALID={rank}\0"]

    return Victim(rsb, run, rank_env, lambda: "")
