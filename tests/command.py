"""Running the command line as a user does: in a process of its own, in a folder of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class CommandError(AssertionError):
    """A command did not end as it should have; the message holds all that it said."""


class RsbCluster:
    """The command ``rsb-cluster``.

    Args:
        cwd: Where it runs, and where its ``runs`` and ``data`` folders are by default.
        env: Added to this process's environment.
    """

    def __init__(self, cwd: Path, env: dict[str, str]) -> None:
        self.cwd = cwd
        self.env = os.environ | {"PYTHONPATH": str(ROOT)} | env

    def __call__(self, *args: str, code: int = 0, timeout: float = 300) -> str:
        """Run it, check its exit code, and return its standard output."""
        return self.run(*args, code=code, timeout=timeout).stdout

    def run(self, *args: str, code: int = 0, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run it, check its exit code, and return all that it said."""
        command = [sys.executable, "-m", "rsb_cluster", *args]
        done = subprocess.run(command, cwd=self.cwd, env=self.env, capture_output=True, text=True, timeout=timeout)
        if done.returncode != code:
            raise CommandError(f"{' '.join(args)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}{self.logs()}")
        return done

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
