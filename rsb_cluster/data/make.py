"""Writes shards: the same samples give the same bytes, and a half-written set is never mistaken for a complete one.

A split of a set is written in these steps:

1. All splits are checked before anything is written. A folder with files that were not made here is refused (see
   `rsb_cluster.data.split_folder`).
2. ``source.json``, the first file, records what the split is made from and how.
3. Each shard is written atomically by one process. Its samples are determined before, so neither the number of
   processes nor their speed changes a byte.
4. ``classes.json``, ``labels-*.json`` and, last, the index.

The same command resumes a make that was killed: with the same ``source.json`` existing shards are read and kept. A
split that has its index is left as it is. Both are refused if the images are not those in the shards: shards are only
replaced on request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rsb_cluster.data.index import INDEX_NAME, Progress, ShardIndex, read_classes
from rsb_cluster.data.recode import Recode
from rsb_cluster.data.sources.source import SPLITS, DataSource
from rsb_cluster.data.split_folder import Removal, SplitFolder, abbreviate, refuse_foreign_files
from rsb_cluster.data.split_plan import Advance, Replace, SplitPlan
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store

SHARD_SAMPLES = 1000


@dataclass(frozen=True)
class SetPlan:
    """The checked plans of a set's splits. Nothing has been changed yet."""

    _parts: Mapping[str, SplitPlan]

    @property
    def removals(self) -> tuple[Removal, ...]:
        """The files that `make` will delete, by split."""
        return tuple(part.removal for part in self._parts.values() if part.removal is not None)

    def notes(self, split: str) -> list[str]:
        """Return a line for each kind of images, of those that were written, that the user should look at."""
        return list(self._parts[split].remarks.notes("stored"))

    def make(self, workers: int | None = 1, progress: Progress | None = None) -> dict[str, ShardIndex]:
        """Write what is missing, and return the index of each split.

        Args:
            workers: Number of processes that write shards (see `rsb_cluster.data.pool.parallel_map`).
            progress: Called after each shard with the number of samples written and the total, over all splits.

        Raises:
            ConfigError: A sample cannot be stored.
            DataError: A shard is invalid.
            StorageError: The folder could not be written.
        """
        parts = self._parts.values()
        advance = _cumulative(progress, sum(part.samples_kept for part in parts), sum(len(p.source) for p in parts))
        return {name: part.write(workers, advance) for name, part in self._parts.items()}


def plan_set(
    sources: Mapping[str, DataSource],
    dest: Store,
    *,
    shard_samples: int = SHARD_SAMPLES,
    recode: Recode | None = None,
    remake: bool = False,
    overwrite: bool = False,
    by_bytes: bool = False,
    workers: int | None = 1,
    progress: Progress | None = None,
) -> SetPlan:
    """Check that a set can be written to a folder, and compare existing shards with its images.

    Args:
        sources: The source of each sub-folder, ``train`` and ``val`` (see `rsb_cluster.data.sources.open_set`).
        dest: The set's folder.
        shard_samples: Maximum number of samples in a shard; fewer if images are so large that it would exceed 256 MiB.
            A process holds one shard in memory, twice.
        recode: How to downscale images; None keeps all files as they are.
        remake: Replace what was made here.
        overwrite: Replace what was made here, and *every* ``*.tar`` directly in a sub-folder.
        by_bytes: Compare images with existing shards byte by byte, and not only by size.
        workers: Number of processes that read existing shards.
        progress: Called after each existing shard with the number of samples read and the total of the set.

    Raises:
        ConfigError: The folder holds files that were not made here, or shards made from other images; the sub-folders
            would not have the same classes; there are no samples; or a sample cannot be stored.
        DataError: An index is damaged, or an image cannot be downscaled.
        StorageError: The folder could not be read.
    """
    dest.check_not_read_only("shards")
    _check_same_classes(sources, dest)
    parts = {split: SplitPlan(source, dest.child(split), shard_samples, recode) for split, source in sources.items()}
    for part in parts.values():
        part.check_location()  # first: what others advise would lie there, too
    if not overwrite:
        _refuse_unrelated_files(sources, dest)
    advance = _cumulative(progress, 0, sum(map(len, sources.values())))
    for part in parts.values():
        part.check(_replace(remake, overwrite), by_bytes, workers, advance)
    return SetPlan(parts)


