"""Files on the disks of this machine, or on a file system that many machines share, such as NFS.

**Permissions.** In a folder with the set-group-ID bit where nobody can replace what is another's (only its owner writes
there, or it is sticky), new files and folders get its read permissions, whatever the umask. So one such folder decides
who may read all that is below it. Elsewhere the umask decides.

**NFS.** A name is taken by one of several machines, as ``link`` and exclusive creation are decided by the server. A
listing may lack another machine's new file for as long as this machine caches the folder (`acdirmax`, 60 s), but the
file can be opened. A file that is deleted while it is open stays as ``.nfs…`` until it is closed.
"""

from __future__ import annotations

import errno
import io
import os
import pwd
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Buffer = bytes | bytearray | memoryview

READABLE, REPLACEABLE = 0o055, 0o022  # by others than the owner: to list and enter a folder, to write into it
STALE_READS = 3
# What a file system without hard links answers to link.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def read(path: Path) -> bytes:
    """Return a file's content; on NFS again if another machine has replaced the file meanwhile."""
    for _ in range(STALE_READS - 1):
        try:
            return path.read_bytes()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return path.read_bytes()


def write(target: Path, content: Buffer) -> None:
    """Write a file atomically, and the folders that it needs."""
    make_parents(target.parent)
    with _temporary_file(target, content) as temporary:
        temporary.replace(target)


def create(target: Path, content: bytes) -> bool:
    """Write a file if the name is free; return False if it is taken. Exactly one of several machines gets True."""
    make_parents(target.parent)
    with _temporary_file(target, content) as temporary:
        try:
            target.hardlink_to(temporary)
        except FileExistsError:
            # An answer that the network lost is asked for again, and then the name is there: the one of this file.
            return temporary.stat().st_nlink > 1
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_without_links(target, content)
    return True


def _create_without_links(target: Path, content: bytes) -> bool:
    try:
        file = target.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(content)
            _hand_on(target.parent, file.fileno())
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        target.unlink(missing_ok=True)  # a name with half of its content would be taken for ever
        raise
    return True


def open_file(path: Path) -> io.BufferedReader:
    """Open a file for reading (see `open_unbuffered`)."""
    return io.BufferedReader(open_unbuffered(path))


def open_unbuffered(path: Path) -> io.FileIO:
    """Open a file for reading. Raises OSError for a pipe, which would be waited for, or a device."""
    # Without O_NONBLOCK the opening of a pipe waits; files do not know it.
    file = io.FileIO(os.fspath(path), "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.ENXIO, "no regular file", str(path))
    return file


def exists(path: Path) -> bool:
    """Whether a file or folder exists. Raises PermissionError if that cannot be known."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def entries(folder: Path) -> list[tuple[str, bool]]:
    """Return the names in a folder and whether each is a file; empty if there is no folder."""
    return [(entry.name, not _is(entry.is_dir)) for entry in _scan(folder)]


def files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder. Raises PermissionError if a folder cannot be read: its files are not absent."""
    for entry in _scan(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from files(folder / entry.name)
        elif _is(entry.is_file):
            yield folder / entry.name


def sizes(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield all files below a folder, links too, with their sizes in bytes, without those that vanish meanwhile."""
    for entry in _scan(folder):
        with suppress(FileNotFoundError):
            if entry.is_dir(follow_symlinks=False):
                yield from sizes(folder / entry.name)
            else:
                yield folder / entry.name, entry.stat(follow_symlinks=False).st_size


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is(kind: Callable[[], bool]) -> bool:
    """Return what an entry's ``is_dir`` or ``is_file`` does; False for a link to itself."""
    try:
        return kind()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def remove(path: Path) -> None:
    """Remove a file, or a folder and everything in it, if it exists.

    Files that a process still has open may stay on NFS, as ``.nfs…``, and with them the folder: no error, as they go
    when they are closed, and nothing lists them.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            for entry in _scan(path):
                remove(path / entry.name)
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        return  # another process was faster
    except OSError as error:
        if not (path.name.startswith(".nfs") or (error.errno == errno.ENOTEMPTY and _holds_only_deleted(path))):
            raise


def _holds_only_deleted(folder: Path) -> bool:
    return all(path.name.startswith(".nfs") for path in files(folder))


# --- permissions ----------------------------------------------------------------------------------------------------


def handed_on(folder: Path) -> int | None:
    """Return the mode of new folders in a folder that hands on its read permissions; None: the umask decides."""
    mode = folder.stat().st_mode
    if not mode & stat.S_ISGID or (mode & REPLACEABLE and not mode & stat.S_ISVTX):
        return None
    return stat.S_ISGID | 0o700 | mode & READABLE


def make_parents(folder: Path) -> None:
    """Create a folder, and those above it, unless they exist."""
    if folder.is_dir():
        return
    make_parents(folder.parent)
    mode = handed_on(folder.parent)
    try:
        folder.mkdir(0o777 if mode is None else 0o700)
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        if mode is not None:
            folder.chmod(mode)


def make_folder(folder: Path, mode: int) -> None:
    """Create a folder with a mode, whatever the umask; one that is there and this user's gets what it lacks of it.

    With the set-group-ID bit it gets the group of the folder that it is in, if this user is in that group.
    """
    make_parents(folder.parent)
    try:
        folder.mkdir(0o700)
    except FileExistsError:
        found = folder.stat()
        if found.st_uid != os.geteuid() or not mode & ~found.st_mode:
            return
        mode |= stat.S_IMODE(found.st_mode)
    if mode & stat.S_ISGID:
        with suppress(PermissionError):
            os.chown(folder, -1, folder.parent.stat().st_gid)
    folder.chmod(mode)


def describe_access(path: Path) -> str:
    """Return whose a path is, or the first folder above it that can be seen: ``/runs belongs to ann (drwx------)``."""
    for found in (path, *path.parents):
        with suppress(OSError):
            status = found.stat()
            return f"{found} belongs to {user_name(status.st_uid)} ({stat.filemode(status.st_mode)})"
    return f"{path} cannot be seen"


def user_name(uid: int) -> str:
    """Return a user's name; of one that this machine does not know the number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@contextmanager
def _temporary_file(target: Path, content: Buffer) -> Iterator[Path]:
    """Write a temporary file next to the target, and remove it afterwards unless it was renamed."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            _hand_on(target.parent, file.fileno())
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _hand_on(folder: Path, descriptor: int) -> None:
    """Give a new file the read permissions of its folder, if that hands them on."""
    mode = handed_on(folder)
    if mode is not None:
        os.fchmod(descriptor, mode & 0o666)
