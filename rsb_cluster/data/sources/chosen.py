"""Sources of the samples of some classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from rsb_cluster.data.sources.source import DataSource, Sample, class_in_entry, key_of
from rsb_cluster.data.subset import choose_labels, class_numbers
from rsb_cluster.errors import ConfigError


@dataclass(frozen=True)
class _ReadRenumbered:
    """Reads the samples of some classes, with their new numbers."""

    read: Callable[[Any], Sample]
    numbers: Mapping[int, int]

    def __call__(self, entry: Any) -> Sample:
        key, content, extension, label = self.read(entry)
        if label not in self.numbers or class_in_entry(entry) not in (None, label):
            raise RuntimeError(f"the class of '{key}' is {label}, which is not what its entry said")
        return key, content, extension, self.numbers[label]


def choose_from(source: DataSource, names: Sequence[str]) -> DataSource:
    """Return the source of the samples of some classes, which are numbered in the order of their names.

    It is no longer the data set of datasets.toml, whose counts and published results are those of all classes.

    Raises:
        ConfigError: A class is unknown, or named twice; there is no sample of any; or the classes of the samples are
            not known before the images are read.
    """
    numbers = class_numbers(names, source.classes, source.description)
    labels = [source.class_of(entry) for entry in source.entries]
    if None in labels:
        raise ConfigError(
            f"{source.description}: the class of an image is known only once it is read, so --classes cannot choose. "
            "Make all, and choose with data.classes in the recipe."
        )
    kept = [i for i, label in enumerate(labels) if label in numbers]
    if not kept:
        raise ConfigError(f"{source.description}: there is no image of the classes {', '.join(names[:5])}.")
    is_kept = [label in numbers for label in labels]
    blocks = tuple(sum(is_kept[start:stop]) for start, stop in pairwise(accumulate(source.block_samples, initial=0)))
    entries = [source.entries[i] for i in kept]
    keys = {key for entry in entries if (key := key_of(entry)) is not None}
    chosen = f"{len(names):,} of {len(source.classes):,} classes"
    return replace(
        source,
        classes=tuple(names),
        entries=entries,
        read=_ReadRenumbered(source.read, numbers),
        block_samples=tuple(size for size in blocks if size),
        labels={name: choose_labels(found, keys, numbers) for name, found in source.labels.items()},
        data_set="",
        sizes=[source.sizes[i] for i in kept] if source.sizes else (),
        notes=(*source.notes, *([chosen] if len(names) < len(source.classes) else [])),
    )
