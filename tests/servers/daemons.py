"""What both test servers need: free ports, foreground daemons that are ours to kill, and readable start errors."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")

# What hangs is given up then, s. No test passes or fails by the clock: it is ten times what the slowest one takes.
GUARD_S = 1800.0


class ServerError(RuntimeError):
    """A test server did not start, a command on it failed, or something did not happen in time."""


def missing_tools(tools: Iterable[str]) -> list[str]:
    """Say what keeps a server from starting here: absent programs, or not being root."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return missing if os.geteuid() == 0 else [*missing, "root rights"]


def free_ports(count: int) -> list[int]:
    """Pick ports that nobody listens on.

    They lie below Linux's ephemeral range (32768 and up), so no outgoing connection takes one between this
    check and the daemon's own bind; drawn at random, so that two servers starting at once rarely meet.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(12000, 32000), 2000):
        with socket.socket() as probe:
            # As the daemons do: a port whose last connection is still in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise ServerError(f"found only {len(ports)} of {count} free TCP ports")


def listening(port: int, address: str = "127.0.0.1") -> bool:
    """Whether something accepts connections on a port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, port)) == 0


def poll(predicate: Callable[[], T | None], timeout: float = GUARD_S, interval: float = 0.1) -> T | None:
    """Call ``predicate`` until it returns something true, and return that; None when time is up."""
    deadline = time.monotonic() + timeout
    while True:
        if result := predicate():
            return result
        if time.monotonic() > deadline:
            return None
        time.sleep(interval)


def parent(pid: int) -> int:
    """Parent process id, 0 if the process is gone. The name (2nd field) may hold blanks and parentheses."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def kill_all(writers_to: str | None, env: Iterable[str]) -> None:
    """SIGKILL every process that fits, and all its descendants; never this process or its ancestors.

    Fits: one with a file open for writing whose path starts with ``writers_to``, or one whose environment holds all
    of ``env``, each a piece of ``NUL name=value NUL``. Slurm needs both: a slurmstepd is no child of its slurmd (it
    double-forks) and overwrites its environment, but writes to the node's log; a task outlives a killed slurmstepd.
    """
    spared = {os.getpid()}
    ancestor = os.getppid()
    while ancestor > 0:
        spared.add(ancestor)
        ancestor = parent(ancestor)
    for _ in range(50):  # again until none is left: a process may fork while we look
        parents = {int(path.name): parent(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()}
        doomed = {pid for pid in parents if (writers_to and _writes_to(pid, writers_to)) or _has_env(pid, env)} - spared
        while more := {pid for pid, parent in parents.items() if parent in doomed} - doomed:
            doomed |= more
        doomed = {pid for pid in doomed - spared if not _is_zombie(pid)}
        if not doomed:
            return
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def processes_with(env: Iterable[str]) -> list[int]:
    """Return the processes whose environment holds all of ``env``, as in ``kill_all``."""
    wanted = list(env)
    found = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in found if _has_env(pid, wanted) and not _is_zombie(pid)]


def _has_env(pid: int, wanted: Iterable[str]) -> bool:
    """Judge by the environment that the process was started with."""
    try:
        found = b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return all(entry.encode() in found for entry in wanted)


def _writes_to(pid: int, prefix: str) -> bool:
    """Look at the open files; a link's own permission bits tell how its file was opened."""
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if str(link.readlink()).startswith(prefix) and link.lstat().st_mode & 0o200:
                return True
    except OSError:  # the process is gone
        pass
    return False


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Server:
    """A group of foreground daemons in one temporary directory; a context manager that leaves nothing behind."""

    def __init__(self, prefix: str) -> None:
        """Create the directory. In /tmp, whatever TMPDIR says: a Unix socket's path has at most 107 bytes."""
        self.root = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
        self.root.chmod(0o755)  # munge refuses a socket in a directory that others cannot enter
        self.logs = self.root / "log"
        self.logs.mkdir()
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start the daemons and return when they serve; raise ServerError otherwise."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def daemon_env(self) -> dict[str, str]:
        """Environment of the daemons: no settings of other clusters, and no temporary files outside the directory."""
        foreign = ("SLURM", "CEPH", "AWS", "MYSQL")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        return kept | {"TMPDIR": str(self.root), "LC_ALL": "C.UTF-8"}

    def spawn(self, name: str, *argv: str, env: Mapping[str, str] | None = None) -> None:
        """Start one daemon in the foreground, with its output in ``log/<name>.out``.

        ``setpriv --pdeathsig`` execs the daemon and has the kernel kill it with us, should we die without a stop().
        """
        with (self.logs / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                env=self.daemon_env() | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.root,
                start_new_session=True,  # a Ctrl-C in the terminal is for pytest, which then stops us in order
            )

    def wait_daemon(self, name: str, ready: Callable[[], object], timeout: float = GUARD_S) -> None:
        """Wait until a daemon serves; raise at once if it ends before that."""
        daemon = self.daemons[name]
        poll(lambda: daemon.poll() is not None or ready(), timeout, 0.05)
        if daemon.poll() is not None:
            raise ServerError(f"{name} ended with status {daemon.returncode}\n{self.log_tails(name, 30)}")
        if not ready():
            raise ServerError(f"{name} not ready after {timeout} s\n{self.log_tails()}")

    def command(self, *argv: str, env: Mapping[str, str] | None = None, timeout: float = GUARD_S) -> str:
        """Run a program to its end and return its standard output; raise with its standard error if it fails."""
        try:
            done = subprocess.run(
                argv, env=dict(env) if env else self.daemon_env(), capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"{' '.join(argv)}: not done after {timeout} s\n{self.log_tails()}") from error
        if done.returncode:
            raise ServerError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stderr or done.stdout}")
        return done.stdout

    def log_tails(self, only: str = "*", lines: int = 10) -> str:
        """Last lines of the logs, for error messages. A daemon's output repeats its log, if it writes one."""
        tails = []
        for path in sorted(self.logs.glob(f"{only}.*")):
            repeats = path.suffix == ".out" and path.with_suffix(".log").exists()
            if not repeats and (text := path.read_text(errors="replace").strip()):
                tails += [f"--- {path.name}", *text.splitlines()[-lines:]]
        return "\n".join(tails)

    def kill_daemon(self, name: str) -> None:
        """End one daemon and reap it. SIGKILL: all its state is thrown away with the directory."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def stop(self) -> None:
        """End every daemon and remove the directory; harmless when called twice or after half a start."""
        for name in reversed(list(self.daemons)):
            self.kill_daemon(name)
        shutil.rmtree(self.root, ignore_errors=True)
