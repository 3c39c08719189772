"""Locks of this host's GPUs: runs and evaluations on the same GPU run one after the other.

Each GPU has a file that its user locks with flock(2). The kernel releases the lock when the process ends, however it
ends. All users of a host share the folder; a second file, which only its writer can read, names the run.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rsb_cluster.errors import ConfigError, RsbError
from rsb_cluster.node.processes import Process

# Not in TMPDIR, which may be another folder in each shell.
FOLDER = "/tmp/rsb-cluster-gpus"
# Overrides it, for hosts whose users or containers have a /tmp of their own each.
FOLDER_ENV = "RSB_GPU_LOCKS"


POLL_S = 0.5


def visible_gpus(count: int, what: str, option: str) -> list[str]:
    """Return the first GPUs that this shell may use, as entries of ``CUDA_VISIBLE_DEVICES``.

    Args:
        count: How many.
        what: Who asks for so many, for messages: ``job 'local': gpus_per_node = 2``.
        option: The option that asks for fewer.

    Raises:
        ConfigError: There are fewer in the variable. Without it nothing is known of how many there are.
    """
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return [str(i) for i in range(count)]
    # CUDA reads numbers, "GPU-..." and "MIG-..." up to the first entry that is none of these, such as -1.
    entries = (entry.strip() for entry in variable.split(","))
    visible = list(itertools.takewhile(lambda entry: re.fullmatch(r"\d+|(GPU|MIG)-.+", entry), entries))
    if len(visible) < count:
        raise ConfigError(
            f"{what}, but with CUDA_VISIBLE_DEVICES='{variable}' this shell may use {len(visible) or 'none'}. Use "
            f"{option} {len(visible)}, or change the variable."
        )
    return visible[:count]


@contextlib.contextmanager
def hold_gpus(devices: Sequence[str], user: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the locks of GPUs while the block runs, once nobody else does.

    Args:
        devices: Entries of ``CUDA_VISIBLE_DEVICES``.
        user: What uses them, as other processes are told.
        tell: Is told what is waited for, whenever that changes.

    Raises:
        RsbError: The files cannot be made or opened.
    """
    locks, told = GpuLocks(devices), ""
    try:
        while why := locks.try_acquire():
            if why != told:
                tell(why)
                told = why
            time.sleep(POLL_S)
        locks.name_run(user)
        yield
    finally:
        locks.release()


def has_gpu() -> bool:
    """Whether this host has a GPU that this shell may use, as far as nvidia-smi and the environment know."""
    try:
        return bool(visible_gpus(1, "", "") and _list_uuids())
    except ConfigError:
        return False


def gpu_names(devices: Sequence[str]) -> list[str]:
    """Return names of CUDA devices that are the same in all shells of this host.

    Args:
        devices: Entries of ``CUDA_VISIBLE_DEVICES``: numbers in the order of the PCI bus, UUIDs or their beginnings.

    Returns:
        The UUID of each; where nvidia-smi does not know it, the entry itself.
    """
    uuids = _list_uuids() if devices else []

    def name(device: str) -> str:
        if device.isdigit():
            return uuids[int(device)] if int(device) < len(uuids) else device
        matching = [uuid for uuid in uuids if uuid.startswith(device)]
        return matching[0] if len(matching) == 1 else device

    return [name(device) for device in devices]


def _list_uuids() -> list[str]:
    """Return the UUIDs of this host's GPUs, in the order of the PCI bus."""
    try:
        command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


class GpuLocks:
    """The locks of some GPUs, which this process takes all together or not at all.

    Args:
        devices: Entries of ``CUDA_VISIBLE_DEVICES``; none: there is nothing to lock.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self._folder = Path(os.environ.get(FOLDER_ENV) or FOLDER)
        # In one order, so that of several processes that want some of the same GPUs one gets all of its own.
        self._devices = dict(sorted(zip(map(_file_name, gpu_names(devices)), devices, strict=True)))
        self._held: list[int] = []

    def try_acquire(self) -> str:
        """Take all locks, unless another process has one.

        Returns:
            Which GPU is in use by which run; empty if this process has all locks now.

        Raises:
            RsbError: The files cannot be made or opened.
        """
        try:
            for name, device in self._devices.items():
                if not self._try_lock(name):
                    self.release()
                    return f"waits for GPU {device}, in use by {self._holder(name)}"
        except OSError as error:
            self.release()
            raise RsbError(
                f"cannot lock GPUs in {self._folder}: {error.strerror}. Set {FOLDER_ENV} to a folder of this host that "
                "all its users can write."
            ) from error
        return ""

    def release(self) -> None:
        """Release the locks that are held."""
        while self._held:
            os.close(self._held.pop())

    def name_run(self, run_id: str) -> None:
        """Say to other processes of this user which run uses the GPUs."""
        for name in self._devices:
            with contextlib.suppress(OSError):
                path, flags = self._run_file(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
                with os.fdopen(os.open(path, flags, 0o600), "w") as file:
                    file.write(f"{Process.of(os.getpid())} {run_id}")

    def _try_lock(self, name: str) -> bool:
        path = self._folder / name
        _make_shared_folder(self._folder)
        while True:
            descriptor = _open_shared(path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A cleaner of /tmp may have deleted the file since it was opened.
                if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                    self._held.append(descriptor)
                    return True
            except BlockingIOError:
                os.close(descriptor)
                return False
            except OSError:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _holder(self, name: str) -> str:
        with contextlib.suppress(OSError):
            holder, _, run_id = self._run_file(name).read_text().partition(" ")
            process = Process.parse(holder)
            if run_id and process is not None and process.is_alive:
                return run_id
        return "another run"

    def _run_file(self, name: str) -> Path:
        return self._folder / f"{name}.{os.getuid()}"


def _file_name(gpu: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", gpu)


def _make_shared_folder(folder: Path) -> None:
    """Make a folder in which each user can create files, and delete only their own, as in /tmp."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        folder.chmod(0o1777)
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise NotADirectoryError(20, "it is no folder", str(folder))


def _open_shared(path: Path) -> int:
    """Open a file that any user may have made; for reading, as that suffices for a lock."""
    with contextlib.suppress(FileExistsError):
        # In a call of its own, as the kernel may refuse O_CREAT for a file of another user in such a folder.
        if not path.exists():
            created = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
            os.fchmod(created, 0o644)  # whatever the umask
            os.close(created)
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
