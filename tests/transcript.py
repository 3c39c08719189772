"""Writes docs/transcript.md: ``python -m tests.transcript`` ('make transcript').

This checkout's last commit is cloned and installed in an empty virtual environment, as the README says. Then the
commands of the README's first part and of the tutorial are typed, the latter on a Slurm of four nodes that the tests
start on this machine. What a reader edits on the way is edited here, so that small pictures are trained on CPUs. Takes
some ten minutes on two cores, and needs a network unless uv has all packages in its cache.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.commands_of import ROOT, commands_of
from tests.servers.slurm import SlurmCluster
from tests.tutorial_edits import INSTALLATION, JOB, RECIPE, edit
from tests.unit.own_pictures import folders_of_pictures

PAGE = ROOT / "docs" / "transcript.md"
WIDTH = 120
HEAD, TAIL = 9, 4  # lines of an output that are shown
INSTALL = "pip install -c constraints.txt ."
FIRST = ("rsb-cluster submit --recipe digits --wait", "rsb-cluster collect")
INTRODUCTION = """\
# A transcript

The README's first commands and the [tutorial](tutorial.md), typed in an empty virtual environment after `git clone`,
each with the time it took. `make transcript` wrote this page: on {cores} cores without a GPU, on a Slurm of four nodes
that run on the same cores, with {pictures} small pictures; the packages were in uv's cache{beside}. Long outputs are
shortened.
"""


class Typist:
    """Types commands, and keeps what was seen.

    Args:
        home: Where all of it happens; shown as ``~``.
        env: The environment.
    """

    def __init__(self, home: Path, env: dict[str, str]) -> None:
        self.home, self.env = home, env
        self.page: list[str] = []

    def heading(self, text: str) -> None:
        """Begin a part of the page."""
        self.page.append(f"\n## {text}\n")

    def say(self, text: str) -> None:
        """Write a sentence."""
        self.page.append(f"\n{text}\n")

    def type(self, command: str, cwd: Path, *, runs: str = "") -> None:
        """Run a command, and write it with its time and what it said.

        Args:
            command: As it is shown.
            cwd: Where.
            runs: What is run, if it differs.
        """
        print(f"$ {command}", flush=True)
        begin = time.monotonic()
        done = subprocess.run(
            runs or command, shell=True, executable="/bin/bash", cwd=cwd, env=self.env,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        took = time.monotonic() - begin
        if done.returncode:
            sys.exit(f"{command}: exit {done.returncode}\n{done.stdout}")
        shown = "".join(f"{line}\n" for line in self._shortened(done.stdout))
        self.page.append(f"```console\n$ {command}   # {took:.1f} s\n{shown}```\n")

    def _shortened(self, said: str) -> Iterable[str]:
        for place, name in ((str(self.home), "~"), (socket.gethostname(), "login"), (str(ROOT), "~/rsb-cluster")):
            said = said.replace(place, name)
        lines = [re.sub(r"\s+$", "", line) for line in said.splitlines() if line.strip()]
        if len(lines) > HEAD + TAIL + 1:
            lines = [*lines[:HEAD], f"... ({len(lines) - HEAD - TAIL} lines)", *lines[-TAIL:]]
        return [line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in lines]


def main() -> None:
    """Write the page."""
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    beside = f", and other work had the cores, too (load {load:.1f})" if load > cores / 2 else ""
    cluster = SlurmCluster()
    with tempfile.TemporaryDirectory(prefix="transcript-") as temporary:
        home = Path(temporary)
        venv, clone, laptop, work = (home / name for name in ("venv", "rsb-cluster", "laptop", "tutorial"))
        laptop.mkdir()
        work.mkdir()
        path = f"{venv}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("RSB_", "PYTHON", "SLURM_"))}
        new = Typist(home, mine | {"PATH": path, "VIRTUAL_ENV": str(venv), "COLUMNS": str(WIDTH)})
        new.heading("Installation")
        new.type(
            "git clone https://… rsb-cluster", home, runs=f"git clone --quiet {shlex.quote(str(ROOT))} rsb-cluster"
        )
        new.type("uv venv venv && source venv/bin/activate", home, runs="uv venv --quiet venv")
        assert INSTALL in commands_of("README.md")
        new.type(f"uv {INSTALL}", clone, runs=f"uv {INSTALL} --quiet")
        try:
            _laptop(new, laptop)
            pictures = folders_of_pictures(work / "pictures", px=40)
            cluster.start()
            new.env |= cluster.env
            _tutorial(new, work)
        finally:
            cluster.stop()
        count = sum(path.is_file() for path in pictures.rglob("*"))
    PAGE.write_text(INTRODUCTION.format(cores=cores, pictures=count, beside=beside) + "".join(new.page))
    print(f"docs/{PAGE.name}: {PAGE.stat().st_size:,} bytes")


def _laptop(new: Typist, folder: Path) -> None:
    new.heading("On a laptop")
    for command in FIRST:
        assert command in commands_of("README.md")
        new.type(command, folder)


def _tutorial(new: Typist, work: Path) -> None:
    new.heading("The tutorial")
    for command in commands_of("docs/tutorial.md"):
        if command.startswith(INSTALLATION):
            continue
        if command == "rsb-cluster jobs copy slurm here.toml":
            command = "rsb-cluster jobs copy slurm-cpu here.toml"  # the nodes have no GPUs
        new.type(command, work)
        if command.startswith("rsb-cluster recipes copy"):
            edit(work / "pictures.toml", RECIPE)
            new.say(f"Edited in `pictures.toml`, as the pictures are few and small: {_edited(RECIPE)}.")
        if command.startswith("rsb-cluster jobs copy"):
            edit(work / "here.toml", JOB)
            (work / "rsb-cluster.toml").write_text('job = "./here.toml"\n')
            new.say(f"Edited in `here.toml`: {_edited(JOB)}. And `rsb-cluster.toml` names it as the default.")


def _edited(changes: dict[str, str]) -> str:
    return ", ".join(f"`{new.strip()}`" for new in dict.fromkeys(changes.values()))


if __name__ == "__main__":
    main()
