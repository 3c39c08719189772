"""A subset of classes, of an index or of labels, without other shards.

The classes are renumbered in the order of the list. The subset of an index is an index of the same shards with fewer
samples, and has a digest of its own: nothing that reads an index need know that it is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rsb_cluster.data.index import ShardIndex, checked_index, content_digest
from rsb_cluster.data.labels import LabelFile, LabelSets
from rsb_cluster.data.spelling import same_name
from rsb_cluster.errors import ConfigError, did_you_mean


def class_numbers(names: Sequence[str], known: Sequence[str], where: str) -> dict[int, int]:
    """Return the number of each chosen class, by its number among the known ones.

    Args:
        names: The chosen classes, in their new order.
        known: All classes, in their order.
        where: Whose they are, for messages.

    Raises:
        ConfigError: A class is unknown, or named twice.
    """
    number: dict[str, int] = {}
    repeated: dict[str, int] = {}
    for i, name in enumerate(map(same_name, known)):
        if number.setdefault(name, i) != i:
            repeated[name] = i
    wanted = [same_name(name) for name in names]
    for name in wanted:
        if name not in number:
            raise ConfigError(
                f"{where} has no class '{name}'.{did_you_mean(name, known)} It has {len(known):,}, such as "
                f"{', '.join(known[:3]) or 'none with a name'}."
            )
        if name in repeated:
            raise ConfigError(f"{where} has two classes '{name}', {number[name]} and {repeated[name]}. Rename one.")
    if len(set(wanted)) < len(wanted):
        raise ConfigError(f"the class '{max(wanted, key=wanted.count)}' is named twice. Name it once.")
    return {number[name]: new for new, name in enumerate(wanted)}


def choose_classes(index: ShardIndex, names: Sequence[str], where: str) -> ShardIndex:
    """Return the index of the samples of some classes; the index itself if no class is named.

    Args:
        index: The index.
        names: The classes, in their new order. Classes without a name are called by their number.
        where: The folder, for messages.

    Raises:
        ConfigError: A class is unknown, or named twice, or there is no sample of any.
    """
    if not names:
        return index
    numbers = class_numbers(names, index.class_names, where)
    new = np.full(index.num_classes, -1, dtype="<i4")
    new[list(numbers)] = list(numbers.values())
    labels = new[index.labels]
    kept = np.flatnonzero(labels >= 0)
    if not len(kept):
        raise ConfigError(f"{where} has no sample of the classes {', '.join(names[:5])}. Name others.")
    keys = [index.key_bytes[slice(*index.key_starts[i : i + 2])] for i in kept.tolist()]
    chosen = replace(
        index,
        # Shards without a chosen sample stay, so that they keep their numbers.
        shard_start=np.searchsorted(kept, index.shard_start).astype("<i8"),
        labels=labels[kept],
        offsets=index.offsets[kept],
        stops=index.stops[kept],
        image_offsets=index.image_offsets[kept],
        image_sizes=index.image_sizes[kept],
        key_bytes=b"".join(keys),
        key_starts=np.cumsum([0, *map(len, keys)]).astype("<i8"),
        classes=tuple(names),
        num_classes=len(names),
    )
    return checked_index(replace(chosen, digest=content_digest(chosen)))


def choose_sets(sets: LabelSets, index: ShardIndex, names: Sequence[str], where: str) -> LabelSets:
    """Return the label sets of the samples of some classes (see `choose_classes`), with these classes only.

    Args:
        sets: The label sets of all samples.
        index: The index of all samples.
        names: The classes.
        where: The folder, for messages.
    """
    numbers = class_numbers(names, index.class_names, where)
    kept = [i for i, label in enumerate(index.labels.tolist()) if label in numbers]
    chosen = [_renumbered(sets.of(i).tolist(), numbers) for i in kept]
    return LabelSets(
        starts=np.cumsum([0, *map(len, chosen)], dtype=np.int64),
        classes=_flat(chosen),
        among=None if sets.among is None else np.sort(_flat([_renumbered(sets.among.tolist(), numbers)])),
        groups={name: members[kept] for name, members in sets.groups.items()},
    )


def choose_labels(labels: LabelFile, keys: set[str], numbers: Mapping[int, int]) -> LabelFile:
    """Return the label sets of some images, with some classes only.

    Args:
        labels: The label sets.
        keys: The images' keys.
        numbers: The new number of each class.
    """
    return labels.model_copy(
        update={
            "labels": {key: _renumbered(found, numbers) for key, found in labels.labels.items() if key in keys},
            "among": None if labels.among is None else tuple(sorted(_renumbered(labels.among, numbers))),
            "groups": {name: [key for key in found if key in keys] for name, found in labels.groups.items()},
        }
    )


def _renumbered(classes: Sequence[int], numbers: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(numbers[label] for label in classes if label in numbers)


def _flat(classes: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    return np.array([label for found in classes for label in found], dtype=np.int64)
