"""A cloud run from the command line to its end, and when what happened."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.runs.run import Attempt, Run
from rsb_cluster.storage.store import Store
from tests.command import RsbCluster
from tests.equality import assert_bit_equal, final_state, rows_of
from tests.servers.daemons import poll
from tests.servers.sky import Sky

T = TypeVar("T")

ASK_S = 60.0  # between two questions whether launches fail: each takes seconds of a core
FAILED_LAUNCHES = 2  # one may be bad luck

SCIENCE = (
    "--recipe", "digits", "--model", "test_resnet", "--set", "schedule.epochs=40", "--set", "eval.every_epochs=40",
    "--set", "job.log_every_steps=1", "--set", "job.checkpoint.every_steps=200", "--set", "job.cpus_per_task=1",
)  # fmt: skip
# Two machines without GPUs, a rank on each, of a job file that is for GPUs.
MACHINES = (
    "--nodes", "2", "--gpus-per-node", "0", "--set", "job.cloud.accelerators=", "--set", "job.tasks_per_node=1",
    "--set", "job.loader_workers=0",
)  # fmt: skip


def make_data(url: str) -> None:
    """Put the digits' shards where machines can read them."""
    make_set(open_set("digits"), Store(url), shard_samples=200)


class Journey:
    """A run on SkyPilot, followed by what its folder in the bucket says; that costs SkyPilot nothing.

    Args:
        sky: SkyPilot.
        rsb: The command line, in an environment that reaches it and the bucket.
        runs: The runs' URL.
        data: The shards'.
    """

    def __init__(self, sky: Sky, rsb: RsbCluster, runs: str, data: str) -> None:
        self._sky, self.rsb, self._runs, self._data = sky, rsb, runs, data
        self.times: dict[str, float] = {}

    def submit(self, *options: str) -> None:
        """Submit as a user does."""
        self.times["submit"] = time.time()
        printed = self.rsb(
            "submit", *SCIENCE, *MACHINES, "--runs", self._runs, "--data", self._data, *options, timeout=900
        )
        self.times["accepted"] = time.time()
        self.run = Run.at(self._runs, printed.split()[-1])

    def wait(self, what: str, predicate: Callable[[], T | None], timeout: float = 900) -> T:
        """Wait, and note the time under ``what``."""
        asked = time.monotonic()

        def check() -> T | None:
            nonlocal asked
            found = predicate()
            if not found and time.monotonic() - asked >= ASK_S:
                asked = time.monotonic()
                self._give_up_if_nothing_starts()
            return found

        found = poll(check, timeout, 0.5)
        assert found is not None, f"not within {timeout} s: {what}\n{self.run.attempts()}\n{self._sky.tell()}"
        self.times[what] = time.time()
        print(f"{self.times[what] - self.times['submit']:7.1f} s  {what}", flush=True)
        return found

    def _give_up_if_nothing_starts(self) -> None:
        """Fail where nodes cannot be set up: SkyPilot would launch them for ever."""
        (status,) = self.rsb.json("status", self.run.run_id, "--runs", self._runs, "--json")
        failed = re.search(r"(\d+) failed launch", status["engine"])
        assert failed is None or int(failed[1]) < FAILED_LAUNCHES, f"{status['problem']}\n{self._sky.tell()}"

    def wait_for_steps(self, number: int, count: int = 20) -> Attempt:
        """Wait until an attempt has made so many steps of its own."""

        def reached() -> Attempt | None:
            for attempt in self.run.attempts():
                if attempt.number == number:
                    beat = self.run.heartbeat(number)
                    step = max(beat.step if beat else 0, attempt.end_step)
                    return attempt if step >= attempt.start_step + count else None
            return None

        return self.wait(f"attempt {number} steps", reached)

    def wait_for_end(self, number: int) -> Attempt:
        """Wait until an attempt has noted why it ended."""

        def ended() -> Attempt | None:
            return next((a for a in self.run.attempts() if a.number == number and a.cause), None)

        return self.wait(f"attempt {number} ended", ended)

    def wait_for_result(self) -> None:
        self.wait("result", lambda: self.run.result())

    def assert_as_if_nothing_had_been(self, folder: Path) -> None:
        """Every weight and every row are those of a run on this machine that nothing happened to."""
        folder.mkdir()
        printed = RsbCluster(folder, {})(
            "submit", *SCIENCE, "--job", "local", "--set", "job.tasks_per_node=2", "--data", self._data, "--wait"
        )
        unbroken = Run.at(folder / "runs", printed.split()[-1])
        assert rows_of(self.run) == rows_of(unbroken)
        assert_bit_equal(final_state(self.run), final_state(unbroken))

    def report(self) -> str:
        """When all happened, in seconds since the submission."""
        start = self.times["submit"]
        return "\n".join(f"{when - start:7.1f} s  {what}" for what, when in self.times.items())
