"""Folders of shards as others publish them: which tars are train, which are val, and how many there must be.

Known are

- one folder with the shards of all splits, told apart by timm's ``_info.json`` (``timm/imagenet-1k-wds``) or by words
  in their names (``imagenet1k-train-0000.tar``, ``imagenet1k-validation-00.tar``);
- a folder per split, with ``nshards.txt`` in it and ``classnames.txt`` beside them (``clip-benchmark/wds_*``);
- one folder with the shards of one split.

A reader that took all ``*.tar`` of the first would train on the validation images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import PurePosixPath

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from rsb_cluster.data.index import (
    INDEX_NAME,
    SHARD_SUFFIX,
    Progress,
    ShardIndex,
    load_index,
    shard_names,
    shards_of,
)
from rsb_cluster.data.indexing import ShardFolder, build_index, is_like_shard
from rsb_cluster.data.sources.label_table import LabelTable
from rsb_cluster.data.sources.labelled import label_scans
from rsb_cluster.data.sources.source import SPLITS
from rsb_cluster.data.split_folder import abbreviate
from rsb_cluster.data.split_names import as_ours, split_of, splits_in
from rsb_cluster.errors import AccessError, ConfigError, DataError
from rsb_cluster.storage.store import Store

INFO_NAME = "_info.json"

_NSHARDS, _CLASS_NAMES = "nshards.txt", "classnames.txt"


class _Split(BaseModel):
    """A split in timm's ``_info.json``; timm reads these fields."""

    model_config = ConfigDict(extra="ignore")

    name: str = ""
    num_samples: int
    filenames: tuple[str, ...]
    shard_lengths: tuple[int, ...] = ()
    alt_label: str = ""


class _Info(BaseModel):
    model_config = ConfigDict(extra="ignore")

    splits: dict[str, _Split]


@dataclass(frozen=True)
class PublishedSet:
    """The parts of a folder of shards.

    Attributes:
        store: The folder.
        parts: The shards of ``train`` and ``val``; with an empty name if the folder is one part and does not say which.
        classes: Names of the classes 0, 1, ...; empty if unknown.
        notes: What is left out, in sentences.
    """

    store: Store
    parts: Mapping[str, ShardFolder]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def folder_of(self, part: str) -> Store:
        """Return the folder of a part below the set's."""
        return self.store.child(part) if part else self.store


def find_parts(store: Store, *, any_count: bool = False) -> PublishedSet:
    """Return the parts of a folder of shards. No shard is read.

    Args:
        store: The folder.
        any_count: Accept fewer shards than the folder's own list has; they are named in the notes.

    Raises:
        ConfigError: It is unclear to which part a shard belongs, or shards are missing.
        DataError: A list of shards is damaged.
        StorageError: The folder could not be read.
    """
    tars = shard_names(store)
    if not tars:
        return _folders(store, any_count)
    unread = _unread(store, tars)
    info = _read_info(store)
    splits, notes = _listed(store, tars, info, any_count) if info else _named(store, tars)
    if len(splits) < 2:
        (names,) = splits.values()
        samples = _lengths(info.splits.values()) if info else {}
        return PublishedSet(
            store, {"": ShardFolder(store, tuple(names), "", samples)}, notes=(*unread, *notes, *_gaps(names))
        )
    ours, left_out = as_ours(splits)
    notes += [f"the split '{name}' is left out: {abbreviate(splits[name])}" for name in left_out]
    samples = _lengths(info.splits.values()) if info else {}
    parts = {part: ShardFolder(store, tuple(names), "..", samples) for part, names in ours.items()}
    if store.exists(INDEX_NAME):
        notes.append(f"{INDEX_NAME} in this folder is of all shards as one set, by an earlier version: delete it")
    gaps = [note for names in ours.values() for note in _gaps(names)]
    return PublishedSet(store, parts, notes=(*unread, *notes, *gaps))


def index_set(
    found: PublishedSet,
    output: Store | None = None,
    *,
    workers: int | None = 1,
    image_keys: Sequence[str] = (),
    table: LabelTable | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda note: None,
) -> dict[str, ShardIndex]:
    """Write the index of each part.

    Args:
        found: The set.
        output: Where the indices go; None for the folder of the set.
        workers: As in `rsb_cluster.data.indexing.build_index`, like ``progress``, which counts shards of all parts.
        image_keys: See there.
        table: The classes of the images, in place of those in the shards.
        progress: See there.
        say: See there; each line begins with the part.

    Raises:
        ConfigError: As in `build_index`, like the other errors; nothing is written for this part then.
        DataError: See there.
        StorageError: See there.
    """
    done, total = 0, sum(len(shards.names) for shards in found.parts.values())
    made = {}
    for part, shards in found.parts.items():
        folder = found.folder_of(part) if output is None else output.child(part) if part else output
        place = shards.place if output is None else shards.store.url
        placed = replace(shards, place="" if folder.url == shards.store.url else place)
        try:
            made[part] = build_index(
                folder,
                shards=placed,
                workers=workers,
                classes=found.classes if table is None else table.classes,
                image_keys=image_keys,
                label=partial(label_scans, table, part) if table is not None else None,
                progress=_after(progress, done, total),
                say=lambda note, part=part: say(f"{part}: {note}" if part else note),  # type: ignore[misc]
            )
        except AccessError as error:
            hint = " If you may only read there, name a folder for the index with -o." if output is None else ""
            raise AccessError(f"{error}{hint}") from error
        done += len(shards.names)
    return made


