"""A real Slurm whose nodes are separate hosts: each has its own network, name, processes and mounts.

They are Linux namespaces behind one switch, so a host can be killed with all that runs on it, lose its slurmd alone,
or be cut off from the network while its processes go on.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.servers.daemons import GUARD_S, free_ports, missing_tools
from tests.servers.network import Switch
from tests.servers.slurm import TOOLS, SlurmCluster

# No accounting, as on many small clusters. SIGUSR2, which a job asks for ahead of its time limit, announces a
# preemption here as well. A host that says nothing for SlurmdTimeout seconds is down, and its jobs are requeued.
SITE = """\
SlurmdTimeout=10
SlurmctldParameters=preempt_send_user_signal
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none"""

NODE = "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs=4 RealMemory=8000 State=UNKNOWN"

# Waits for its network, then runs slurmd as a child: init (this shell) outlives it, and with init the ranks. There is
# no name server; an empty resolv.conf spares each look-up the wait for one.
BOOT = """\
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
hostname {name}
mount --bind {root}/hosts /etc/hosts; mount --bind /dev/null /etc/resolv.conf
ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up; ip route add default via {gateway}
slurmd -D -N {name} &
wait
exec sleep infinity
"""


class SlurmHosts(SlurmCluster):
    """Slurm with hosts h1..hN of 4 CPUs each; partition ``main`` preempts partition ``spot``.

    All share this machine's file systems, as a cluster's nodes share theirs, whatever happens to their network.
    """

    node_line, site, boot = NODE, SITE, BOOT

    def __init__(self, nodes: int = 4) -> None:
        super().__init__(nodes)
        self.nodes = [f"h{index}" for index in range(1, nodes + 1)]
        self.switch = Switch(self)
        self._addresses = {node: f"{self.switch.subnet}.{10 + index}" for index, node in enumerate(self.nodes, 1)}

    @staticmethod
    def unavailable() -> list[str]:
        """What this machine lacks for a cluster; empty if it can run one."""
        return missing_tools([*TOOLS, "ip", "nsenter", "unshare"])

    def start(self) -> None:
        """Start the switch, all daemons and hosts, and wait until all hosts are idle."""
        self._write_config()
        self.switch.start()
        self._start_munged()
        self._start_slurm()

    def _write_config(self) -> None:
        ctld_port, port = free_ports(2)
        nodes = [
            self.node_line.format(name=name, address=address, port=port) for name, address in self._addresses.items()
        ]
        self._write_slurm_conf(self.switch.gateway, ctld_port, self.site.format(root=self.root), nodes)
        known = [f"{address} {name}" for name, address in self._addresses.items()]
        self._write("hosts", "\n".join(["127.0.0.1 localhost", *known, ""]), 0o644)

    def start_node(self, node: str) -> None:
        """Boot a host and plug it into the switch."""
        boot = self.boot.format(name=node, root=self.root, address=self._addresses[node], gateway=self.switch.gateway)
        self.switch.boot(
            f"slurmd-{node}", node, "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc",
            "bash", "-c", boot,
        )  # fmt: skip

    def kill_node(self, node: str) -> None:
        """Lose a host at once, as in a power cut, with all that runs on it."""
        self.kill_daemon(f"slurmd-{node}")

    def kill_slurmd(self, node: str) -> None:
        """End a host's slurmd alone: the jobs there go on, and the controller will think that they are gone."""
        (init,) = _children(self.daemons[f"slurmd-{node}"].pid)
        (slurmd,) = [pid for pid in _children(init) if Path(f"/proc/{pid}/comm").read_text().strip() == "slurmd"]
        os.kill(slurmd, signal.SIGKILL)

    def cut_off(self, node: str) -> None:
        """Unplug a host's network; what runs there goes on."""
        self.switch.set_port(node, "down")

    def rejoin(self, node: str) -> None:
        """Plug it in again."""
        self.switch.set_port(node, "up")

    def reboot(self, node: str) -> None:
        """Kill a host and boot it again, whatever state it is in."""
        self.kill_node(node)
        self.start_node(node)

    def wait_until_down(self, node: str, timeout: float = GUARD_S) -> None:
        """Wait until the controller has given a host up."""

        def down() -> bool | None:
            return self.run("sinfo", "-h", "-N", "-n", node, "-p", "main", "-o", "%T").startswith("down") or None

        self.wait_for(f"{node} is down", down, timeout)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
