"""Removing runs, and what ended runs no longer need.

A plan says what would go; nothing is removed before ``carry_out``. Only folders that our records show to be ours are
touched, and none of a run that is queued, running or unknown, or of another user.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rsb_cluster.errors import RsbError
from rsb_cluster.monitor.actions import active_submissions
from rsb_cluster.monitor.status import Status, has_ended, read_status
from rsb_cluster.runs import checkpoint, sharing
from rsb_cluster.runs.checkpoint import MANIFEST, CheckpointId
from rsb_cluster.runs.run import READERS, Run
from rsb_cluster.runs.sharing import other_owner
from rsb_cluster.runs.snapshot import SUMMARY
from rsb_cluster.storage.store import Store

# What 'delete' keeps: the record of the run, from which tables and curves are made.
_RECORD = re.compile(
    r"(spec|recipe|result|cancelled)\.json|" + re.escape(SUMMARY) + r"|attempts/.*|metrics/.*|submissions/[^/]+\.json"
)
# A submit makes the folders before it submits the job, and may take so long in between.
SUBMITTING_S = 3600.0
# Scripts that no run names may be of a job that could not be recorded; it may wait in the queue for so long.
UNKNOWN_S = 30 * 86400.0
_SCRIPTS = re.compile(r"\d{8}-\d{6}-.+")  # a submit's folder of scripts and logs
_UNFINISHED = re.compile(r"recipe\.json|init/.*|\..*")  # of a submit that was killed before it wrote the spec
_OF_ATTEMPT = re.compile(r"(logs|samples)/(\d{4,})-.*")


class InUseError(RsbError):
    """A run is queued or running, or nobody knows; or it belongs to another user."""


@dataclass(frozen=True)
class Removal:
    """Files that go together.

    Attributes:
        store: The folder that they are in.
        paths: Files and folders in it; empty: the folder itself.
        what: What they are, for display.
        owner: The run's id; of scripts the name of their folder.
        files: Number of files.
        bytes: Their size.
    """

    store: Store
    paths: tuple[str, ...]
    what: str
    owner: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What would be removed.

    Attributes:
        left_alone: Why runs are left alone, by id.
        runs: The runs that something is removed of.
    """

    removals: tuple[Removal, ...]
    left_alone: Mapping[str, str]
    runs: tuple[Run, ...]

    @property
    def bytes(self) -> int:
        """Size of all that would go."""
        return sum(removal.bytes for removal in self.removals)


def plan_delete(runs: Sequence[Run], everything: bool, all_runs: Sequence[Run]) -> Plan:
    """Plan to delete runs.

    Args:
        runs: The runs.
        everything: Also their records: results, metrics, attempts. Else these stay, and with them the run in tables.
        all_runs: All runs in that folder, as one folder of scripts may be of several.

    Raises:
        InUseError: One of the runs is in use, or another user's.
    """
    statuses = read_status(runs)
    problems = {run.run_id: why for run, s in zip(runs, statuses, strict=True) if (why := _why_kept(run, s))}
    if problems:
        raise InUseError("\n".join(f"{run_id} {why}" for run_id, why in problems.items()))

    def of_run(run: Run, status: Status) -> list[Removal]:
        sizes = run.store.sizes()
        if everything:
            return [_removal(run, (), "run", sizes)] if sizes else []
        gone = {name for name in sizes if not _RECORD.fullmatch(name)}
        if status.state != "finished":  # it may be submitted again, and starts from these
            gone = {name for name in gone if not name.startswith("init/")}
        return _by_folder(run, sizes, gone)

    removals = _for_each(runs, statuses, of_run)
    scripts = _scripts(all_runs, lambda run, is_last: run.url in {r.url for r in runs})
    return Plan((*removals, *scripts), {}, tuple(runs))


def plan_prune(runs: Sequence[Run], before: float, all_runs: Sequence[Run], *, orphans: bool) -> Plan:
    """Plan to remove what ended runs no longer need; results, metrics and the last checkpoints stay.

    Args:
        runs: The runs.
        before: Unix time; only runs in which nothing happened since.
        all_runs: All runs in that folder, as one folder of scripts may be of several.
        orphans: Also remove this user's old scripts that no run names.
    """
    statuses = read_status(runs)
    left: dict[str, str] = {}
    chosen: list[tuple[Run, Status]] = []
    for run, status in zip(runs, statuses, strict=True):
        if why := _why_kept(run, status):
            left[run.run_id] = why
        elif (status.updated or _created(run)) < before:
            chosen.append((run, status))
    removals = _for_each([run for run, _ in chosen], [status for _, status in chosen], _prunable)
    whole = {removal.store.url for removal in removals if not removal.paths}
    states = {run.url: status.state for run, status in chosen}
    scripts = _scripts(
        all_runs,
        lambda run, is_last: (
            run.url in whole or states.get(run.url) == "finished" or (run.url in states and not is_last)
        ),
    )
    found = [*removals, *scripts]
    if orphans and all_runs:
        found += _orphans(all_runs, min(before, time.time() - UNKNOWN_S))
    return Plan(tuple(found), left, tuple(run for run, _ in chosen))


