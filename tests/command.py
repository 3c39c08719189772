"""Running the command line as a user does: in a process of its own, in a folder of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.servers.daemons import GUARD_S

ROOT = Path(__file__).parent.parent


class CommandError(AssertionError):
    """A command did not end as it should have; the message holds all that it said."""


# Until it is told to stop, a rank makes no step beyond the one that a file names. What a test does to a run then comes
# at a step and not at a time. To wait so is no standstill. Frequent heartbeats say soon how far it is, and ask
# for the user's wishes.
HELD = """
import pathlib
from rsb_cluster.runs import lease
lease.HEARTBEAT_S = 1.0
_free_step = Trainer._step
def _step(self, source):
    limit = pathlib.Path({limit!r})
    while self.flag.cause is None and self.progress.step >= int(limit.read_text()):
        self.watchdog.progress(self.progress.step, "waiting for data")
        time.sleep(0.01)
    _free_step(self, source)
Trainer._step = _step
"""


class RsbCluster:
    """The command ``rsb-cluster``.

    Args:
        cwd: Where it runs, and where its ``runs`` and ``data`` folders are by default.
        env: Added to this process's environment.
        prefix: A command that runs it, such as one that becomes another user.
    """

    def __init__(self, cwd: Path, env: dict[str, str], prefix: Sequence[str] = ()) -> None:
        self.cwd, self.prefix = cwd, prefix
        self.env = os.environ | {"PYTHONPATH": str(ROOT)} | env

    def change_trainer(self, code: str) -> None:
        """Have the ranks of what is submitted from now on execute this in the trainer's module."""
        self.env |= {"PYTHONPATH": f"{ROOT}/tests/ranks{os.pathsep}{ROOT}", "RSB_TEST_TRAINER": code}

    def hold(self, step: int = 0) -> None:
        """Have the runs that are submitted from now on make no step beyond this one, until ``allow`` says more."""
        self.allow(step)
        self.change_trainer(HELD.format(limit=str(self.cwd / "limit")))

    def allow(self, step: int = 1_000_000) -> None:
        """Let held runs go on until so many steps are done."""
        written = self.cwd / "limit.new"
        written.write_text(str(step))
        written.replace(self.cwd / "limit")

    def go_on(self) -> None:
        """Let held ranks make two steps more, so that each learns in a collective what has become of the others."""
        self.allow(int((self.cwd / "limit").read_text()) + 2)

    def __call__(self, *args: str, code: int = 0, timeout: float = GUARD_S) -> str:
        """Run it, check its exit code, and return its standard output."""
        return self.run(*args, code=code, timeout=timeout).stdout

    def run(self, *args: str, code: int = 0, timeout: float = GUARD_S) -> subprocess.CompletedProcess[str]:
        """Run it, check its exit code, and return all that it said."""
        done = self.python("-m", "rsb_cluster", *args, timeout=timeout)
        if done.returncode != code:
            raise CommandError(f"{' '.join(args)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}{self.logs()}")
        return done

    def python(self, *args: str, timeout: float = GUARD_S) -> subprocess.CompletedProcess[str]:
        """Run Python with some arguments as the command is run."""
        command = [*self.prefix, sys.executable, *args]
        return subprocess.run(command, cwd=self.cwd, env=self.env, capture_output=True, text=True, timeout=timeout)

    def json(self, *args: str, **options: Any) -> Any:
        """Run it and read its output as JSON."""
        return json.loads(self(*args, **options))

    def error(self, *args: str, code: int = 2) -> str:
        """Run it, expect it to fail, and return its message."""
        done = self.run(*args, code=code)
        if "Traceback" in done.stderr:
            raise CommandError(f"{' '.join(args)}: a traceback instead of a message\n{done.stderr}")
        return done.stderr

    def logs(self) -> str:
        """Return the ends of all ranks' logs below the working folder."""
        found = sorted(self.cwd.rglob("*_log.out"))
        return "".join(f"\n--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in found)
