"""A Slurm in a cloud: its nodes are machines that are started for a job, and that the cloud may take back.

Slurm is configured as such clusters do it (``State=CLOUD``, a program that asks for machines and one that gives them
back); a thread here is the cloud. Each machine has a metadata service of its own at the clouds' own address.
"""

from __future__ import annotations

import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from tests.servers import metadata
from tests.servers.daemons import ServerError
from tests.servers.hosts import BOOT, SlurmHosts

NODE = "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs=4 RealMemory=8000 State=CLOUD"

# idle_on_node_suspend: a node that was given back can be asked for again. PrivateData shows nodes that do not run, too.
SITE = """\
SlurmdTimeout=10
SlurmctldParameters=cloud_dns,idle_on_node_suspend
ResumeProgram={root}/resume
SuspendProgram={root}/suspend
ResumeTimeout=60
SuspendTimeout=10
SuspendTime=120
ResumeRate=0
PrivateData=cloud
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none"""

RESUME = """\
#!/bin/sh
for name in $(SLURM_CONF={root}/slurm.conf scontrol show hostnames "$1"); do touch {root}/wanted/$name; done
"""
SUSPEND = """\
#!/bin/sh
for name in $(SLURM_CONF={root}/slurm.conf scontrol show hostnames "$1"); do rm -f {root}/wanted/$name; done
"""

# Without -b the controller would not believe that the machine was started for it: the kernel runs longer than that. Nor
# does it believe one that comes up in the very second in which it asked, as it counts in whole seconds.
_METADATA = (
    f"ip addr add 169.254.169.254/32 dev lo; {sys.executable} {metadata.__file__} aws {{root}}/metadata/{{name}} &"
)


class CloudHosts(SlurmHosts):
    """Slurm with up to N machines h1..hN of 4 CPUs each, none of which runs before a job needs it."""

    node_line, site = NODE, SITE
    boot = BOOT.replace("slurmd -D", f"{_METADATA}\nsleep 2\nslurmd -b -D")

    def __init__(self, nodes: int = 4) -> None:
        super().__init__(nodes)
        self._wanted, self._ended = self.root / "wanted", threading.Event()
        self._lock = threading.Lock()
        # Its machines end with it (setpriv --pdeathsig), so it lives as long as they may.
        self._cloud = threading.Thread(target=self._serve, name="cloud", daemon=True)

    def _write_config(self) -> None:
        super()._write_config()
        self._write("resume", RESUME.format(root=self.root), 0o755)
        self._write("suspend", SUSPEND.format(root=self.root), 0o755)
        self._wanted.mkdir()
        for node in self.nodes:
            (self.root / "metadata" / node).mkdir(parents=True)

    def _start_slurm(self) -> None:
        self.spawn("slurmctld", "slurmctld", "-D", "-c")
        self._cloud.start()
        self.wait_daemon("slurmctld", self._idle)

    def _idle(self) -> bool:
        """Whether the controller answers; its nodes need not run."""
        try:
            return bool(self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T"))
        except ServerError:
            return False

    def _serve(self) -> None:
        """Start the machines that are asked for, and end those that are given back."""
        while not self._ended.wait(0.1):
            try:
                with self._lock:
                    self._do_as_asked()
            except (OSError, ServerError) as error:
                # Without this thread no machine would ever start again; the log is in the tests' error messages.
                with (self.logs / "cloud.log").open("a") as log:
                    log.write(f"{error}\n")

    def _do_as_asked(self) -> None:
        wanted = {path.name for path in self._wanted.iterdir()}
        running = {node for node in self.nodes if f"slurmd-{node}" in self.daemons}
        for node in wanted - running:
            self._notice_of(node).unlink(missing_ok=True)
            try:
                self.start_node(node)
            except ServerError:
                self.kill_node(node)  # so that it is tried again
                raise
        for node in running - wanted:
            self.kill_node(node)

    def _notice_of(self, node: str) -> Path:
        return self.root / "metadata" / node / metadata.NOTICE

    def announce(self, node: str, goes: float) -> None:
        """Tell a machine, as Amazon does, that it will be taken back at a Unix time."""
        notice = self._notice_of(node)
        text = metadata.aws_notice(datetime.fromtimestamp(goes, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        notice.with_suffix(".tmp").write_text(text)
        notice.with_suffix(".tmp").replace(notice)

    def take_back(self, node: str) -> None:
        """End a machine, as a cloud does; Slurm has to find out."""
        with self._lock:
            (self._wanted / node).unlink(missing_ok=True)
            self.kill_node(node)

    def stop(self) -> None:
        """End everything."""
        self._ended.set()
        if self._cloud.is_alive():
            self._cloud.join()
        super().stop()
