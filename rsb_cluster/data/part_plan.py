"""What is to be written into the folder of a part, checked against what lies there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import unquote

import numpy as np

from rsb_cluster.data.index import CLASSES_NAME, INDEX_NAME, ShardIndex, load_index, write_index
from rsb_cluster.data.labels import label_file_name, pack_labels
from rsb_cluster.data.part import RECORD_FORMAT, SOURCE_NAME, Part, Removal, shard_name, shown
from rsb_cluster.data.pool import each
from rsb_cluster.data.recode import Recode
from rsb_cluster.data.scan import ShardScan, scan_shard
from rsb_cluster.data.shard import ImageChange, ShardContents, compare_shard, make_shard, read_sample
from rsb_cluster.data.sources.source import DataSource
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.storage.store import Store, as_json

Replace = Literal["nothing", "own", "all"]
Advance = Callable[[int], None]  # so many samples more

_SHARD_BYTES = 256 << 20  # more than that in a shard would be much to hold in memory, once per process
_SIZED_SAMPLES = 64  # of which the mean size is taken
_SCANNED_SHARDS = 16  # without an index, so many at most are read to say what has changed

# Facts of a record that tell of the samples, and not of how they are stored.
_OF_SAMPLES = ("listing_sha256", "sizes_sha256", "packed", "beside")
# Facts that are not known of all sources, and are not in the records of earlier versions.
_MAY_LACK = ("sizes_sha256", "packed", "beside")


class PartPlan:
    """What is to be written into a folder, and what of it is there already. Making and checking one changes nothing.

    Attributes:
        source: The samples.
        going: What has to go first; None where nothing has.
    """

    def __init__(self, source: DataSource, store: Store, shard_samples: int, recode: Recode | None) -> None:
        if shard_samples < 1:
            raise ConfigError(f"a shard of {shard_samples} samples cannot be. Use 1 or more.")
        if not len(source):
            raise ConfigError(f"there are no samples to write to {store.url}. Check the source.")
        self.source = source
        self.going: Removal | None = None
        self._store, self._recode, self._shard_samples = store, recode, shard_samples
        self._beside = {CLASSES_NAME: as_json(list(source.classes))} if source.classes else {}
        self._beside |= {label_file_name(name): pack_labels(content) for name, content in source.labels.items()}
        self._facts = _facts_of(source, shard_samples, recode, self._beside)
        self._sizes = () if recode else source.sizes  # as they will be stored
        self._part = Part.of(store)
        self._index: ShardIndex | None = None
        self._kept: dict[str, ShardScan] = {}

    @property
    def ready(self) -> int:
        """How many samples need not be made."""
        return len(self.source) if self._index is not None else sum(len(scan.labels) for scan in self._kept.values())

    def check(self, replace: Replace, by_bytes: bool, workers: int | None, advance: Advance) -> None:
        """Refuse a folder in which this must not be made, and find what is there already."""
        part = self._part
        self._check_place()
        if part.entries and not part.record and replace != "all":
            hint = f" To train on these shards, run: rsb-cluster shards index {part.store.url}" if part.tars else ""
            raise ConfigError(
                f"{part.store.url} holds {shown(sorted(part.entries))}, which were not made by this command. Choose "
                f"another folder; or add --overwrite to 'shards make' to replace the shards in this one.{hint}"
            )
        if replace != "nothing" or part.record.get("removing"):
            self._check_going(replace)
        elif part.tars or INDEX_NAME in part.entries:
            self._check_record()
            if INDEX_NAME in part.entries:
                self._check_index(by_bytes, workers, advance)
                return
            self._check_kept(by_bytes, workers, advance)
        self._refuse_in_the_way(replace)

    def carry_out(self, workers: int | None, advance: Advance) -> ShardIndex:
        """Write what is not there yet."""
        if self._index is not None:
            return self._index
        store, source = self._store, self.source
        if self.going is not None:
            self._remove(self.going)
        store.write_json(SOURCE_NAME, {**self._facts, "shards": len(self._shards)})
        if self._part.record:
            _remove_unfinished(store)
        scans = dict(self._kept)
        missing = [name for name in self._shards if name not in scans]
        contents = [self._shards[name] for name in missing]
        for name, scan in zip(
            missing, each(make_shard, [store] * len(missing), missing, contents, workers=workers), strict=True
        ):
            scans[name] = scan
            advance(len(scan.labels))
        in_order = [scans[name] for name in self._shards]
        _refuse_repeated_keys(in_order)
        for name, content in self._beside.items():
            store.write_bytes(name, content)
        return write_index(store, list(self._shards), in_order, source.classes)

    @cached_property
    def _shards(self) -> dict[str, ShardContents]:
        """What each shard is to hold, by its name."""
        source, order = self.source, self.source.order()
        first = sorted(order[:_SIZED_SAMPLES].tolist())
        sizes = [len(read_sample(source.read, self._recode, source.entries[i])[1]) for i in first]
        per_shard = min(self._shard_samples, max(1, _SHARD_BYTES // max(1, sum(sizes) // len(sizes))))
        shards = {}
        for number, start in enumerate(range(0, len(order), per_shard)):
            chosen = order[start : start + per_shard]
            places = np.argsort(chosen)
            numbers = chosen[places].tolist()
            shards[shard_name(number)] = ShardContents(
                source.read,
                self._recode,
                [source.entries[i] for i in numbers],
                places.tolist(),
                [self._sizes[i] for i in numbers] if self._sizes else (),
            )
        return shards

    # --- checks ---

    def _check_place(self) -> None:
        if not self._store.is_local:
            return
        path = Path(self._store.url)
        for one in (path, path.parent):
            if (one.exists() or one.is_symlink()) and not one.is_dir():
                raise ConfigError(f"{one} is no folder. Choose another one.")
        read = self.source.folder
        if read is not None and path.resolve().is_relative_to(read.resolve()):
            raise ConfigError(f"{path} lies in {read}, from which the images are read. Choose a folder outside of it.")

    def _check_going(self, replace: Replace) -> None:
        part = self._part
        own = part.own(self._beside)
        foreign: list[str] = []
        if replace == "all":
            needed = {SOURCE_NAME, INDEX_NAME, CLASSES_NAME, *self._beside, *part.tars}
            foreign = sorted(needed.intersection(part.files).difference(own))
        gone = tuple(name for name in own if name != SOURCE_NAME)
        if gone or foreign:
            self.going = Removal(part.store.url, gone, tuple(foreign))

    def _check_record(self) -> None:
        """Refuse what was made otherwise, or from other images."""
        facts, before = self._facts, self._part.record
        differing = [
            name for name in facts if facts[name] != before.get(name, facts[name] if name in _MAY_LACK else None)
        ]
        said = [f"{name} was {before.get(name)}, is {facts[name]}" for name in differing if name not in _OF_SAMPLES]
        if "listing_sha256" in differing or "sizes_sha256" in differing:
            what = "the list of images" if "listing_sha256" in differing else "the sizes of images"
            said += self._image_changes() or [f"{what}, of which the shards that are there do not say more"]
        if "packed" in differing:
            said += _packed_changes(before["packed"], facts["packed"])
        if "beside" in differing:
            names = sorted({name for name, _ in before["beside"].items() ^ facts["beside"].items()})
            said.append(f"what belongs into {shown(names)}")
        if said:
            self._refuse(said)

    def _check_index(self, by_bytes: bool, workers: int | None, advance: Advance) -> None:
        """Compare the images with a part that is whole; its index knows the size of each."""
        index, source = load_index(self._store), self.source
        if index.num_samples != len(source):
            counts = f"the index counts {index.num_samples:,} images, and there are {len(source):,}"
            self._refuse(self._image_changes() or [counts])
        if self._sizes and not np.array_equal(np.asarray(self._sizes)[source.order()], index.image_sizes):
            self._refuse(self._image_changes() or ["the order of images"])
        if missing := [name for name in index.shards if not self._part.entries.get(name)]:
            self._refuse([f"shards that are missing: {shown(missing)}"])
        if by_bytes:
            self._compare(list(self._shards), by_bytes, workers, advance)
            strange = [name for name in self._shards if name not in self._kept]
            if strange:
                self._refuse([f"shards with other samples: {shown(strange)}"])
        self._index = index

    def _check_kept(self, by_bytes: bool, workers: int | None, advance: Advance) -> None:
        """Find the shards of a killed make that are whole."""
        own = set(self._part.shards())
        self._compare([name for name in self._shards if name in own], by_bytes, workers, advance)

    def _compare(self, names: Sequence[str], by_bytes: bool, workers: int | None, advance: Advance) -> None:
        """Keep the shards that hold what they are to hold; refuse images that are not those in them."""
        changes: list[ImageChange] = []
        contents = [self._shards[name] for name in names]
        stores, flags = [self._store] * len(names), [by_bytes] * len(names)
        for name, found in zip(
            names, each(compare_shard, stores, names, contents, flags, workers=workers), strict=True
        ):
            changes += found.changes
            if found.scan is not None:
                self._kept[name] = found.scan
                advance(len(found.scan.labels))
        if changes:
            what = "images with other content" if by_bytes else "images with another size"
            self._refuse([f"{what}: {shown(map(self._in_words, changes))}"])

    def _refuse(self, said: Sequence[str]) -> NoReturn:
        part = self._part
        found = [INDEX_NAME] * (INDEX_NAME in part.entries) + part.tars
        raise ConfigError(
            f"{part.store.url} already holds {found[0]} ({len(found)} such files), made otherwise: {'; '.join(said)}. "
            "To make it anew, add --remake to 'shards make'; or choose another folder."
        )

    def _refuse_in_the_way(self, replace: Replace) -> None:
        """Refuse names that must be written, and are those of folders or of what was not made here."""
        part = self._part
        if not part.entries:
            return
        own = set(part.own(self._beside))
        for name in (SOURCE_NAME, *self._shards, *self._beside, INDEX_NAME):
            is_file = part.entries.get(name)
            if is_file is False or (is_file and name not in own and replace != "all"):
                raise ConfigError(
                    f"{part.store.locate(name)} is in the way, and was not made by this command. Move it, or choose "
                    "another folder."
                )

    def _image_changes(self) -> list[str]:
        """Say which images are not those that the shards hold, as far as these tell."""
        source = self.source
        stored, is_whole = self._stored_images()
        now = {key: number for number, key in enumerate(source.keys())}
        if not stored or not now:
            return []
        comparable = self._sizes if self._part.record["max_side"] is None else ()
        found = {
            "images with another size": [
                self._in_words(ImageChange(source.entries[now[key]], stored[key], size))
                for key, size in zip(now, comparable, strict=False)
                if stored.get(key, size) != size
            ],
            "images that are new": [
                source.show(source.entries[number]) for key, number in now.items() if is_whole and key not in stored
            ],
            "images that are gone": [unquote(key) for key in stored if key not in now],
        }
        return [f"{what}: {shown(names)}" for what, names in found.items() if names]

    def _stored_images(self) -> tuple[dict[str, int], bool]:
        """Return the bytes of the images that were made here by their keys, and whether these are all."""
        part = self._part
        if part.entries.get(INDEX_NAME):
            with suppress(DataError):
                index = load_index(self._store)
                return {index.key(i): size for i, size in enumerate(index.image_sizes.tolist())}, True
        found: dict[str, int] = {}
        for name in part.shards()[:_SCANNED_SHARDS]:
            with suppress(DataError):
                scan = scan_shard(self._store, name)
                keys = (key.decode("utf-8", "surrogateescape") for key in scan.keys)
                found |= dict(zip(keys, scan.spans[:, 3].tolist(), strict=True))
        return found, False

    def _in_words(self, change: ImageChange) -> str:
        return f"{self.source.show(change.entry)} ({change.now:,} bytes, were {change.before:,})"

    def _remove(self, going: Removal) -> None:
        """Delete what has to go, so that at no moment the rest is taken for what it is not."""
        record = self._part.record
        if record:
            self._store.write_json(SOURCE_NAME, {**record, "removing": True})
        # The index first: without it what follows is not taken for a data set.
        for name in sorted((*going.own, *going.foreign), key=lambda name: name != INDEX_NAME):
            self._store.delete_file(name)


def _facts_of(
    source: DataSource, shard_samples: int, recode: Recode | None, beside: Mapping[str, bytes]
) -> dict[str, Any]:
    """Return what the bytes of the shards depend on. No path or time is among it: a copy of the images has others."""
    import PIL

    facts = {
        "format": RECORD_FORMAT,
        "data_set": source.data_set,
        "samples": len(source),
        "classes": len(source.classes),
        "listing_sha256": source.listing(),
        "shard_samples": shard_samples,
        "max_side": recode.max_side if recode else None,
        "quality": recode.quality if recode else None,
        "pillow": PIL.__version__,  # what it encodes can differ between versions
        "beside": {name: hashlib.sha256(content).hexdigest() for name, content in beside.items()},
    }
    if source.sizes:
        facts["sizes_sha256"] = hashlib.sha256(np.asarray(source.sizes, dtype="<i8").tobytes()).hexdigest()
    if source.packed:
        facts["packed"] = dict(source.packed)
    return facts


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
    return [f"{what}: {shown(names)}" for what, names in found.items() if names]


def _remove_unfinished(store: Store) -> None:
    """Delete what a killed make had begun to write. In an object store there is no such file."""
    if store.is_local:
        for path in Path(store.url).glob(".shard-*.tar.*.tmp"):
            if path.is_file():
                path.unlink()


def _refuse_repeated_keys(scans: Sequence[ShardScan]) -> None:
    seen: set[bytes] = set()
    for scan in scans:
        for key in scan.keys:
            if key in seen:
                raise ConfigError(f"the key '{key.decode()}' comes twice. Keys must be unique over the set.")
            seen.add(key)
