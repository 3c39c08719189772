"""A real Slurm with accounting: munge, MariaDB, slurmdbd, slurmctld and several slurmd, all on loopback."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import TypeVar

from tests.servers.daemons import GUARD_S, Server, ServerError, free_ports, kill_all, listening, missing_tools, poll

T = TypeVar("T")

TOOLS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "setpriv")

# cred_expire: a requeued job may not start before its old credential has expired, by default two minutes.
# config_overrides: believe CPUs and memory below, whatever the machine has.
SLURM_CONF = """\
ClusterName=rsbtest
SlurmctldHost={host}({address})
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=10
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=2000
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
MinJobAge=300
ReturnToService=2
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
MaxArraySize=20001
MaxJobCount=50000
{site}
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=off OverSubscribe=NO
PartitionName=spot Nodes={names} MaxTime=INFINITE PriorityTier=1 PreemptMode=requeue GraceTime=15 OverSubscribe=NO
"""

# What another kind of cluster has otherwise.
SITE = """\
SlurmdTimeout=20
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={root}/munge.sock"""

# NodeAddr spares an entry in /etc/hosts: daemons and srun reach a node by address and port, never by its name.
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000 State=UNKNOWN"

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=10
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={db_port}
StorageUser=root
StorageLoc=slurm_acct_db
LogFile={root}/log/slurmdbd.log
PidFile={root}/slurmdbd.pid
"""


