"""What lies in the folder of a part of a set, and which of it is ours.

A folder is ours when our record, ``source.json``, is in it. Of what lies in such a folder, ours are the record, the
index, the shards that the record counts, and the class names and label sets whose checksums it has. All else is
somebody's: it is overwritten or deleted only where the user has asked for it, and seen its name before.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from rsb_cluster.config.schema import newer_version, read_record
from rsb_cluster.data.index import CLASSES_NAME, INDEX_NAME, SHARD_SUFFIX, load_index
from rsb_cluster.data.labels import label_files, label_kind
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.storage.store import Store

SOURCE_NAME = "source.json"
RECORD_FORMAT = 1

_SHARD = re.compile(rf"shard-(\d{{6,}}){re.escape(SHARD_SUFFIX)}")
_SHOWN = 3


class _Record(BaseModel):
    """What our record says: later versions say more than the first."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    format: int
    data_set: str
    samples: int  # in the part
    classes: int
    listing_sha256: str  # of the entries of the source
    shard_samples: int  # at most, in a shard
    max_side: int | None
    quality: int | None
    pillow: str
    sizes_sha256: str = ""  # of the sizes of the image files
    packed: dict[str, int] = {}  # sizes of files that hold many images
    beside: dict[str, str] = {}  # checksums of the class names and label sets
    shards: int = 0
    removing: bool = False  # what is there is to be replaced, and some of it may be gone


def shard_name(number: int) -> str:
    """Return the file name of a shard that is made here."""
    return f"shard-{number:06d}{SHARD_SUFFIX}"


def source_of(store: Store) -> dict[str, Any]:
    """Return the record of what a part was made from: ``data_set``, ``samples``, ...; empty where there is none.

    Raises:
        NewerVersionError: A newer version wrote it.
    """
    if not store.exists(SOURCE_NAME):
        return {}
    try:
        record = read_record(_Record, store.read_bytes(SOURCE_NAME), store.locate(SOURCE_NAME))
    except ConfigError:
        return {}
    if record.format != RECORD_FORMAT:
        raise newer_version(store.locate(SOURCE_NAME), f"format {record.format}")
    return record.model_dump(exclude_unset=True)


def shown(names: Iterable[str]) -> str:
    """Return the first of some names, and how many more there are."""
    listed = list(names)
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


@dataclass(frozen=True)
class Removal:
    """What has to go from a part before it is made anew.

    Attributes:
        url: The part's folder.
        own: Names of the files that were made here.
        foreign: Names of the files that were not.
    """

    url: str
    own: tuple[str, ...]
    foreign: tuple[str, ...] = ()


def refuse_foreign(going: Sequence[Removal]) -> None:
    """Raise ConfigError where something has to go that was not made here."""
    if found := [f"{shown(part.foreign)} in {part.url}" for part in going if part.foreign]:
        raise ConfigError(
            f"--overwrite would delete what was not made by this command: {'; '.join(found)}. "
            "Add --yes if it may go, or choose another folder."
        )


@dataclass(frozen=True)
class Part:
    """The folder of a part as it is now. Hidden files do not count.

    Attributes:
        store: The folder.
        entries: The names in it, each with whether it is a file.
        record: Ours; empty where the folder is not ours.
    """

    store: Store
    entries: Mapping[str, bool]
    record: Mapping[str, Any]

    @classmethod
    def of(cls, store: Store) -> Part:
        """Look at a folder, which need not be there."""
        entries = store.entries()
        return cls(store, entries, source_of(store) if entries.get(SOURCE_NAME) else {})

    @property
    def files(self) -> list[str]:
        """The names of its files, sorted."""
        return sorted(name for name, is_file in self.entries.items() if is_file)

    @property
    def tars(self) -> list[str]:
        """The names of all that may be shards, whoever made them."""
        return [name for name in self.files if name.endswith(SHARD_SUFFIX)]

    def shards(self) -> list[str]:
        """Return the names of the shards that the record counts."""
        if not self.record:
            return []
        count = self.record["shards"] if "shards" in self.record else self._shards_in_index()
        numbers = {name: int(found[1]) for name in self.tars if (found := _SHARD.fullmatch(name))}
        return [name for name, number in numbers.items() if count is None or number < count]

    def _shards_in_index(self) -> int | None:
        """Return how many shards hold the samples of a record that does not count shards, None where not known."""
        try:
            index = load_index(self.store) if self.entries.get(INDEX_NAME) else None
        except DataError:
            index = None
        counts = index.shard_start.tolist() if index else []
        return counts.index(self.record["samples"]) if self.record["samples"] in counts else None

    def own(self, to_write: Mapping[str, bytes]) -> list[str]:
        """Return the names of the files that were made here, the index first.

        Args:
            to_write: Files beside the shards that are to be written: one that is there with these bytes counts as
                ours, as nothing would be lost.
        """
        if not self.record:
            return []
        beside = [
            name
            for name in self.files
            if name == CLASSES_NAME or label_files([name])
            if self._is_own(name, to_write.get(name))
        ]
        index = [INDEX_NAME] if self.entries.get(INDEX_NAME) else []
        return [*index, *self.shards(), *beside, SOURCE_NAME]

    def _is_own(self, name: str, content: bytes | None) -> bool:
        there = self.store.read_bytes(name)
        if there == content:
            return True
        if "beside" in self.record:
            return bool(self.record["beside"].get(name) == hashlib.sha256(there).hexdigest())
        if name == CLASSES_NAME:
            return bool(_counts(there) == self.record["classes"])
        return content is not None and label_kind(there) == label_kind(content)


def _counts(classes: bytes) -> int:
    """Return how many names a file of class names holds; 0 where it is none."""
    try:
        found = json.loads(classes)
    except ValueError:
        return 0
    return len(found) if isinstance(found, list) else 0
