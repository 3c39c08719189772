"""Two users of this machine who share a folder of runs: real processes with their rights, which root may start."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from rsb_cluster.runs.run import Run
from tests.command import ROOT, CommandError, RsbCluster
from tests.servers.daemons import missing_tools

GROUP = 100  # Debian's users
PEOPLE = {"bin": 2, "games": 5}  # known by name on every machine, and hardly anyone's


class Colleague(RsbCluster):
    """A user in the group.

    Args:
        name: The name.
        office: The folder in which the runs are.
        umask: The user's umask.
    """

    def __init__(self, name: str, office: Path, umask: int = 0o077) -> None:
        home, uid = office / name, PEOPLE[name]
        home.mkdir()
        os.chown(home, uid, GROUP)
        identity = f"setpriv --reuid={uid} --regid={uid} --groups={GROUP}"
        script = f'{_open_folders()}umask {umask:o}; exec {identity} "$@"'
        super().__init__(
            home,
            {"HOME": str(home), "RSB_RUNS": str(office / "runs")},
            ("unshare", "--mount", "bash", "-ec", script, "-"),
        )
        self.name, self.office = name, office

    @staticmethod
    def unavailable() -> list[str]:
        """What this machine lacks."""
        return missing_tools(["unshare", "setpriv"])

    def does(self, code: str) -> str:
        """Execute a program as this user, and return what it prints."""
        done = self.python("-c", code)
        if done.returncode:
            raise CommandError(f"{code}\n{done.stderr}")
        return done.stdout

    def makes(self, run_id: str, *, mode: int, **files: str) -> Run:
        """Make a run with these permissions, and with more files; ``__`` stands for a slash in their names."""
        runs = str(self.office / "runs")
        self.does(f"""
from rsb_cluster.runs.run import Run
from tests.unit.runs.made import make
run = Run.at({runs!r}, {run_id!r})
run.store.make_folder({mode})
make({runs!r}, {run_id!r})
for name, content in {files!r}.items():
    run.store.write_bytes(name.replace("__", "/"), content.encode())
""")
        return Run.at(runs, run_id)


def _open_folders() -> str:
    """Return shell lines that open, for this process alone, folders of Python and the checkout that only root enters.

    In the place of each there is an empty folder, with what is needed of it.
    """
    needed = dict.fromkeys(map(str, (Path(sys.base_prefix), Path(sys.prefix), ROOT)))
    lines = []
    for closed in sorted({top for path in needed if (top := _first_closed(Path(path)))}):
        inside = [path for path in needed if path.startswith(f"{closed}/")]
        lines += ["umask 022", "mount -t tmpfs none /mnt"]
        lines += [f"mkdir -p /mnt{path} && mount --rbind {path} /mnt{path}" for path in inside]
        lines += [f"mount --rbind /mnt{closed} {closed}"]
    return "\n".join([*lines, ""])


def _first_closed(path: Path) -> str:
    return next((str(p) for p in reversed((path, *path.parents)) if p.stat().st_mode & 0o005 != 0o005), "")


def make_office() -> Path:
    """Make a folder that all can enter, with an empty folder of runs to which the group can add."""
    folder = Path(tempfile.mkdtemp(prefix="rsb-office-"))
    folder.chmod(0o755)
    (folder / "runs").mkdir()
    os.chown(folder / "runs", 0, GROUP)
    (folder / "runs").chmod(0o3770)
    return folder
