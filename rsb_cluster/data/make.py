"""Write shards: the same samples give the same bytes, and a half-made set is never taken for a whole one."""

from __future__ import annotations

import io
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rsb_cluster.data.index import CLASSES_NAME, INDEX_NAME, Progress, ShardIndex, build_index, shard_names
from rsb_cluster.data.scan import IMAGE_EXTENSIONS, split_name
from rsb_cluster.data.sources import Sample, Source
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage import Store

SHARD_SAMPLES = 1000
SHARD_BYTES = 256 << 20

_BLOCK_BYTES = 512  # of a tar


def make_set(
    sources: Mapping[str, Source],
    dest: Store,
    *,
    shard_samples: int = SHARD_SAMPLES,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, ShardIndex]:
    """Write a set: a folder with a data set in each of its sub-folders, ``train/`` and ``val/``.

    Args:
        sources: What goes into each sub-folder (see `rsb_cluster.data.sources.open_set`). A sub-folder that is not
            named here is left as it is.
        dest: The set's folder.
        shard_samples: At most so many samples a shard.
        shard_bytes: At most so many bytes a shard.
        overwrite: Replace the shards that are in the sub-folders written to.
        progress: Called with the number of samples written, over all sub-folders, and their total.

    Returns:
        The index of each sub-folder that was written.

    Raises:
        ConfigError: The sub-folders would not have the same classes, or one holds shards already; in both cases
            nothing has been changed.
        DataError: A source breaks the rules for samples.
        StorageError: The folder could not be written.
    """
    _check_same_classes(sources, dest)
    if not overwrite:
        for split in sources:
            _refuse_used(dest.child(split))
    total = sum(len(source) for source in sources.values())
    indices: dict[str, ShardIndex] = {}
    for split, source in sources.items():
        before = sum(index.num_samples for index in indices.values())

        def advance(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, total)

        indices[split] = make_shards(
            source,
            dest.child(split),
            shard_samples=shard_samples,
            shard_bytes=shard_bytes,
            classes=source.classes,
            overwrite=overwrite,
            progress=advance,
        )
    return indices


def make_shards(
    samples: Iterable[Sample],
    store: Store,
    *,
    shard_samples: int = SHARD_SAMPLES,
    shard_bytes: int = SHARD_BYTES,
    classes: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ShardIndex:
    """Write samples as shards ``shard-000000.tar``, ...; then the class names, and the index last.

    The samples are written in the order in which they come, so they must come shuffled, as they do from a `Source`.
    Shards that are sorted by class are the classic mistake: training shuffles within a few shards at a time, so every
    batch would hold a few classes only, and BatchNorm and the optimizer would see one class after the other.

    Args:
        samples: Key, image file, its extension (as in `IMAGE_EXTENSIONS`) and class of each sample.
        store: The folder.
        shard_samples: At most so many samples a shard.
        shard_bytes: At most so many bytes a shard, but at least one sample. Memory holds a shard twice.
        classes: Names of the classes 0, 1, ...
        overwrite: Replace what is there: *every* ``*.tar`` directly in the folder is deleted.
        progress: Called after each shard with the number of samples written and the total (0: not known).

    Raises:
        ConfigError: The folder holds shards already and ``overwrite`` is false; or a key, extension or class cannot
            be stored; or there are no samples.
        DataError: The shards, read again, break a rule.
        StorageError: The folder could not be written.
    """
    if shard_samples < 1 or shard_bytes < 1:
        raise ConfigError(f"a shard of {shard_samples} samples or {shard_bytes} bytes cannot be. Use 1 or more.")
    if overwrite:
        store.delete(INDEX_NAME)  # first of all: without it what follows is not taken for a data set
        for name in (*shard_names(store), CLASSES_NAME):
            store.delete(name)
    else:
        _refuse_used(store)
    total = operator.length_hint(samples)
    done = 0
    for number, shard in enumerate(_shards(_checked(samples), shard_samples, shard_bytes)):
        store.write_bytes(f"shard-{number:06d}.tar", _tar(shard))
        done += len(shard)
        if progress is not None:
            progress(done, total)
    if not done:
        raise ConfigError(f"there are no samples to write to {store.url}. Check the source.")
    if classes:
        store.write_json(CLASSES_NAME, list(classes))
    return build_index(store, classes=classes)


def _shards(samples: Iterable[Sample], shard_samples: int, shard_bytes: int) -> Iterator[list[Sample]]:
    """Cut the samples into the contents of shards."""
    shard: list[Sample] = []
    size = 0
    for sample in samples:
        # Two headers and the padded contents. What a long name or the tar's end adds does not matter here.
        sample_bytes = 3 * _BLOCK_BYTES + -(-len(sample[1]) // _BLOCK_BYTES) * _BLOCK_BYTES
        if shard and (len(shard) == shard_samples or size + sample_bytes > shard_bytes):
            yield shard
            shard, size = [], 0
        shard.append(sample)
        size += sample_bytes
    if shard:
        yield shard


def _tar(shard: list[Sample]) -> memoryview:
    """Return a tar that depends on the samples only: no time, user or mode of this machine is in it."""
    import webdataset  # here, for it imports torch

    buffer = io.BytesIO()
    with webdataset.TarWriter(
        buffer, encoder=False, mtime=0, user="rsb", group="rsb", mode=0o444, compress=False
    ) as writer:
        for key, image, extension, label in shard:
            writer.write({"__key__": key, extension: image, "cls": str(label).encode()})
    return buffer.getbuffer()


def _checked(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Refuse what could be written but not be found again."""
    seen: set[str] = set()
    for sample in samples:
        key, _, extension, label = sample
        where = f"sample '{key}' with the extension '{extension}' and the class {label}"
        if extension not in IMAGE_EXTENSIONS:
            raise ConfigError(f"{where}: the extension must be one of: {', '.join(IMAGE_EXTENSIONS)}")
        if split_name(f"{key}.{extension}") != (key, extension) or not key.isascii() or not key.isprintable():
            raise ConfigError(
                f"{where}: webdataset would not read this key back. "
                "Use printable ASCII, no dot in the last part, and no part like '__x__' at the start."
            )
        if key in seen:
            raise ConfigError(f"{where}: the key comes twice. Keys must be unique over the set.")
        if label < 0:
            raise ConfigError(f"{where}: classes are numbered from 0.")
        seen.add(key)
        yield sample


def _refuse_used(store: Store) -> None:
    found = [name for name in store.names() if name == INDEX_NAME or name.endswith(".tar")]
    if found:
        raise ConfigError(
            f"{store.url} already holds {found[0]} ({len(found)} such files). "
            "Choose another folder, or pass --overwrite to delete them."
        )


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