def carry_out(plan: Plan, tell: Callable[[int], None] = lambda done: None) -> int:
    """Remove what a plan names; return how many bytes went.

    Raises:
        InUseError: A run was submitted meanwhile; nothing is removed.
        StorageError: Something could not be removed.
    """
    statuses = read_status(plan.runs)
    if busy := [run.run_id for run, s in zip(plan.runs, statuses, strict=True) if _why_kept(run, s)]:
        raise InUseError(f"{', '.join(busy)}: submitted meanwhile. Nothing was removed.")
    done = 0
    for removal in plan.removals:
        _remove(removal)
        done += removal.bytes
        tell(done)
    return done


def _remove(removal: Removal) -> None:
    store = removal.store
    for path in removal.paths:
        if CheckpointId.of(path.rpartition("/")[2]):  # so that no partly removed folder is a checkpoint
            store.delete(f"{path}/{MANIFEST}")
        store.delete(path)
    if not removal.paths:
        for name in store.names():
            if name != "spec.json":  # which makes it a run, and lets the command be sent again
                store.delete(name)
        parent, _, name = store.url.rpartition("/")
        Store(parent).delete(name)


def _why_kept(run: Run, status: Status) -> str:
    """Return why nothing of a run may be removed, as the end of a sentence; empty if it may."""
    job = f" (job {status.job_id})" if status.job_id else ""
    if run.store.is_local and Path(run.url).is_symlink():
        return f"is a link; name the folder itself: {os.path.realpath(run.url)}"
    if status.state == "unknown":
        return f"may be running{job}: {status.cause}"
    if not has_ended(status):
        return f"is {status.state}{job}; cancel it first"
    if status.state == "broken" and not run.exists():
        return f"is not known to be a run: {status.cause}"
    if status.state == "broken" and _may_be_active(run):
        return f"is broken, and may be queued or running; if it is not, remove {run.url} yourself: {status.cause}"
    if status.state == "unreadable":
        return f"cannot be read: {status.cause}"
    if not run.store.is_writable() and status.state != "missing":
        owner = other_owner(run)
        return f"belongs to {owner}, who must do it" if owner else f"cannot be written: {run.url}"
    return ""


def _may_be_active(run: Run) -> bool:
    try:
        return bool(active_submissions([run]))
    except RsbError:
        return True


def _created(run: Run) -> float:
    try:
        return run.spec().created
    except RsbError:
        pass
    try:
        return Path(run.url, "recipe.json").stat().st_mtime  # what a killed submit has left has no spec
    except OSError:
        return time.time()  # broken, or on S3: as if it were new


def _for_each(
    runs: Sequence[Run], statuses: Sequence[Status], find: Callable[[Run, Status], list[Removal]]
) -> list[Removal]:
    with ThreadPoolExecutor(READERS) as pool:
        return [removal for found in pool.map(find, runs, statuses) for removal in found]


def _prunable(run: Run, status: Status) -> list[Removal]:
    """Return what an ended run no longer needs; all of one that never started."""
    sizes = run.store.sizes()
    if status.state == "missing" and "recipe.json" in sizes and all(map(_UNFINISHED.fullmatch, sizes)):
        is_old = time.time() - _created(run) > SUBMITTING_S
        return [_removal(run, (), "left by a killed submit", sizes)] if is_old else []
    if not status.attempt and status.state in ("never started", "cancelled", "gone"):
        if status.updated or time.time() - _created(run) > SUBMITTING_S:
            return [_removal(run, (), "never started", sizes)]
        return []
    if status.state in ("missing", "broken"):
        return []
    attempts = run.attempts()
    is_finished = status.state == "finished"
    gone: dict[str, list[str]] = {}
    for name, what in _old_checkpoints(run, {a.number: a.start_step for a in attempts}, sizes, is_finished):
        gone.setdefault(what, []).append(f"checkpoints/{name}")
    last = max((a.number for a in attempts), default=0)
    for name in sizes:
        match = _OF_ATTEMPT.fullmatch(name)
        if match and (is_finished or int(match[2]) < last):
            gone.setdefault(match[1], []).append(name)
        elif name.startswith("code/"):
            gone["wheels"] = ["code"]
        elif name.startswith("submissions/") and name.count("/") > 1:
            gone.setdefault("submissions", []).append("/".join(name.split("/")[:2]))
    return [_removal(run, tuple(dict.fromkeys(paths)), what, sizes) for what, paths in gone.items()]


