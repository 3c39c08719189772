"""Write shards: the same samples give the same bytes, and a half-made set is never taken for a whole one.

A part of a set is planned, made and closed:

1. ``source.json`` says what the part is made from and how. It is the first file.
2. Each shard is written whole by one process. Which samples it holds is known before, so neither the number of
   processes nor their speed changes a byte.
3. ``classes.json``, ``labels-*.json`` and, last, the index.

A make that was killed is made again by the same command: with the same ``source.json`` the shards that are there are
read and kept, with another one it is refused. A part that has its index is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from rsb_cluster.data.index import (
    CLASSES_NAME,
    INDEX_NAME,
    Progress,
    ShardIndex,
    load_index,
    shard_names,
    write_index,
)
from rsb_cluster.data.labels import label_files, write_labels
from rsb_cluster.data.pool import each
from rsb_cluster.data.recode import Recode
from rsb_cluster.data.scan import ShardScan
from rsb_cluster.data.shard import Contents, make_shard, read_sample
from rsb_cluster.data.sources.source import Source
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage import Store

SHARD_SAMPLES = 1000
SOURCE_NAME = "source.json"

_SHARD_BYTES = 256 << 20  # more than that in a shard would be much to hold in memory, once per process
_SIZED_SAMPLES = 64  # of which the mean size is taken


def make_set(
    sources: Mapping[str, Source],
    dest: Store,
    *,
    shard_samples: int = SHARD_SAMPLES,
    workers: int | None = 1,
    recode: Recode | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, ShardIndex]:
    """Write a set: a folder with a data set in each of its sub-folders, ``train/`` and ``val/``.

    Args:
        sources: What goes into each sub-folder (see `rsb_cluster.data.sources.open_set`). A sub-folder that is not
            named here is left as it is.
        dest: The set's folder.
        shard_samples: As in `make_shards`, like the three that follow.
        workers: Processes that each make shards.
        recode: How to make images smaller.
        overwrite: Replace the shards that are in the sub-folders written to.
        progress: Called with the number of samples written, over all sub-folders, and their total.

    Returns:
        The index of each sub-folder.

    Raises:
        ConfigError: The sub-folders would not have the same classes, or one holds other shards already; in both cases
            nothing has been changed.
        DataError: A source breaks the rules for samples.
        StorageError: The folder could not be written.
    """
    _check_same_classes(sources, dest)
    plans = {
        split: _Plan(source, dest.child(split), shard_samples, recode, overwrite) for split, source in sources.items()
    }
    total = sum(len(source) for source in sources.values())
    indices: dict[str, ShardIndex] = {}
    for split, plan in plans.items():
        before = sum(index.num_samples for index in indices.values())

        def advance(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        indices[split] = plan.carry_out(workers, advance)
    return indices


def make_shards(
    source: Source,
    store: Store,
    *,
    shard_samples: int = SHARD_SAMPLES,
    workers: int | None = 1,
    recode: Recode | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ShardIndex:
    """Write a source as shards ``shard-000000.tar``, ...; then the class names, and the index last.

    The samples are shuffled (see `Source.order`). Shards that are sorted by class are the classic mistake: training
    shuffles within a few thousand samples at a time, so every batch would hold a few classes only, and BatchNorm and
    the optimizer would see one class after the other.

    Args:
        source: The samples.
        store: The folder.
        shard_samples: At most so many samples a shard; fewer where images are so large that it would have more than
            256 MiB. A process holds one shard in memory, twice.
        workers: Processes that each make shards (see `rsb_cluster.data.pool.each`).
        recode: How to make images smaller; None keeps all files as they are.
        overwrite: Replace what is there: *every* ``*.tar`` directly in the folder is deleted.
        progress: Called after each shard with the number of samples written and the total.

    Raises:
        ConfigError: The folder holds other shards already and ``overwrite`` is false; or a key, extension or class
            cannot be stored; or there are no samples.
        DataError: The shards break a rule.
        StorageError: The folder could not be written.
    """
    return _Plan(source, store, shard_samples, recode, overwrite).carry_out(workers, progress)


def source_of(store: Store) -> dict[str, Any]:
    """Return what a part was made from, empty where that is not known: ``data_set``, ``samples``, ``max_side``, ..."""
    return cast(dict[str, Any], store.read_json(SOURCE_NAME)) if store.exists(SOURCE_NAME) else {}


class _Plan:
    """What is to be written into a folder. Making one changes nothing; it is refused where other shards are there."""

    def __init__(
        self, source: Source, store: Store, shard_samples: int, recode: Recode | None, overwrite: bool
    ) -> None:
        if shard_samples < 1:
            raise ConfigError(f"a shard of {shard_samples} samples cannot be. Use 1 or more.")
        if not len(source):
            raise ConfigError(f"there are no samples to write to {store.url}. Check the source.")
        self.source, self.store, self.recode, self.overwrite = source, store, recode, overwrite
        self._shard_samples = shard_samples
        self._facts = _facts_of(source, shard_samples, recode)
        self._found = [name for name in store.names() if name == INDEX_NAME or name.endswith(".tar")]
        if self._found and not overwrite:
            self._refuse_other()

    def carry_out(self, workers: int | None, progress: Progress | None) -> ShardIndex:
        """Write what is not there yet."""
        source, store = self.source, self.store
        if self.overwrite:
            store.delete(INDEX_NAME)  # first of all: without it what follows is not taken for a data set
            for name in (*shard_names(store), *label_files(store), CLASSES_NAME, SOURCE_NAME):
                store.delete(name)
        elif INDEX_NAME in self._found:
            return load_index(store)
        store.write_json(SOURCE_NAME, self._facts)
        _remove_unfinished(store)
        shards = self._shards()
        names = [f"shard-{number:06d}.tar" for number in range(len(shards))]
        there = set(shard_names(store))
        scans: list[ShardScan] = []
        done = 0
        for scan in each(make_shard, [store] * len(names), names, shards, [n in there for n in names], workers=workers):
            scans.append(scan)
            done += len(scan.labels)
            if progress is not None:
                progress(done, len(source))
        _refuse_repeated_keys(scans)
        if source.classes:
            store.write_json(CLASSES_NAME, list(source.classes))
        for name, content in source.labels.items():
            write_labels(store, name, content)
        return write_index(store, names, scans, source.classes)

    def _shards(self) -> list[Contents]:
        """Return what each shard is to hold."""
        source, order = self.source, self.source.order()
        first = sorted(order[:_SIZED_SAMPLES].tolist())
        sizes = [len(read_sample(source.read, self.recode, source.entries[i])[1]) for i in first]
        per_shard = min(self._shard_samples, max(1, _SHARD_BYTES // max(1, sum(sizes) // len(sizes))))
        shards = []
        for start in range(0, len(order), per_shard):
            chosen = order[start : start + per_shard]
            places = np.argsort(chosen)
            entries = [source.entries[i] for i in chosen[places].tolist()]
            shards.append(Contents(source.read, self.recode, entries, places.tolist()))
        return shards

    def _refuse_other(self) -> None:
        url, found = self.store.url, self._found
        before = source_of(self.store)
        if not before:
            raise ConfigError(
                f"{url} already holds {found[0]} ({len(found)} such files), which were not made by this command. "
                "Choose another folder, or pass --overwrite to delete them."
            )
        differing = [name for name in self._facts if self._facts[name] != before.get(name)]
        if differing:
            raise ConfigError(
                f"{url} already holds {found[0]} ({len(found)} such files), made otherwise: "
                + "; ".join(f"{name} was {before.get(name)}, is {self._facts[name]}" for name in differing)
                + ". Choose another folder, or pass --overwrite to delete them."
            )


def _facts_of(source: Source, shard_samples: int, recode: Recode | None) -> dict[str, Any]:
    """Return what the bytes of the shards depend on. No path is among it: where data lie does not change them."""
    import PIL

    return {
        "format": 1,
        "data_set": source.data_set,
        "samples": len(source),
        "classes": len(source.classes),
        "listing_sha256": source.listing(),
        "shard_samples": shard_samples,
        "max_side": recode.max_side if recode else None,
        "quality": recode.quality if recode else None,
        "pillow": PIL.__version__,  # what it encodes can differ between versions
    }


def _remove_unfinished(store: Store) -> None:
    """Delete what a killed make had begun to write. In an object store there is no such file."""
    if store.is_local:
        for path in Path(store.url).glob(".shard-*.tar.*.tmp"):
            path.unlink()


def _refuse_repeated_keys(scans: Sequence[ShardScan]) -> None:
    seen: set[bytes] = set()
    for scan in scans:
        for key in scan.keys:
            if key in seen:
                raise ConfigError(f"the key '{key.decode()}' comes twice. Keys must be unique over the set.")
            seen.add(key)


def _check_same_classes(sources: Mapping[str, Source], dest: Store) -> None:
    """Refuse parts of a set in which one number would mean two classes."""
    known = {split: tuple(source.classes) for split, source in sources.items()}
    for split in ("train", "val"):
        path = f"{split}/{CLASSES_NAME}"
        if split not in known and dest.exists(path):
            known[split] = tuple(dest.read_json(path))
    for split, classes in known.items():
        for other, others in known.items():
            if classes and others and classes != others:
                differing = sorted(set(classes) ^ set(others)) or ["their order"]
                raise ConfigError(
                    f"{split} has {len(classes)} classes and {other} has {len(others)}; they differ in: "
                    f"{', '.join(differing[:5])}. Make both from the same list of classes."
                )
