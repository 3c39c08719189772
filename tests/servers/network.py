"""Hosts with a network of their own behind one switch, all on this machine.

The switch is a network namespace that lives as long as the process that holds it: interfaces and addresses vanish with
their processes, even if the tests are killed by -9.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.servers.daemons import Server, ServerError, poll


class Switch:
    """A switch that this machine is plugged into as the gateway.

    Args:
        server: Whose daemons its holder and the hosts are.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        # 198.18.0.0/15 is set aside for testing (RFC 2544): no real network is hidden meanwhile.
        self.subnet = f"198.{random.SystemRandom().choice((18, 19))}.{random.SystemRandom().randrange(256)}"
        self.gateway = f"{self.subnet}.1"
        self._uplink = f"rsb{os.getpid()}-{random.SystemRandom().randrange(1000)}"

    def start(self) -> None:
        holder = self._spawn_namespace("switch", "--net", "sleep", "infinity")
        plug = ("ip", "link", "add", self._uplink, "type", "veth", "peer", "name", "uplink", "netns", str(holder))
        self._server.command(*plug)
        self._ip("link", "add", "switch", "type", "bridge")
        self._ip("link", "set", "switch", "up")
        self._ip("link", "set", "uplink", "master", "switch", "up")
        self._server.command("ip", "addr", "add", f"{self.gateway}/24", "dev", self._uplink)
        self._server.command("ip", "link", "set", self._uplink, "up")

    def boot(self, name: str, port: str, *unshare: str) -> None:
        """Start a host, which is a daemon of the server, and plug it in; its own end of the cable is ``eth0``.

        Args:
            name: The daemon's.
            port: The switch's end of the cable, at most 15 letters.
            unshare: What else it does not share, and its program.
        """
        host = self._spawn_namespace(name, "--net", *unshare)
        # The last one's end of the cable goes with its network, a moment after its death.
        plug = ("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host))
        if not poll(lambda: self._succeeds(plug), 10):
            self._ip(*plug)
        self._ip("link", "set", port, "master", "switch", "up")

    def set_port(self, port: str, state: str) -> None:
        """Plug a cable in (``up``) or out (``down``); what runs on its host goes on."""
        self._ip("link", "set", port, state)

    def _spawn_namespace(self, name: str, *unshare: str) -> int:
        """Start a process in a network of its own, and return its number once it has one."""
        self._server.spawn(name, "unshare", *unshare)
        pid = self._server.daemons[name].pid
        ours, theirs = Path("/proc/self/ns/net"), Path(f"/proc/{pid}/ns/net")
        self._server.wait_daemon(name, lambda: theirs.readlink() != ours.readlink())
        return pid

    def _ip(self, *words: str) -> None:
        pid = self._server.daemons["switch"].pid
        self._server.command("nsenter", f"--net=/proc/{pid}/ns/net", "ip", *words)

    def _succeeds(self, words: tuple[str, ...]) -> bool:
        try:
            self._ip(*words)
        except ServerError:
            return False
        return True