def _old_checkpoints(
    run: Run, starts: Mapping[int, int], sizes: Mapping[str, int], is_finished: bool
) -> Iterator[tuple[str, str]]:
    """Yield the folders of checkpoints that are not needed, and what they are.

    Of a finished run its last and its best are kept, of another all from which it can resume.
    """
    complete = checkpoint.list_checkpoints(run.store.child("checkpoints"), starts)
    kept = set(complete)
    if is_finished:
        best = (run.result() or {}).get("best_step")
        kept = {*complete[-1:], *[saved for saved in complete if saved.step == best]}
    for name in sorted(
        {path.split("/")[1] for path in sizes if path.startswith("checkpoints/") and path.count("/") > 1}
    ):
        # Where all were damaged, only these tell the next attempt not to start from step 0.
        if name.startswith(checkpoint.DAMAGED) and (complete or is_finished):
            yield name, "quarantined checkpoints"
        elif (saved := CheckpointId.of(name)) is not None and kept and saved not in kept:
            yield name, "old checkpoints"


def _by_folder(run: Run, sizes: Mapping[str, int], gone: set[str]) -> list[Removal]:
    """Return the removals of files, those of each folder together; checkpoints one by one, then what is left there."""
    folders: dict[str, dict[str, None]] = {}
    for name in sorted(gone):
        parts = name.split("/")
        path = "/".join(parts[:2]) if parts[0] == "checkpoints" else name
        folders.setdefault(parts[0] if len(parts) > 1 else "other files", {})[path] = None
    for folder, paths in folders.items():
        inside = {name for name in sizes if name.startswith(f"{folder}/")}
        if inside and inside <= gone:
            if folder != "checkpoints":
                paths.clear()
            paths[folder] = None
    return [_removal(run, tuple(paths), what, sizes) for what, paths in folders.items()]


def _removal(run: Run, paths: tuple[str, ...], what: str, sizes: Mapping[str, int]) -> Removal:
    named = set(paths)
    chosen = [size for name, size in sizes.items() if not paths or name in named or named & _folders_above(name)]
    return Removal(run.store, paths, what, run.run_id, len(chosen), sum(chosen))


def _folders_above(name: str) -> set[str]:
    return {name[:i] for i, letter in enumerate(name) if letter == "/"}


# --- scripts and logs beside the runs ---------------------------------------------------------------------------------


def _scripts(all_runs: Sequence[Run], may_go: Callable[[Run, bool], bool]) -> list[Removal]:
    """Return the folders of scripts and logs that may go for all runs that were submitted with them.

    Args:
        all_runs: All runs.
        may_go: Whether those of a run may go; the second argument tells whether they are those of its last submit.
    """
    kept: set[Path] = set()
    found: dict[Path, None] = {}
    for run, folders in _folders_of(all_runs):
        for i, folder in enumerate(folders):
            if may_go(run, i == len(folders) - 1):
                found[folder] = None
            else:
                kept.add(folder)
    return [_script_removal(folder) for folder in found if folder not in kept and _is_mine(folder)]


def _folders_of(runs: Sequence[Run]) -> list[tuple[Run, list[Path]]]:
    """Return the folders of scripts of each run, those of the last submit last; of unreadable runs none."""

    def read(run: Run) -> list[Path]:
        try:
            named = [Path(s.folder) for s in run.submissions() if "://" not in s.folder]
        except RsbError:
            return []
        # A job on this machine has a folder in that of its submit.
        return [next((p for p in (path, path.parent) if _SCRIPTS.fullmatch(p.name)), path) for path in named]

    with ThreadPoolExecutor(READERS) as pool:
        return list(zip(runs, pool.map(read, runs), strict=True))


def _orphans(all_runs: Sequence[Run], before: float) -> list[Removal]:
    """Return this user's folders of scripts beside the runs that no run names, and that are old."""
    root = Path(all_runs[0].runs_url, "submissions", sharing.user_folder())
    if not Store(all_runs[0].runs_url).is_local or not root.is_dir():
        return []
    named = {folder for _, folders in _folders_of(all_runs) for folder in folders}
    candidates = [path for path in sorted(root.iterdir()) if _SCRIPTS.fullmatch(path.name) and path not in named]
    return [_script_removal(path) for path in candidates if _is_mine(path) and path.stat().st_mtime < before]


def _is_mine(folder: Path) -> bool:
    try:
        return _SCRIPTS.fullmatch(folder.name) is not None and folder.stat().st_uid == os.geteuid()
    except OSError:
        return False


def _script_removal(folder: Path) -> Removal:
    sizes = Store(folder).sizes()
    return Removal(Store(folder), (), "scripts and logs", folder.name, len(sizes), sum(sizes.values()))


def format_bytes(number: float) -> str:
    """Return ``1.2 GB``, in units of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
