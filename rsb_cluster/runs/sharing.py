"""Who may read what stands in a folder of runs, on file systems: its owner alone, or also a group (``job.share``).

- A run's folder is private (0700), or its group may read it (2750): the group of the folder of runs. All that is
  written into it later, by whatever process, has the same permissions (`rsb_cluster.storage.local_files`).
- What lies beside the runs (``sweeps``, ``evaluations``, ``submissions``) can be read by all who can read the folder
  of runs. All who can add runs can add to it, but remove or replace only what is theirs.
- ``submissions/<user>`` is written by its owner alone, as nodes unpickle what lies there.

In an object store the bucket's policy decides.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rsb_cluster.config.job import Job
from rsb_cluster.errors import AccessError, ConfigError
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.local_files import READABLE, REPLACEABLE, describe_access, exists, user_name
from rsb_cluster.storage.store import Store

PRIVATE, GROUP = 0o700, 0o2750


def mode_of(job: Job) -> int:
    """Return the permissions of the folders of a job's runs."""
    return GROUP if job.share == "group" else PRIVATE


def user_folder() -> str:
    """Return the name of this user's folder of scripts."""
    # sbatch drops the backslash of a directory service's DOMAIN\\user.
    return re.sub(r"[\\%]", "-", user_name(os.geteuid()))


def share_run(run: Run) -> None:
    """Let the group of the folder of runs read a run that is there already; nothing is done to another user's."""
    folder = Path(run.url)
    if not run.store.is_local or folder.stat().st_uid != os.geteuid():
        return
    group = folder.parent.stat().st_gid
    for parent, _, names in os.walk(folder):
        for path, mode in ((Path(parent), GROUP), *((Path(parent, name), GROUP & 0o666) for name in names)):
            with suppress(FileNotFoundError):  # an attempt may be writing
                os.chown(path, -1, group, follow_symlinks=False)
                if not path.is_symlink():
                    path.chmod(mode)


def make_common_folder(runs_url: str, *parts: str) -> None:
    """Create a folder beside the runs, and those above it: see the module."""
    store = Store(runs_url)
    if not store.is_local:
        return
    if not store.exists():
        store.check_writable()
    for part in parts:
        parent = Path(store.url).stat().st_mode
        store = store.child(part)
        if parent & REPLACEABLE:
            store.make_folder(stat.S_IMODE(parent) | stat.S_ISGID | stat.S_ISVTX)
        else:
            store.make_folder(stat.S_ISGID | 0o700 | parent & READABLE)


def check_common_folder(runs_url: str, name: str) -> None:
    """Check that this user can add to a folder beside the runs. Raises ConfigError if not."""
    store = Store(runs_url).child(name)
    if store.is_local and store.exists() and not store.is_writable():
        raise ConfigError(
            f"nothing can be added to {store.url}: {describe_access(Path(store.url))}. Use other --runs, or ask for "
            f"'chmod 3770 {shlex.quote(store.url)}', which lets each user of its group add files."
        )


def make_submission_folder(folder: Path, job: Job) -> None:
    """Create the folder of a submission's scripts, pickles and logs: ``<submissions>/<user>/<submission>``."""
    mine = folder.parent
    if not exists(mine.parent):
        make_common_folder(str(mine.parent.parent), mine.parent.name)
    check_submission_folder(mine)
    for store in (Store(mine), Store(folder)):
        store.make_folder(mode_of(job))


def check_submission_folder(folder: Path) -> None:
    """Check that this user can write scripts into ``<submissions>/<user>``, and nobody else.

    Raises:
        ConfigError: It cannot be made or written, or others can write there.
    """
    advice = "Use --set job.submissions=FOLDER"
    try:
        found = next(path for path in (folder, *folder.parents) if exists(path))
        if not os.access(found, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError
    except PermissionError as error:
        raise ConfigError(
            f"scripts and logs cannot be written to {folder}: {describe_access(folder)}. {advice}, or ask for "
            f"'chmod 3770 {shlex.quote(str(folder.parent))}', which lets each user of its group add a folder."
        ) from error
    status = folder.stat() if found == folder else None
    if status and (status.st_mode & REPLACEABLE or (os.geteuid() and status.st_uid != os.geteuid())):
        raise ConfigError(
            f"scripts and pickles, which nodes execute, would be written to {folder}, where others can write: "
            f"{describe_access(folder)}. {advice}, or make it yours alone (chmod go-w)."
        )


def check_can_share(runs_url: str, job: Job) -> None:
    """Check that a group can be given what a job shares with it.

    Raises:
        ConfigError: This user is not in the group of the folder of runs, or the group cannot enter that folder.
    """
    folder = Path(runs_url)
    if job.share != "group" or not Store(runs_url).is_local or not exists(folder):
        return
    status = folder.stat()
    what = f"job.share = 'group': {folder} has mode {stat.S_IMODE(status.st_mode):o} and group {status.st_gid}"
    if os.geteuid() and status.st_gid not in (os.getegid(), *os.getgroups()):
        raise ConfigError(f"{what}, which is none of yours. Have it changed (chgrp), or use other --runs.")
    if status.st_mode & 0o050 != 0o050:
        raise ConfigError(
            f"{what}, which cannot read it. Use 'chmod 2750 {shlex.quote(str(folder))}', or 3770 if others are to add "
            "runs, too."
        )


def why_unreadable(run: Run, error: AccessError) -> str:
    """Return why a run cannot be read: it is another user's, or the error itself."""
    owner = other_owner(run)
    return f"it belongs to {owner}, who does not share it (--share group)" if owner else str(error)


def other_owner(run: Run) -> str:
    """Return the name of the owner of a run's folder, if that is another user; else an empty string."""
    if run.store.is_local:
        try:
            uid = Path(run.url).stat().st_uid
        except OSError:
            return ""
        if uid != os.geteuid():
            return user_name(uid)
    return ""


@contextmanager
def umask_of(job: Job) -> Iterator[None]:
    """Set the umask of what submitit, Slurm and the ranks write themselves: they have it from who submits."""
    if job.share != "group":
        yield
        return
    before = os.umask(0o777 & ~(GROUP & 0o777))
    try:
        yield
    finally:
        os.umask(before)
