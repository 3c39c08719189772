"""Checkpoints: a folder of files, and a manifest with size and SHA-256 of each, written last.

Without its manifest a folder is not a checkpoint. On reading everything is verified; a damaged checkpoint is put aside
under a name that says so, and the one before is used. What is inside the files is not known here.

Each attempt writes into folders of its own, ``step-00001200-a0003``: an attempt that was given up for dead, and is not,
cannot touch what its successor writes. What it saves beyond the step where its successor started counts for nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rsb_cluster.errors import CheckpointError, MissingError, StorageError
from rsb_cluster.storage.store import Buffer, Store

MANIFEST = "manifest.json"
DAMAGED = "damaged-"
_FOLDER = re.compile(r"step-(\d+)-a(\d+)")

log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Saved:
    """Which checkpoint: of which step, and by which attempt.

    Attributes:
        step: Optimizer steps that were done when it was taken.
        attempt: Number of the attempt that wrote it.
    """

    step: int
    attempt: int

    @property
    def folder(self) -> str:
        """Its folder's name."""
        return f"step-{self.step:08d}-a{self.attempt:04d}"

    @staticmethod
    def of(folder: str) -> Saved | None:
        """Undo ``folder``."""
        found = _FOLDER.fullmatch(folder)
        return Saved(int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True)
class Checkpoint:
    """A complete and verified checkpoint.

    Attributes:
        saved: Which one.
        files: Content by file name.
    """

    saved: Saved
    files: Mapping[str, bytes]

    @property
    def step(self) -> int:
        """Optimizer steps that were done when it was taken."""
        return self.saved.step


def write(store: Store, saved: Saved, files: Mapping[str, Buffer], *, before_manifest: Callable[[], None]) -> None:
    """Write a checkpoint; it exists from the moment its manifest does.

    Where the attempt saved this step before, other file names are taken, so that the old one is whole until the new
    one is.

    Args:
        store: The run's ``checkpoints`` folder.
        saved: Its step and attempt.
        files: Content by file name.
        before_manifest: Called when all files are there; an exception leaves no checkpoint.
    """
    folder = saved.folder
    entries: dict[str, dict[str, Any]] = {}
    again = store.exists(f"{folder}/{MANIFEST}")
    for name, content in files.items():
        sha256 = hashlib.sha256(content).hexdigest()
        file = f"{sha256[:16]}-{name}" if again else name
        store.write_bytes(f"{folder}/{file}", content)
        entries[name] = {"file": file, "bytes": len(content), "sha256": sha256}
    before_manifest()
    store.write_json(f"{folder}/{MANIFEST}", {"step": saved.step, "attempt": saved.attempt, "files": entries})


def listed(store: Store, starts: Mapping[int, int]) -> list[Saved]:
    """Return all checkpoints that have a manifest and belong to the run's history, oldest first.

    Args:
        store: The run's ``checkpoints`` folder.
        starts: The step at which each attempt started, by its number: beyond it, earlier attempts count for nothing.
    """
    return [saved for saved in _complete(store) if not _is_superseded(saved, starts)]


def _complete(store: Store) -> list[Saved]:
    manifests = (name.rpartition("/") for name in store.files())
    return sorted(saved for folder, _, file in manifests if file == MANIFEST and (saved := Saved.of(folder)))


def _is_superseded(saved: Saved, starts: Mapping[int, int]) -> bool:
    return any(number > saved.attempt and saved.step > start for number, start in starts.items())


def read(store: Store, saved: Saved) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: A file is missing, or differs from the manifest in size or content.
    """
    folder = saved.folder
    try:
        manifest = json.loads(store.read_bytes(f"{folder}/{MANIFEST}"))
        entries: dict[str, dict[str, Any]] = manifest["files"]
        if (manifest["step"], manifest["attempt"]) != (saved.step, saved.attempt):
            raise CheckpointError(f"the manifest in {store.locate(folder)} is of step {manifest['step']}.")
        files = {}
        for name, entry in entries.items():
            if "/" in entry["file"]:
                raise ValueError(f"{entry['file']!r} is no file of this folder")
            path = f"{folder}/{entry['file']}"
            content = store.read_bytes(path)
            if len(content) != entry["bytes"]:
                raise CheckpointError(
                    f"{store.locate(path)} has {len(content)} bytes, its manifest says {entry['bytes']}."
                )
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise CheckpointError(f"{store.locate(path)} does not match its SHA-256.")
            files[name] = content
    except MissingError as error:
        raise CheckpointError(f"the checkpoint {store.locate(folder)} is incomplete: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{store.locate(f'{folder}/{MANIFEST}')} cannot be read: {error!r}.") from error
    return Checkpoint(saved, files)


def read_latest(store: Store, starts: Mapping[int, int]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None where there is none yet.

    A damaged one is named in the log and put aside as ``damaged-step-…``.

    Args:
        store: The run's ``checkpoints`` folder.
        starts: The step at which each attempt started, by its number.

    Raises:
        CheckpointError: Checkpoints are there, but none is whole: starting from scratch would throw work away
            silently, so that is the user's decision.
    """
    candidates = listed(store, starts)
    for saved in reversed(candidates):
        try:
            return read(store, saved)
        except CheckpointError as error:
            log.warning("%s It is put aside; the one before is used.", error)
            _put_aside(store, saved)
    damaged = [name for name in store.names() if name.startswith(DAMAGED)]
    if candidates or damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {store.url} is whole; all were put aside as damaged-step-…. "
            "Look at them, or remove the run's checkpoints folder to start again from step 0."
        )
    return None


def prune(store: Store, starts: Mapping[int, int], *, keep: int, best_step: int) -> None:
    """Remove all but the newest checkpoints and the best, manifest first: what is half removed is no checkpoint.

    What was begun before the oldest of these and never ended goes, too, and what a superseded attempt wrote.
    """
    complete = listed(store, starts)
    kept = complete[-keep:]
    best = [saved for saved in complete if saved.step == best_step][-1:]
    for name in store.names():
        saved = Saved.of(name)
        if saved is None or not kept or saved in kept or saved in best:
            continue
        if saved < kept[0] or _is_superseded(saved, starts):
            store.delete(f"{name}/{MANIFEST}")
            store.delete(name)


def _put_aside(store: Store, saved: Saved) -> None:
    target = f"{DAMAGED}{saved.folder}"
    try:
        store.delete(target)
        store.move(saved.folder, target)
    except StorageError as error:
        log.warning("could not put aside %s: %s", store.locate(saved.folder), error)
