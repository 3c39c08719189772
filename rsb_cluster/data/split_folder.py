"""The folder of a split, and which of its files are ours.

A folder is ours if it holds our record, ``source.json``. Of its files, ours are the record, the index, the shards that
the record counts, and the class names and label sets with the checksums in the record. All others are foreign: they are
overwritten or deleted only on the user's request, after their names were shown.
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
    """The content of the record; fields with a default were added by later versions."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    format: int
    data_set: str
    samples: int  # in the split
    classes: int
    listing_sha256: str  # of the entries of the source
    shard_samples: int  # maximum per shard
    max_side: int | None
    quality: int | None
    pillow: str
    sizes_sha256: str = ""  # of the sizes of the image files
    packed: dict[str, int] = {}  # sizes of files that hold many images each
    beside: dict[str, str] = {}  # checksums of the class names and label sets
    shards: int = 0
    removing: bool = False  # a replacement has begun: some files may have been removed


def shard_name(number: int) -> str:
    """Return the file name of a shard made by this package."""
    return f"shard-{number:06d}{SHARD_SUFFIX}"


def read_source_record(store: Store) -> dict[str, Any]:
    """Return the record of what a split was made from: ``data_set``, ``samples``, ...; empty if there is none.

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


def abbreviate(names: Iterable[str]) -> str:
    """Return the first few names, and the number of the others."""
    listed = list(names)
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


@dataclass(frozen=True)
class Removal:
    """The files to delete from a split before it is made again.

    Attributes:
        url: The split's folder.
        own: Names of the files that were made here.
        foreign: Names of the files that were not.
    """

    url: str
    own: tuple[str, ...]
    foreign: tuple[str, ...] = ()


def refuse_foreign_files(removals: Sequence[Removal]) -> None:
    """Raise ConfigError if a file would be deleted that was not made here."""
    if found := [f"{abbreviate(part.foreign)} in {part.url}" for part in removals if part.foreign]:
        raise ConfigError(
            f"--overwrite would delete files that were not made by this command: {'; '.join(found)}. "
            "Add --yes to delete them, or choose another folder."
        )


@dataclass(frozen=True)
class SplitFolder:
    """The current content of a split's folder, without hidden files.

    Attributes:
        store: The folder.
        entries: The names in it, and whether each is a file.
        record: Our record; empty if the folder is not ours.
    """

    store: Store
    entries: Mapping[str, bool]
    record: Mapping[str, Any]

    @classmethod
    def read(cls, store: Store) -> SplitFolder:
        """List a folder, which need not exist."""
        entries = store.entries()
        return cls(store, entries, read_source_record(store) if entries.get(SOURCE_NAME) else {})

    @property
    def files(self) -> list[str]:
        """The names of the files, sorted."""
        return sorted(name for name, is_file in self.entries.items() if is_file)

    @property
    def tars(self) -> list[str]:
        """The names of all tar files, whoever made them."""
        return [name for name in self.files if name.endswith(SHARD_SUFFIX)]

    def shards(self) -> list[str]:
        """Return the names of the shards that the record counts."""
        if not self.record:
            return []
        count = self.record["shards"] if "shards" in self.record else self._shards_in_index()
        numbers = {name: int(found[1]) for name in self.tars if (found := _SHARD.fullmatch(name))}
        return [name for name, number in numbers.items() if count is None or number < count]

    def _shards_in_index(self) -> int | None:
        """Return the number of shards, from the index, for a record without it; None if unknown."""
        try:
            index = load_index(self.store) if self.entries.get(INDEX_NAME) else None
        except DataError:
            index = None
        counts = index.shard_start.tolist() if index else []
        return counts.index(self.record["samples"]) if self.record["samples"] in counts else None

    def own_files(self, to_write: Mapping[str, bytes]) -> list[str]:
        """Return the names of the files that were made here, the index first.

        Args:
            to_write: The other files that will be written besides the shards. An existing file with the same content
                counts as ours, as nothing would be lost.
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
        stored = self.store.read_bytes(name)
        if stored == content:
            return True
        if "beside" in self.record:
            return bool(self.record["beside"].get(name) == hashlib.sha256(stored).hexdigest())
        if name == CLASSES_NAME:
            return bool(_class_count(stored) == self.record["classes"])
        return content is not None and label_kind(stored) == label_kind(content)


def _class_count(classes: bytes) -> int:
    """Return the number of names in a file of class names; 0 if it is invalid."""
    try:
        found = json.loads(classes)
    except ValueError:
        return 0
    return len(found) if isinstance(found, list) else 0
