"""The plan to write a split, checked against the existing content of its folder."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import unquote

import numpy as np

from rsb_cluster.data.index import CLASSES_NAME, INDEX_NAME, ShardIndex, load_index
from rsb_cluster.data.indexing import write_index
from rsb_cluster.data.labels import label_file_name, pack_labels
from rsb_cluster.data.left_out import LeftOut
from rsb_cluster.data.pool import parallel_map
from rsb_cluster.data.recode import Recode
from rsb_cluster.data.scan import ShardScan, scan_shard
from rsb_cluster.data.shard import ImageChange, ShardContents, compare_shard, make_shard, read_sample
from rsb_cluster.data.sources.source import DataSource
from rsb_cluster.data.split_folder import RECORD_FORMAT, SOURCE_NAME, Removal, SplitFolder, abbreviate, shard_name
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.storage.store import Store, as_json

Replace = Literal["nothing", "own", "all"]
Advance = Callable[[int], None]  # called with the number of additional samples

_SHARD_BYTES = 256 << 20  # maximum size of a shard, as each process holds one in memory
_SIZED_SAMPLES = 64  # number of samples whose mean size is taken
_SCANNED_SHARDS = 16  # maximum number of shards that are read, without an index, to report what has changed

# Fields of a record about the samples, and not about how they are stored.
_SAMPLE_FIELDS = ("listing_sha256", "sizes_sha256", "packed", "beside")
# Fields that are unknown for some sources, and missing in the records of earlier versions.
_OPTIONAL_FIELDS = ("sizes_sha256", "packed", "beside")


class SplitPlan:
    """What to write into a folder, and what of it exists. Creating and checking a plan changes nothing.

    Attributes:
        source: The samples.
        removal: The files to delete first; None if there are none.
        remarks: Images that were stored and that the user should look at; known once they are written.
    """

    def __init__(self, source: DataSource, store: Store, shard_samples: int, recode: Recode | None) -> None:
        if shard_samples < 1:
            raise ConfigError(f"a shard cannot hold {shard_samples} samples. Use 1 or more.")
        if not len(source):
            raise ConfigError(f"there are no samples to write to {store.url}. Check the source.")
        self.source = source
        self.removal: Removal | None = None
        self.remarks = LeftOut()
        self._store, self._recode, self._shard_samples = store, recode, shard_samples
        self._beside = {CLASSES_NAME: as_json(list(source.classes))} if source.classes else {}
        self._beside |= {label_file_name(name): pack_labels(content) for name, content in source.labels.items()}
        self._record = _new_record(source, shard_samples, recode, self._beside)
        self._sizes = () if recode else source.sizes  # as they will be stored
        self._folder = SplitFolder.read(store)
        self._index: ShardIndex | None = None
        self._kept: dict[str, ShardScan] = {}

    @property
    def samples_kept(self) -> int:
        """Number of samples in shards that are kept."""
        return len(self.source) if self._index is not None else sum(len(scan.labels) for scan in self._kept.values())

    def check(self, replace: Replace, by_bytes: bool, workers: int | None, advance: Advance) -> None:
        """Refuse a folder that must not be written to, and find the shards that can be kept."""
        folder = self._folder
        self.check_location()
        if folder.entries and not folder.record and replace != "all":
            index = f"rsb-cluster shards index {shlex.quote(folder.store.url)}"
            hint = f" To train on these shards, run: {index}" if folder.tars else ""
            raise ConfigError(
                f"{folder.store.url} holds {abbreviate(sorted(folder.entries))}, which were not made by this command. "
                f"Choose another folder; or add --overwrite to 'shards make' to replace the shards in this one.{hint}"
            )
        if replace != "nothing" or folder.record.get("removing"):
            self._plan_removal(replace)
        elif folder.tars or INDEX_NAME in folder.entries:
            self._check_record()
            if INDEX_NAME in folder.entries:
                self._check_index(by_bytes, workers, advance)
                return
            self._find_kept_shards(by_bytes, workers, advance)
        self._refuse_name_conflicts(replace)

    def write(self, workers: int | None, advance: Advance) -> ShardIndex:
        """Write what is missing."""
        if self._index is not None:
            return self._index
        store, source = self._store, self.source
        if self.removal is not None:
            self._remove(self.removal)
        store.write_json(SOURCE_NAME, {**self._record, "shards": len(self._shards)})
        if self._folder.record:
            _remove_unfinished(store)
        scans = dict(self._kept)
        missing = [name for name in self._shards if name not in scans]
        contents = [self._shards[name] for name in missing]
        for name, made in zip(
            missing, parallel_map(make_shard, [store] * len(missing), missing, contents, workers=workers), strict=True
        ):
            scans[name] = made.scan
            self.remarks.merge(made.remarks)
            advance(len(made.scan.labels))
        in_order = [scans[name] for name in self._shards]
        _refuse_repeated_keys(in_order)
        for name, content in self._beside.items():
            store.write_bytes(name, content)
        return write_index(store, list(self._shards), in_order, source.classes)

    @cached_property
    def _shards(self) -> dict[str, ShardContents]:
        """The contents of each shard, by its name."""
        source, order = self.source, self.source.order()
        first = sorted(order[:_SIZED_SAMPLES].tolist())
        sizes = [self._stored_size(source.entries[i]) for i in first]
        per_shard = min(self._shard_samples, max(1, _SHARD_BYTES // max(1, sum(sizes) // len(sizes))))
        shards = {}
        for number, start in enumerate(range(0, len(order), per_shard)):
            chosen = order[start : start + per_shard]
            places = np.argsort(chosen)
            numbers = chosen[places].tolist()
            shards[shard_name(number)] = ShardContents(
                source.read,
                source.show,
                source.description,
                self._recode,
                [source.entries[i] for i in numbers],
                places.tolist(),
                [self._sizes[i] for i in numbers] if self._sizes else (),
            )
        return shards

    def _stored_size(self, entry: Any) -> int:
        source = self.source
        return len(read_sample(source.read, self._recode, entry, source.show, source.description)[1])

    # --- checks ---

    def check_location(self) -> None:
        """Refuse a folder that lies in one from which the images are read, and what is no folder."""
        if not self._store.is_local:
            return
        path = Path(self._store.url)
        for folder in (path, path.parent):
            if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
                raise ConfigError(f"{folder} is not a folder. Choose another one.")
        read = self.source.folder
        if read is not None and path.resolve().is_relative_to(read.resolve()):
            raise ConfigError(f"{path} lies in {read}, from which the images are read. Choose a folder outside of it.")

    def _plan_removal(self, replace: Replace) -> None:
        folder = self._folder
        own = folder.own_files(self._beside)
        foreign: list[str] = []
        if replace == "all":
            needed = {SOURCE_NAME, INDEX_NAME, CLASSES_NAME, *self._beside, *folder.tars}
            foreign = sorted(needed.intersection(folder.files).difference(own))
        removed = tuple(name for name in own if name != SOURCE_NAME)
        if removed or foreign:
            self.removal = Removal(folder.store.url, removed, tuple(foreign))

    def _check_record(self) -> None:
        """Refuse shards that were made with other settings, or from other images."""
        now, before = self._record, self._folder.record
        differing = [
            name for name in now if now[name] != before.get(name, now[name] if name in _OPTIONAL_FIELDS else None)
        ]
        changes = [f"{name} was {before.get(name)}, is {now[name]}" for name in differing if name not in _SAMPLE_FIELDS]
        if "listing_sha256" in differing or "sizes_sha256" in differing:
            what = "the list of images, or their classes," if "listing_sha256" in differing else "the sizes of images"
            changes += self._image_changes() or [f"{what} changed, and the existing shards do not tell how"]
        if "packed" in differing:
            changes += _packed_changes(before["packed"], now["packed"])
        if "beside" in differing:
            names = sorted({name for name, _ in before["beside"].items() ^ now["beside"].items()})
            changes.append(f"the content of {abbreviate(names)}")
        if changes:
            self._refuse(changes)

    def _check_index(self, by_bytes: bool, workers: int | None, advance: Advance) -> None:
        """Compare the images with a complete split; its index has the size of each."""
        index, source = load_index(self._store), self.source
        if index.num_samples != len(source):
            counts = f"the index has {index.num_samples:,} images, and the source {len(source):,}"
            self._refuse(self._image_changes() or [counts])
        if self._sizes and not np.array_equal(np.asarray(self._sizes)[source.order()], index.image_sizes):
            self._refuse(self._image_changes() or ["the order of images"])
        sizes = self._store.sizes()
        if missing := [name for name in index.shards if not self._folder.entries.get(name)]:
            self._refuse([f"shards that are missing: {abbreviate(missing)}"])
        wanted = zip(index.shards, index.shard_bytes.tolist(), strict=True)
        if damaged := [name for name, size in wanted if sizes.get(name, size) != size]:
            self._refuse([f"shards that have another size since: {abbreviate(damaged)}"])
        if by_bytes:
            self._compare(list(self._shards), by_bytes, workers, advance)
            different = [name for name in self._shards if name not in self._kept]
            if different:
                self._refuse([f"shards with other samples: {abbreviate(different)}"])
        self._index = index

    def _find_kept_shards(self, by_bytes: bool, workers: int | None, advance: Advance) -> None:
        """Find the complete shards of a make that was killed."""
        own = set(self._folder.shards())
        self._compare([name for name in self._shards if name in own], by_bytes, workers, advance)

    def _compare(self, names: Sequence[str], by_bytes: bool, workers: int | None, advance: Advance) -> None:
        """Keep the shards with the expected samples; refuse images that differ from those in the shards."""
        changes: list[ImageChange] = []
        contents = [self._shards[name] for name in names]
        stores, flags = [self._store] * len(names), [by_bytes] * len(names)
        for name, found in zip(
            names, parallel_map(compare_shard, stores, names, contents, flags, workers=workers), strict=True
        ):
            changes += found.changes
            if found.scan is not None:
                self._kept[name] = found.scan
                advance(len(found.scan.labels))
        if changes:
            what = "images with other content" if by_bytes else "images with another size"
            self._refuse([f"{what}: {abbreviate(map(self._describe, changes))}"])

    def _refuse(self, changes: Sequence[str]) -> NoReturn:
        folder = self._folder
        found = [INDEX_NAME] * (INDEX_NAME in folder.entries) + folder.tars
        raise ConfigError(
            f"{folder.store.url} already holds {found[0]} ({len(found)} such files), made from other images or "
            f"settings: {'; '.join(changes)}. To replace them, add --remake to 'shards make'; or choose another folder."
        )

    def _refuse_name_conflicts(self, replace: Replace) -> None:
        """Refuse if a name that must be written is that of a folder or of a foreign file."""
        folder = self._folder
        if not folder.entries:
            return
        own = set(folder.own_files(self._beside))
        for name in (SOURCE_NAME, *self._shards, *self._beside, INDEX_NAME):
            is_file = folder.entries.get(name)
            if is_file is False or (is_file and name not in own and replace != "all"):
                raise ConfigError(
                    f"{folder.store.locate(name)} is in the way, and was not made by this command. Move it, or choose "
                    "another folder."
                )

    def _image_changes(self) -> list[str]:
        """Describe the images that differ from those in the shards, as far as this is known."""
        source = self.source
        stored, is_complete = self._stored_images()
        now = {key: number for number, key in enumerate(source.keys())}
        if not stored or not now:
            return []
        comparable = self._sizes if self._folder.record["max_side"] is None else ()
        found = {
            "images with another size": [
                self._describe(ImageChange(source.entries[now[key]], stored[key], size))
                for key, size in zip(now, comparable, strict=False)
                if stored.get(key, size) != size
            ],
            "images that are new": [
                source.show(source.entries[number]) for key, number in now.items() if is_complete and key not in stored
            ],
            "images that are gone": [unquote(key) for key in stored if key not in now],
        }
        return [f"{what}: {abbreviate(names)}" for what, names in found.items() if names]

    def _stored_images(self) -> tuple[dict[str, int], bool]:
        """Return the sizes of the stored images by key, in bytes, and whether these are all images."""
        folder = self._folder
        if folder.entries.get(INDEX_NAME):
            with suppress(DataError):
                index = load_index(self._store)
                return {index.key(i): size for i, size in enumerate(index.image_sizes.tolist())}, True
        found: dict[str, int] = {}
        for name in folder.shards()[:_SCANNED_SHARDS]:
            with suppress(DataError):
                scan = scan_shard(self._store, name)
                keys = (key.decode("utf-8", "surrogateescape") for key in scan.keys)
                found |= dict(zip(keys, scan.spans[:, 3].tolist(), strict=True))
        return found, False

    def _describe(self, change: ImageChange) -> str:
        return f"{self.source.show(change.entry)} ({change.now:,} bytes, were {change.before:,})"

    def _remove(self, removal: Removal) -> None:
        """Delete files in an order in which the rest is never mistaken for a complete data set."""
        record = self._folder.record
        if record:
            self._store.write_json(SOURCE_NAME, {**record, "removing": True})
        # The index first: without it the rest is no data set.
        for name in sorted((*removal.own, *removal.foreign), key=lambda name: name != INDEX_NAME):
            self._store.delete_file(name)


def _new_record(
    source: DataSource, shard_samples: int, recode: Recode | None, beside: Mapping[str, bytes]
) -> dict[str, Any]:
    """Return everything the bytes of the shards depend on, without paths and times: they differ for a copy."""
    import PIL

    record = {
        "format": RECORD_FORMAT,
        "data_set": source.data_set,
        "samples": len(source),
        "classes": len(source.classes),
        "listing_sha256": source.listing(),
        "shard_samples": shard_samples,
        "max_side": recode.max_side if recode else None,
        "quality": recode.quality if recode else None,
        "pillow": PIL.__version__,  # its encoders can differ between versions
        "beside": {name: hashlib.sha256(content).hexdigest() for name, content in beside.items()},
    }
    if source.sizes:
        record["sizes_sha256"] = hashlib.sha256(np.asarray(source.sizes, dtype="<i8").tobytes()).hexdigest()
    if source.packed:
        record["packed"] = dict(source.packed)
    return record


def _packed_changes(before: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    found = {
        "files with another size": [
            f"{name} ({now[name]:,} bytes, were {before[name]:,})"
            for name in sorted(now.keys() & before.keys())
            if now[name] != before[name]
        ],
        "files that are new": sorted(now.keys() - before.keys()),
        "files that are gone": sorted(before.keys() - now.keys()),
    }
    return [f"{what}: {abbreviate(names)}" for what, names in found.items() if names]


def _remove_unfinished(store: Store) -> None:
    """Delete the temporary files of a make that was killed. An object store has none."""
    if store.is_local:
        for path in Path(store.url).glob(".shard-*.tar.*.tmp"):
            if path.is_file():
                path.unlink()


def _refuse_repeated_keys(scans: Sequence[ShardScan]) -> None:
    seen: set[bytes] = set()
    for scan in scans:
        for key in scan.keys:
            if key in seen:
                raise ConfigError(f"the key '{key.decode()}' occurs twice. Keys must be unique in the set.")
            seen.add(key)