def make_set(
    sources: Mapping[str, DataSource],
    dest: Store,
    *,
    shard_samples: int = SHARD_SAMPLES,
    workers: int | None = 1,
    recode: Recode | None = None,
    remake: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, ShardIndex]:
    """Write a set: a folder with the splits ``train/`` and ``val/``.

    Args:
        sources: The source of each sub-folder. A sub-folder that is not named here is left as it is.
        dest: The set's folder.
        shard_samples: As in `plan_set`.
        workers: Number of processes that write shards.
        recode: How to downscale images.
        remake: Replace what was made here.
        overwrite: Replace every ``*.tar`` as well; files that were not made here are refused all the same.
        progress: Called with the number of samples written, over all sub-folders, and their total.

    Returns:
        The index of each sub-folder.

    Raises:
        ConfigError: As in `plan_set`; nothing has been changed.
        DataError: A shard is invalid.
        StorageError: The folder could not be written.
    """
    plan = plan_set(
        sources,
        dest,
        shard_samples=shard_samples,
        recode=recode,
        remake=remake,
        overwrite=overwrite,
        workers=workers,
        progress=progress,
    )
    refuse_foreign_files(plan.removals)
    return plan.make(workers, progress)


def make_shards(
    source: DataSource,
    store: Store,
    *,
    shard_samples: int = SHARD_SAMPLES,
    workers: int | None = 1,
    recode: Recode | None = None,
    remake: bool = False,
    overwrite: bool = False,
    by_bytes: bool = False,
    progress: Progress | None = None,
) -> ShardIndex:
    """Write a source as shards ``shard-000000.tar``, ...; then the class names, and the index last.

    The samples are shuffled (see `DataSource.order`). Shards that are sorted by class are the classic mistake: training
    shuffles within a few thousand samples at a time, so every batch would hold a few classes only, and BatchNorm and
    the optimizer would see one class after the other.

    Arguments and errors are those of `make_set` and `plan_set`; the folder is that of one split.
    """
    store.check_not_read_only("shards")
    part = SplitPlan(source, store, shard_samples, recode)
    part.check(_replace(remake, overwrite), by_bytes, workers, _cumulative(progress, 0, len(source)))
    plan = SetPlan({"": part})
    refuse_foreign_files(plan.removals)
    return plan.make(workers, progress)[""]


def _replace(remake: bool, overwrite: bool) -> Replace:
    return "all" if overwrite else "own" if remake else "nothing"


def _cumulative(progress: Progress | None, done: int, total: int) -> Advance:
    """Return a function that adds up samples and reports their sum."""

    def advance(samples: int) -> None:
        nonlocal done
        done += samples
        if progress is not None:
            progress(done, total)

    return advance


def _refuse_unrelated_files(sources: Mapping[str, DataSource], dest: Store) -> None:
    """Refuse to write a new set into a folder with other files."""
    entries = dest.entries()
    parts = {name: SplitFolder.read(dest.child(name)) for name in SPLITS if name in entries}
    if any(part.record or INDEX_NAME in part.entries for part in parts.values()):
        return  # it is a set already
    unrelated = sorted(name for name in entries if name not in sources and (name not in parts or parts[name].entries))
    if unrelated:
        raise ConfigError(
            f"{dest.url} is not empty: it holds {abbreviate(unrelated)}. Choose a folder for the set alone, such as "
            f"{dest.url}/NAME."
        )


def _check_same_classes(sources: Mapping[str, DataSource], dest: Store) -> None:
    """Refuse splits in which a class number would mean two classes."""
    known = {split: tuple(source.classes) for split, source in sources.items()}
    known |= {split: read_classes(dest.child(split)) for split in SPLITS if split not in known}
    for split, classes in known.items():
        for other, others in known.items():
            if classes and others and classes != others:
                differing = sorted(set(classes) ^ set(others)) or ["their order"]
                raise ConfigError(
                    f"{split} has {len(classes)} classes and {other} has {len(others)}; they differ in: "
                    f"{', '.join(differing[:5])}. Make both at once, from a folder with train/ and val/ (links will "
                    "do), where val may lack classes; or from the same list of classes."
                )