def _after(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(before + done, total)


def write_info(store: Store) -> None:
    """Write timm's ``_info.json`` for a set, or for a split alone: timm then reads the same shards (``wds/``).

    Args:
        store: The folder of the set or of the split, with the indices.

    Raises:
        ConfigError: The file is there with another content, or the shards do not lie below the folder.
        DataError: There is no index, or it is damaged.
        StorageError: The folder could not be read or written.
    """
    parts = {name: store.child(name) for name in SPLITS if store.exists(f"{name}/{INDEX_NAME}")}
    splits = {}
    alone = "val" if "train" not in (words := splits_in(PurePosixPath(store.url).name)) and words else "train"
    for part, folder in (parts or {alone: store}).items():
        index = load_index(folder)
        url = shards_of(folder, index).url
        if url != store.url and not url.startswith(f"{store.url}/"):
            raise ConfigError(f"the shards lie in {url}, and timm reads those below {store.url}. Copy them there.")
        below = url[len(store.url) + 1 :]
        name = {"val": "validation"}.get(part, part)
        splits[name] = {
            "name": name,
            "num_samples": index.num_samples,
            "filenames": [f"{below}/{shard}".lstrip("/") for shard in index.shards],
            "shard_lengths": np.diff(index.shard_start).tolist(),
        }
    if not store.create_json(INFO_NAME, {"splits": splits}) and store.read_json(INFO_NAME) != {"splits": splits}:
        raise ConfigError(f"{store.locate(INFO_NAME)} exists, with another content. Move it away, then try again.")


def _read_info(store: Store) -> _Info | None:
    if not store.exists(INFO_NAME):
        return None
    try:
        info = _Info.model_validate_json(store.read_bytes(INFO_NAME))
        if any(len(split.shard_lengths) not in (0, len(split.filenames)) for split in info.splits.values()):
            raise ValueError("a split's filenames and shard_lengths differ in number")
    except (ValidationError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise DataError(
            f"{store.locate(INFO_NAME)} is not timm's list of shards: {what}. Download it again, or move it away."
        ) from error
    return info if info.splits else None


def _listed(store: Store, tars: list[str], info: _Info, any_count: bool) -> tuple[dict[str, list[str]], list[str]]:
    """Return the shards that timm's list names, by split, and remarks."""
    notes, splits = [], {}
    for name, split in info.splits.items():
        kind = split_of(name, f"the split '{name}' in {store.locate(INFO_NAME)}") or name
        if kind in splits:
            raise ConfigError(
                f"{store.locate(INFO_NAME)} has several splits for '{kind}': {', '.join(info.splits)}. Keep one."
            )
        there = sorted(set(split.filenames) & set(tars))
        missing = sorted(set(split.filenames) - set(tars))
        if missing and there:
            notes += _missing(f"{store.locate(INFO_NAME)} lists for '{name}'", len(split.filenames), missing, any_count)
        elif missing:
            notes.append(f"the split '{name}' is not there: none of its {len(missing):,} shards is")
        if there:
            splits[kind] = there
            if split.alt_label:
                notes.append(
                    f"the classes of '{name}' are those of .cls; timm would take '{split.alt_label}' of the .json"
                )
    if not splits:
        raise ConfigError(f"none of the shards in {store.locate(INFO_NAME)} is in {store.url}. Download them.")
    unlisted = sorted(set(tars).difference(*(split.filenames for split in info.splits.values())))
    if unlisted:
        notes.append(f"shards that {INFO_NAME} does not list are left out: {abbreviate(unlisted)}")
    return splits, notes


def _named(store: Store, tars: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the shards by the split in their names; all of them as one where the names tell none, or one."""
    splits: dict[str, list[str]] = {}
    for name in tars:
        splits.setdefault(split_of(name, store.locate(name)), []).append(name)
    if "" in splits and len(splits) > 2:
        raise ConfigError(
            f"{store.url} holds shards of several splits, {', '.join(filter(None, splits))}, and others whose names "
            f"tell none: {abbreviate(splits[''])}. Move those to a folder of their own."
        )
    if "" in splits and len(splits) == 2:
        return {"": tars}, [f"all shards are one part, though not all are named alike: {abbreviate(splits[''])}, ..."]
    return splits, []


def _folders(store: Store, any_count: bool) -> PublishedSet:
    """Return the parts of a folder with a folder for each."""
    found: dict[str, list[str]] = {}
    folders = [name for name, is_file in store.entries().items() if not is_file]
    for name in folders:
        kind = split_of(name, f"the folder {store.locate(name)}")
        if kind and shard_names(store.child(name)):
            found.setdefault(kind, []).append(name)
    for kind, names in found.items():
        if len(names) > 1:
            raise ConfigError(f"{store.url} has several folders for '{kind}': {', '.join(names)}. Index one of them.")
    if not found:
        return PublishedSet(store, {"": ShardFolder(store, (), "", {})})
    ours, left_out = as_ours(found)
    notes = [f"the folder '{found[kind][0]}' is left out: val is '{ours['val'][0]}'" for kind in left_out]
    for name in sorted({*folders} - {name for names in found.values() for name in names}):
        if splits_in(name):
            notes.append(f"the folder '{name}' is left out: it has no *{SHARD_SUFFIX}")
        elif shard_names(store.child(name)):
            notes.append(f"the folder '{name}' is left out: its name tells no split")
    parts = {}
    for part, (folder,) in ours.items():
        shards = store.child(folder)
        names = shard_names(shards)
        unread = (f"{folder}: {note}" for note in _unread(shards, names))
        notes += [*unread, *_counted(shards, names, any_count), *_gaps(names)]
        parts[part] = ShardFolder(shards, tuple(names), "" if folder == part else f"../{folder}", {})
    return PublishedSet(store, parts, _class_names(store), tuple(notes))


def _unread(store: Store, shards: Sequence[str]) -> list[str]:
    """Return a remark on tars that are not read."""
    found = sorted(set(filter(is_like_shard, store.names())).difference(shards))
    what = f"left out, as they are compressed, folders, or not called *{SHARD_SUFFIX}"
    return [f"{what}: {len(found):,} ({abbreviate(found)})"] if found else []


def _counted(store: Store, names: list[str], any_count: bool) -> list[str]:
    """Compare the number of shards with ``nshards.txt``."""
    if not store.exists(_NSHARDS):
        return []
    text = store.read_bytes(_NSHARDS).strip()
    if not text.isdigit():
        raise DataError(
            f"{store.locate(_NSHARDS)} holds {text[:20]!r} and no number. Download it again, or move it away."
        )
    wanted = [f"{i}.tar" for i in range(int(text))]
    missing = [name for name in wanted if name not in names]
    notes = _missing(f"{store.locate(_NSHARDS)} counts", len(wanted), missing, any_count) if missing else []
    surplus = sorted(set(names) - set(wanted))
    if surplus and not missing:
        raise ConfigError(
            f"{store.url} holds {len(names):,} shards, and {_NSHARDS} counts {len(wanted):,}: {abbreviate(surplus)} "
            f"are of another set. Move them away, or correct {_NSHARDS}."
        )
    return notes


def _missing(who: str, count: int, missing: list[str], any_count: bool) -> list[str]:
    what = f"{who} {count:,} shards, of which {len(missing):,} are missing: {abbreviate(missing)}"
    if not any_count:
        raise ConfigError(f"{what}. Was a download interrupted? To index the others anyway, pass --any-count.")
    return [what]


def _gaps(names: Iterable[str]) -> list[str]:
    """Return a remark on each gap in the numbers of shards: there is no list to compare them with."""
    notes = []
    numbered = sorted((re.sub(r"\d+(?=\D*$)", "#", name), _last_number(name)) for name in names)
    for family, group in groupby(numbered, key=lambda item: item[0]):
        numbers = {number for _, number in group}
        missing = sorted(set(range(min(numbers), max(numbers))) - numbers) if "#" in family else []
        if missing and len(missing) < len(numbers):
            notes.append(f"{family}: {len(missing):,} numbers are skipped: {abbreviate(map(str, missing))}")
    return notes


def _last_number(name: str) -> int:
    found = re.findall(r"\d+(?=\D*$)", name)
    return int(found[0]) if found else 0


def _class_names(store: Store) -> tuple[str, ...]:
    if not store.exists(_CLASS_NAMES):
        return ()
    try:
        text = store.read_bytes(_CLASS_NAMES).decode("utf-8-sig").replace("\r\n", "\n")
        return tuple(text.rstrip("\n").split("\n"))
    except UnicodeDecodeError as error:
        raise DataError(f"{store.locate(_CLASS_NAMES)} is not UTF-8: {error}. Download it again.") from error


def _lengths(splits: Iterable[_Split]) -> dict[str, int]:
    """Return the number of samples of each shard, as far as the list has it."""
    return {name: n for split in splits for name, n in zip(split.filenames, split.shard_lengths, strict=False)}
