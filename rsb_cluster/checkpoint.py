"""Checkpoints: a folder of files, and a manifest with size and SHA-256 of each, written last.

Without its manifest a folder is not a checkpoint. On reading everything is verified; a damaged checkpoint is put aside
under a name that says so, and the one before is used. What is inside the files is not known here.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsb_cluster.errors import CheckpointError, MissingError, StorageError
from rsb_cluster.storage import Buffer, Store

MANIFEST = "manifest.json"
DAMAGED = "damaged-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete and verified checkpoint.

    Attributes:
        step: Optimizer steps that were done when it was taken.
        files: Content by file name.
    """

    step: int
    files: Mapping[str, bytes]


def folder_name(step: int) -> str:
    """Return the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def write(store: Store, step: int, files: Mapping[str, Buffer]) -> None:
    """Write a checkpoint; it exists from the moment its manifest does.

    Where the step was saved before, other file names are taken, so that the old one is whole until the new one is.

    Args:
        store: The run's ``checkpoints`` folder.
        step: Optimizer steps done.
        files: Content by file name.
    """
    folder = folder_name(step)
    entries: dict[str, dict[str, Any]] = {}
    again = store.exists(f"{folder}/{MANIFEST}")
    for name, content in files.items():
        sha256 = hashlib.sha256(content).hexdigest()
        file = f"{sha256[:16]}-{name}" if again else name
        store.write_bytes(f"{folder}/{file}", content)
        entries[name] = {"file": file, "bytes": len(content), "sha256": sha256}
    store.write_json(f"{folder}/{MANIFEST}", {"step": step, "files": entries})


def steps(store: Store) -> list[int]:
    """Return the steps of all checkpoints that have a manifest, oldest first."""
    found = []
    for name in store.files():
        folder, _, file = name.rpartition("/")
        if file == MANIFEST and folder.startswith("step-") and folder[5:].isdigit():
            found.append(int(folder[5:]))
    return sorted(found)


def read(store: Store, step: int) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: A file is missing, or differs from the manifest in size or content.
    """
    folder = folder_name(step)
    try:
        manifest = json.loads(store.read_bytes(f"{folder}/{MANIFEST}"))
        entries: dict[str, dict[str, Any]] = manifest["files"]
        if manifest["step"] != step:
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
    return Checkpoint(step, files)


def read_latest(store: Store) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None where there is none yet.

    A damaged one is named in the log and put aside as ``damaged-step-…``.

    Raises:
        CheckpointError: Checkpoints are there, but none is whole: starting from scratch would throw work away
            silently, so that is the user's decision.
    """
    candidates = steps(store)
    for step in reversed(candidates):
        try:
            return read(store, step)
        except CheckpointError as error:
            log.warning("%s It is put aside; the one before is used.", error)
            _put_aside(store, step)
    damaged = [name for name in store.names() if name.startswith(DAMAGED)]
    if candidates or damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {store.url} is whole; all were put aside as damaged-step-…. "
            "Look at them, or remove the run's checkpoints folder to start again from step 0."
        )
    return None


def prune(store: Store, keep: int) -> None:
    """Remove all but the newest checkpoints, manifest first: what is half removed is no checkpoint.

    What was begun before the oldest of these and never ended goes, too.
    """
    kept = steps(store)[-keep:]
    for name in store.names():
        if kept and name.startswith("step-") and name[5:].isdigit() and int(name[5:]) < kept[0]:
            store.delete(f"{name}/{MANIFEST}")
            store.delete(name)


def _put_aside(store: Store, step: int) -> None:
    target = f"{DAMAGED}{folder_name(step)}"
    try:
        store.delete(target)
        store.move(folder_name(step), target)
    except StorageError as error:
        log.warning("could not put aside %s: %s", store.locate(folder_name(step)), error)
