"""Write shards: the same samples give the same bytes, and a half-made set is never taken for a whole one.

A part of a set is checked, made and closed:

1. Nothing is written where anything lies that was not made here (see `rsb_cluster.data.part`), and nothing is written
   into one part before the others have been checked.
2. ``source.json`` says what the part is made from and how. It is the first file.
3. Each shard is written whole by one process. Which samples it holds is known before, so neither the number of
   processes nor their speed changes a byte.
4. ``classes.json``, ``labels-*.json`` and, last, the index.

A make that was killed is made again by the same command: with the same ``source.json`` the shards that are there are
read and kept. A part that has its index is left as it is. Where images are not those that the shards hold, both are
refused: what was made goes only where that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rsb_cluster.data.index import INDEX_NAME, Progress, ShardIndex, read_classes
from rsb_cluster.data.part import Part, Removal, refuse_foreign, shown
from rsb_cluster.data.part_plan import Advance, PartPlan, Replace
from rsb_cluster.data.recode import Recode
from rsb_cluster.data.sources.source import SPLITS, DataSource
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store

SHARD_SAMPLES = 1000


@dataclass(frozen=True)
class SetPlan:
    """What is to be made of a set's parts. Nothing has been changed yet."""

    _parts: Mapping[str, PartPlan]

    @property
    def going(self) -> tuple[Removal, ...]:
        """What `make` will delete, by part."""
        return tuple(part.going for part in self._parts.values() if part.going is not None)

    def make(self, workers: int | None = 1, progress: Progress | None = None) -> dict[str, ShardIndex]:
        """Write what is not there yet, and return the index of each part.

        Args:
            workers: Processes that each make shards (see `rsb_cluster.data.pool.each`).
            progress: Called after each shard with the number of samples that are there, over all parts, and their
                total.

        Raises:
            ConfigError: A sample cannot be stored.
            DataError: The shards break a rule.
            StorageError: The folder could not be written.
        """
        parts = self._parts.values()
        advance = _counting(progress, sum(part.ready for part in parts), sum(len(part.source) for part in parts))
        return {name: part.carry_out(workers, advance) for name, part in self._parts.items()}


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
    """Check that a set can be written to a folder, and compare what was made there with its images.

    Args:
        sources: What goes into each sub-folder, ``train`` and ``val`` (see `rsb_cluster.data.sources.open_set`).
        dest: The set's folder.
        shard_samples: At most so many samples a shard; fewer where images are so large that it would have more than
            256 MiB. A process holds one shard in memory, twice.
        recode: How to make images smaller; None keeps all files as they are.
        remake: What was made here is to be replaced.
        overwrite: What is there is to be replaced: what was made here, and *every* ``*.tar`` directly in a sub-folder.
        by_bytes: Compare images with the shards that are there by every byte, and not by their sizes only.
        workers: Processes that read shards that are there.
        progress: Called after each of these with the number of samples read and the total of the set.

    Raises:
        ConfigError: The folder holds what was not made here, or was made from other images; the sub-folders would not
            have the same classes; there are no samples; or a sample cannot be stored.
        DataError: An index is damaged, or an image cannot be made smaller.
        StorageError: The folder could not be read.
    """
    _check_same_classes(sources, dest)
    if not overwrite:
        _refuse_strangers(sources, dest)
    parts = {split: PartPlan(source, dest.child(split), shard_samples, recode) for split, source in sources.items()}
    advance = _counting(progress, 0, sum(map(len, sources.values())))
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
    """Write a set: a folder with a data set in each of its sub-folders, ``train/`` and ``val/``.

    Args:
        sources: What goes into each sub-folder. A sub-folder that is not named here is left as it is.
        dest: The set's folder.
        shard_samples: As in `plan_set`, like recode and remake.
        workers: Processes that each make shards.
        recode: How to make images smaller.
        remake: Replace what was made here.
        overwrite: Replace what is there; what was not made here is refused all the same.
        progress: Called with the number of samples written, over all sub-folders, and their total.

    Returns:
        The index of each sub-folder.

    Raises:
        ConfigError: As in `plan_set`; nothing has been changed.
        DataError: A source breaks the rules for samples.
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
    refuse_foreign(plan.going)
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

    The samples are shuffled (see `Source.order`). Shards that are sorted by class are the classic mistake: training
    shuffles within a few thousand samples at a time, so every batch would hold a few classes only, and BatchNorm and
    the optimizer would see one class after the other.

    Arguments and errors are those of `make_set` and `plan_set`; the folder is that of one part.
    """
    part = PartPlan(source, store, shard_samples, recode)
    part.check(_replace(remake, overwrite), by_bytes, workers, _counting(progress, 0, len(source)))
    plan = SetPlan({"": part})
    refuse_foreign(plan.going)
    return plan.make(workers, progress)[""]


def _replace(remake: bool, overwrite: bool) -> Replace:
    return "all" if overwrite else "own" if remake else "nothing"


def _counting(progress: Progress | None, done: int, total: int) -> Advance:
    """Return a function that adds up samples and tells their sum."""

    def advance(samples: int) -> None:
        nonlocal done
        done += samples
        if progress is not None:
            progress(done, total)

    return advance


def _refuse_strangers(sources: Mapping[str, DataSource], dest: Store) -> None:
    """Refuse to put the first part of a set into a folder of other things."""
    there = dest.entries()
    parts = {name: Part.of(dest.child(name)) for name in SPLITS if name in there}
    if any(part.record or INDEX_NAME in part.entries for part in parts.values()):
        return  # it is a set already
    strangers = sorted(name for name in there if name not in sources and (name not in parts or parts[name].entries))
    if strangers:
        raise ConfigError(
            f"{dest.url} is not empty: it holds {shown(strangers)}. Choose a folder for the set alone, such as "
            f"{dest.url}/NAME."
        )


def _check_same_classes(sources: Mapping[str, DataSource], dest: Store) -> None:
    """Refuse parts of a set in which one number would mean two classes."""
    known = {split: tuple(source.classes) for split, source in sources.items()}
    known |= {split: read_classes(dest.child(split)) for split in SPLITS if split not in known}
    for split, classes in known.items():
        for other, others in known.items():
            if classes and others and classes != others:
                differing = sorted(set(classes) ^ set(others)) or ["their order"]
                raise ConfigError(
                    f"{split} has {len(classes)} classes and {other} has {len(others)}; they differ in: "
                    f"{', '.join(differing[:5])}. Make both from the same list of classes."
                )
