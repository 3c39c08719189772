"""Checkpoints: folders of files, each with a manifest of sizes and SHA-256 digests that is written last.

A folder without a manifest is not a checkpoint. Reading verifies every file; a damaged checkpoint is quarantined under
the name ``damaged-step-…``, and the previous one is used. This module does not interpret the files.

Each attempt writes into folders of its own, ``step-00001200-a0003``, so an attempt that was wrongly presumed dead
cannot damage the checkpoints of its successor. Its checkpoints beyond its successor's start step are ignored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rsb_cluster.errors import CheckpointError, MissingError, StorageError
from rsb_cluster.storage.local_files import Buffer
from rsb_cluster.storage.store import Store

MANIFEST = "manifest.json"
# Names the last step that an attempt saved: on NFS the listing of another machine may lack its folder for a minute.
_LAST = ".last-a{attempt:04d}.json"
DAMAGED = "damaged-"
_FOLDER = re.compile(r"step-(\d+)-a(\d+)")

log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class CheckpointId:
    """The identity of a checkpoint.

    Attributes:
        step: Optimizer steps done.
        attempt: Number of the attempt that wrote it.
    """

    step: int
    attempt: int

    @property
    def folder(self) -> str:
        """Name of the checkpoint's folder."""
        return f"step-{self.step:08d}-a{self.attempt:04d}"

    @staticmethod
    def of(folder: str) -> CheckpointId | None:
        """Return the identity of the checkpoint in a folder; None if the name is not that of a checkpoint's folder."""
        match = _FOLDER.fullmatch(folder)
        return CheckpointId(int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class Checkpoint:
    """A complete and verified checkpoint.

    Attributes:
        saved: Its identity.
        files: Content by file name.
    """

    saved: CheckpointId
    files: Mapping[str, bytes]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.saved.step


def write(
    store: Store, saved: CheckpointId, files: Mapping[str, Buffer], *, before_manifest: Callable[[], None]
) -> None:
    """Write a checkpoint; it exists as soon as its manifest does.

    If the attempt has saved this step before, the new files get other names, so the old checkpoint stays valid until
    the new manifest replaces the old one.

    Args:
        store: The run's ``checkpoints`` folder.
        saved: Identity of the checkpoint.
        files: Content by file name.
        before_manifest: Called after all files are written; if it raises, there is no checkpoint.
    """
    folder = saved.folder
    entries: dict[str, dict[str, Any]] = {}
    exists = store.exists(f"{folder}/{MANIFEST}")
    for name, content in files.items():
        sha256 = hashlib.sha256(content).hexdigest()
        file = f"{sha256[:16]}-{name}" if exists else name
        store.write_bytes(f"{folder}/{file}", content)
        entries[name] = {"file": file, "bytes": len(content), "sha256": sha256}
    before_manifest()
    store.write_json(f"{folder}/{MANIFEST}", {"step": saved.step, "attempt": saved.attempt, "files": entries})
    if store.is_local:
        with suppress(StorageError):  # there is a checkpoint all the same
            store.write_json(_LAST.format(attempt=saved.attempt), {"step": saved.step})


def list_checkpoints(store: Store, starts: Mapping[int, int]) -> list[CheckpointId]:
    """Return all checkpoints that have a manifest and belong to the run's history, oldest first.

    Args:
        store: The run's ``checkpoints`` folder.
        starts: The start step of each attempt, by its number; later checkpoints of earlier attempts are ignored.
    """
    manifests = (name.rpartition("/") for name in store.files())
    complete = {saved for folder, _, file in manifests if file == MANIFEST and (saved := CheckpointId.of(folder))}
    if store.is_local:
        complete |= {saved for attempt in starts if (saved := _last_saved(store, attempt))}
    return [saved for saved in sorted(complete) if not _is_superseded(saved, starts)]


def _last_saved(store: Store, attempt: int) -> CheckpointId | None:
    """Return the last checkpoint of an attempt, if it is known and still there."""
    try:
        saved = CheckpointId(int(store.read_json(_LAST.format(attempt=attempt))["step"]), attempt)
        return saved if store.can_open(f"{saved.folder}/{MANIFEST}") else None
    except (StorageError, KeyError, TypeError, ValueError):
        return None


def _is_superseded(saved: CheckpointId, starts: Mapping[int, int]) -> bool:
    return any(number > saved.attempt and saved.step > start for number, start in starts.items())


def read(store: Store, saved: CheckpointId) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: A file is missing, or differs from the manifest in size or content.
    """
    folder = saved.folder
    try:
        manifest = json.loads(store.read_bytes(f"{folder}/{MANIFEST}"))
        entries: dict[str, dict[str, Any]] = manifest["files"]
        if (manifest["step"], manifest["attempt"]) != (saved.step, saved.attempt):
            raise CheckpointError(f"the manifest in {store.locate(folder)} is for step {manifest['step']}.")
        files = {}
        for name, entry in entries.items():
            if "/" in entry["file"]:
                raise ValueError(f"{entry['file']!r} is not a file in this folder")
            path = f"{folder}/{entry['file']}"
            content = store.read_bytes(path)
            if len(content) != entry["bytes"]:
                raise CheckpointError(
                    f"{store.locate(path)} has {len(content)} bytes, but {entry['bytes']} in its manifest."
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
    """Return the newest valid checkpoint, or None if there is no checkpoint yet.

    A damaged checkpoint is logged and quarantined as ``damaged-step-…``.

    Args:
        store: The run's ``checkpoints`` folder.
        starts: The start step of each attempt, by its number.

    Raises:
        CheckpointError: There are checkpoints, but all are damaged. Starting from scratch would silently discard
            work, so the user decides.
    """
    candidates = list_checkpoints(store, starts)
    for saved in reversed(candidates):
        try:
            return read(store, saved)
        except CheckpointError as error:
            log.warning("%s The checkpoint is quarantined; the previous one is used.", error)
            _quarantine(store, saved)
    damaged = [name for name in store.names() if name.startswith(DAMAGED)]
    if candidates or damaged:
        raise CheckpointError(
            f"all {len(damaged)} checkpoints in {store.url} are damaged and quarantined as damaged-step-…. "
            "Inspect them, or remove the run's checkpoints folder to restart from step 0."
        )
    return None


def prune(store: Store, starts: Mapping[int, int], *, keep: int, best_step: int) -> None:
    """Remove all but the newest checkpoints and the best, manifest first, so no partly removed folder is a checkpoint.

    Incomplete folders that are older than these, and the folders of superseded attempts, are removed, too.
    """
    complete = list_checkpoints(store, starts)
    kept = complete[-keep:]
    best = [saved for saved in complete if saved.step == best_step][-1:]
    for name in store.names():
        saved = CheckpointId.of(name)
        if saved is None or not kept or saved in kept or saved in best:
            continue
        if saved < kept[0] or _is_superseded(saved, starts):
            store.delete(f"{name}/{MANIFEST}")
            store.delete(name)


def _quarantine(store: Store, saved: CheckpointId) -> None:
    target = f"{DAMAGED}{saved.folder}"
    try:
        store.delete(target)
        store.move(saved.folder, target)
    except StorageError as error:
        log.warning("could not quarantine %s: %s", store.locate(saved.folder), error)
