"""A Slurm that is reached by ssh: an sshd on loopback is its login node, and home is a folder that all hosts see."""

from __future__ import annotations

from pathlib import Path

from tests.servers.daemons import free_ports, listening
from tests.servers.hosts import BOOT, SlurmHosts

SSHD_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {root}/ssh/host
AuthorizedKeysFile {root}/ssh/user.pub
PidFile none
StrictModes no
MaxStartups 200
MaxSessions 200
SetEnv {env}
Subsystem sftp internal-sftp
"""

# As on the login node, root has another home; ~root, too, is not this machine's.
_HOME = "mount --bind {root}/passwd /etc/passwd"


class SlurmByLogin(SlurmHosts):
    """Hosts and a login node.

    Args:
        env: Added to the environment of sessions there.

    ``ssh_config`` has what a client needs to know, for the host ``lab``.
    """

    name = "lab"
    boot = BOOT.replace("slurmd -D", f"{_HOME}\nslurmd -D")

    def __init__(self, env: dict[str, str]) -> None:
        super().__init__()
        self.home = self.root / "home"
        self._sessions = self.env | env
        (self._port,) = free_ports(1)
        self.ssh_config = (
            f"Host {self.name}\n  HostName 127.0.0.1\n  Port {self._port}\n  User root\n"
            f"  IdentityFile {self.root}/ssh/user\n"
        )

    def start(self) -> None:
        """Start the cluster, then the login node."""
        super().start()
        for key in ("host", "user"):
            self.command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{self.root}/ssh/{key}")
        env = " ".join(f"{name}={value}" for name, value in self._sessions.items())
        self._write("ssh/sshd_config", SSHD_CONFIG.format(port=self._port, root=self.root, env=env), 0o644)
        mounts = _HOME.format(root=self.root)
        sshd = f"{mounts}; mkdir -p /run/sshd; exec $(command -v sshd) -D -e -f {self.root}/ssh/sshd_config"
        self.spawn("sshd", "unshare", "--mount", "bash", "-c", sshd)
        self.wait_daemon("sshd", lambda: listening(self._port))

    def _write_config(self) -> None:
        super()._write_config()
        self.home.mkdir()
        (self.root / "ssh").mkdir()
        self._write("passwd", Path("/etc/passwd").read_text().replace("root:/root:", f"root:{self.home}:"), 0o644)
