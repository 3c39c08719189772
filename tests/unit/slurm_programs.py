"""Slurm's programs as files in PATH that do what a test says, and note how they were called."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


class Programs:
    """A folder of programs, first in ``PATH``."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(self, name: str, answer: str = "", *, errors: str = "", code: int = 0) -> None:
        """Make a program that prints an answer and errors, and exits with a code."""
        calls = self.folder / f"{name}.calls"
        path = self.folder / name
        path.write_text(
            "#!/usr/bin/python3\nimport json, os, sys\n"
            f"open({str(calls)!r}, 'a').write(json.dumps([sys.argv[1:], dict(os.environ)]) + '\\n')\n"
            f"sys.stdout.write({answer!r}); sys.stderr.write({errors!r}); sys.exit({code})\n"
        )
        path.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        """Return the arguments of each call of a program."""
        return [arguments for arguments, _ in self._calls(name)]

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of the last call of a program."""
        return self._calls(name)[-1][1]

    def _calls(self, name: str) -> list[tuple[list[str], dict[str, str]]]:
        path = self.folder / f"{name}.calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