class SlurmCluster(Server):
    """Slurm with nodes n1..nN of 4 CPUs each; partition ``main`` preempts partition ``spot``.

    ``env`` is to be merged into the environment of a process that is to talk to this cluster.
    """

    def __init__(self, nodes: int = 4) -> None:
        super().__init__("rsb-slurm-")
        self.nodes = [f"n{index}" for index in range(1, nodes + 1)]
        self.env = {"SLURM_CONF": str(self.root / "slurm.conf")}
        self._ours = f"\0SLURM_CONF={self.env['SLURM_CONF']}\0"

    @staticmethod
    def unavailable() -> list[str]:
        """What this machine lacks for a cluster; empty if it can run one."""
        return missing_tools(TOOLS)

    def daemon_env(self) -> dict[str, str]:
        """Add SLURM_CONF: slurmdbd looks for slurmdbd.conf beside that file, so nothing goes to /etc/slurm."""
        return super().daemon_env() | self.env

    def start(self) -> None:
        """Start all daemons, and wait until all nodes are idle."""
        self._write_config()
        self._start_munged()
        self._start_accounting()
        self._start_slurm()

    def _start_munged(self) -> None:
        sock = self.root / "munge.sock"
        self.spawn(
            "munged", "munged", "--foreground", "--force", f"--key-file={self.root}/munge.key", f"--socket={sock}",
            f"--pid-file={self.root}/munged.pid", f"--seed-file={self.root}/munge.seed",
            f"--log-file={self.logs}/munged.log",
        )  # fmt: skip
        self.wait_daemon("munged", sock.exists)

    def _start_accounting(self) -> None:
        self.command("mariadb-install-db", "--no-defaults", f"--datadir={self.root}/db", "--user=root")
        # Without grant tables there are no users to create; without flushing, thousands of jobs do not wait for a disk.
        self.spawn(
            "mariadbd", "mariadbd", "--no-defaults", "--user=root", f"--datadir={self.root}/db", "--skip-grant-tables",
            f"--socket={self.root}/mysql.sock", f"--port={self._db_port}", "--bind-address=127.0.0.1",
            f"--pid-file={self.root}/mariadbd.pid", "--innodb-flush-log-at-trx-commit=0",
            "--innodb-lock-wait-timeout=900",
        )  # fmt: skip
        self.wait_daemon("mariadbd", lambda: listening(self._db_port))
        self.spawn("slurmdbd", "slurmdbd", "-D")
        self.wait_daemon("slurmdbd", lambda: listening(self._dbd_port))

    def _start_slurm(self) -> None:
        self.spawn("slurmctld", "slurmctld", "-D", "-c")  # registers the cluster in the accounting by itself
        for node in self.nodes:
            self.start_node(node)
        self.wait_daemon("slurmctld", self._idle)

    def _write_config(self) -> None:
        host = _host()
        self._dbd_port, self._db_port, ctld_port, *ports = free_ports(3 + len(self.nodes))
        values = {"root": self.root, "host": host, "dbd_port": self._dbd_port, "db_port": self._db_port}
        lines = [NODE.format(name=name, host=host, port=port) for name, port in zip(self.nodes, ports, strict=True)]
        self._write("slurmdbd.conf", SLURMDBD_CONF.format(**values), 0o600)
        self._write_slurm_conf("127.0.0.1", ctld_port, SITE.format(**values), lines)

    def _write_slurm_conf(self, address: str, ctld_port: int, site: str, nodes: list[str]) -> None:
        host, names = socket.gethostname().partition(".")[0], ",".join(self.nodes)
        conf = SLURM_CONF.format(
            root=self.root,
            host=host,
            address=address,
            ctld_port=ctld_port,
            site=site,
            nodes="\n".join(nodes),
            names=names,
        )
        self._write("slurm.conf", conf, 0o644)
        self._write("munge.key", os.urandom(512).hex(), 0o400)
        (self.root / "state").mkdir()
        (self.root / "spool").mkdir()

    def _write(self, name: str, text: str, mode: int) -> None:
        path = self.root / name
        path.write_text(text)
        path.chmod(mode)

    def _idle(self) -> bool:
        """Whether all nodes are idle and responding; a node that does not respond is ``idle*``."""
        try:
            return self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * len(self.nodes)
        except ServerError:  # slurmctld does not answer yet
            return False

    def start_node(self, node: str) -> None:
        """Start the slurmd of one node; after kill_node, this is the node's reboot."""
        self.spawn(f"slurmd-{node}", "slurmd", "-D", "-N", node)

    def stop_controller(self) -> None:
        """Stop slurmctld as an administrator does: it saves its state. Jobs and nodes go on."""
        daemon = self.daemons.pop("slurmctld")
        daemon.terminate()
        daemon.wait(GUARD_S)

    def start_controller(self) -> None:
        """Start slurmctld again, with the jobs that it knew."""
        self.spawn("slurmctld", "slurmctld", "-D")
        self.wait_daemon("slurmctld", self._answers)

    def _answers(self) -> bool:
        try:
            return bool(self.run("squeue", "-h", "-o", "x") or True)
        except ServerError:
            return False

    def kill_node(self, node: str) -> None:
        """Lose one node at once, as in a power cut: its slurmd and all jobs there, without a word to slurmctld."""
        self.kill_daemon(f"slurmd-{node}")
        kill_all(f"{self.logs}/slurmd-{node}.", [self._ours, f"\0SLURMD_NODENAME={node}\0"])

    def run(self, *argv: str, timeout: float = GUARD_S) -> str:
        """Run a Slurm client program on this cluster and return its output; raise with its errors if it fails."""
        return self.command(*argv, env=os.environ | self.env, timeout=timeout)

    def job_state(self, job_id: int | str) -> str:
        """State of a job (``7``) or array task (``7_3``), such as RUNNING.

        Asks slurmctld, and accounting once slurmctld has forgotten the job. An array as a whole gives the states
        of its tasks, each once, in order, joined by commas.
        """
        try:
            found = self.run("squeue", "-h", "-r", "--states=all", "-o", "%T", "-j", str(job_id)).split()
        except ServerError:
            found = []
        if not found:
            rows = self.run("sacct", "-X", "-n", "-P", "-o", "State", "-j", str(job_id)).splitlines()
            found = [row.split()[0] for row in rows if row]  # "CANCELLED by 0"
        if not found:
            raise ServerError(f"job {job_id} is unknown")
        return ",".join(sorted(set(found)))

    def wait_for(self, what: str, predicate: Callable[[], T | None], timeout: float = GUARD_S) -> T:
        """Wait until ``predicate()`` is true and return its value; on a time-out show the queue and the logs."""
        if (result := poll(predicate, timeout)) is None:
            queue = self.run("squeue", "--states=all")
            raise ServerError(f"not within {timeout} s: {what}\n{queue}\n{self.log_tails()}")
        return result

    def wait_for_state(self, job_id: int | str, *states: str, timeout: float = GUARD_S) -> str:
        """Wait until a job is in one of the states, and return that state."""

        def state() -> str | None:
            now = self.job_state(job_id)
            return now if now in states else None

        return self.wait_for(f"job {job_id} {' or '.join(states)}", state, timeout)

    def cancel_all(self) -> None:
        """End all jobs and bring back all nodes, so that the next test finds an idle cluster."""
        for node in self.nodes:
            if f"slurmd-{node}" not in self.daemons:
                self.start_node(node)
        if self.run("squeue", "-h"):
            self.run("scancel", "--user=root")
            kill_all(None, [self._ours, "\0SLURM_JOB_ID="])  # no KillWait for tasks that ignore SIGTERM

        def idle() -> bool:
            if down := ",".join(self.run("sinfo", "-h", "-N", "-p", "main", "-t", "drain,down", "-o", "%N").split()):
                self.run("scontrol", "update", f"NodeName={down}", "State=RESUME")
            return self._idle() and not self.run("squeue", "-h")

        self.wait_for("no jobs, and all nodes idle", idle)

    def stop(self) -> None:
        """End everything that runs with this cluster's configuration: daemons, job steps, tasks and clients."""
        kill_all(f"{self.logs}/", [self._ours])
        super().stop()


def _host() -> str:
    return socket.gethostname().partition(".")[0]
