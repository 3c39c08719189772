"""Label sets: more than one correct class for an image, or none that is public.

The index has one class per image. ImageNet's ReaL labels and VizWiz-Classification have a *set* of classes for each
image, any of which is correct; an image with an empty set is not scored. Such labels are kept in a file next to the
index of a split, ``labels-<name>.json``:

    {"format": 1, "about": "...", "among": [291, ...] or null,
     "labels": {"<key>": [970, 795], ...}, "groups": {"Blur": ["<key>", ...], ...}}

They are joined by key and not by number: the file fits the same images in any order, in other shards, and in a subset
of them. ``among`` are the classes that can be predicted (the logits are restricted to them); ``groups`` are subsets of
the images that are scored separately as well.

Two label sets have no file: ``a-classes`` and ``r-classes`` are an index's own classes among the 200 of ImageNet-A and
of ImageNet-R. On those sets all images have one of them; on ImageNet's val they are what timm calls the clean subset.

``rsb-cluster evaluate --labels NAME`` selects them. Without ``--labels`` the name is the ``default_labels`` of the data
set in datasets.toml, which is looked up by the ``data_set`` in the split's source.json; if that is empty too, the
index's labels are used.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from rsb_cluster.config.schema import read_record
from rsb_cluster.data.index import ShardIndex
from rsb_cluster.errors import ConfigError, DataError, MissingError
from rsb_cluster.storage.store import Store

REAL = "real"
# The list of classes of each, which timm ships: numbers among ImageNet's 1,000.
CLASS_MASKS = {"a-classes": "imagenet_a_indices.txt", "r-classes": "imagenet_r_indices.txt"}
_REAL_IMAGES = 50_000
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


class LabelFile(BaseModel):
    """The content of a ``labels-<name>.json``; see the module's docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    about: str
    among: tuple[int, ...] | None = None
    labels: Mapping[str, Sequence[int]]
    groups: Mapping[str, Sequence[str]] = {}


@dataclass(frozen=True, eq=False)
class LabelSets:
    """The label sets of the N samples of an index.

    Attributes:
        starts: The start of each sample's classes in ``classes``, and the end of the last, shape (N + 1,).
        classes: The classes of all samples, concatenated.
        among: The classes that can be predicted, ascending; None for all.
        groups: For each named group whether a sample is in it, shape (N,).
    """

    starts: NDArray[np.int64]
    classes: NDArray[np.int64]
    among: NDArray[np.int64] | None = None
    groups: dict[str, NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def scored(self) -> NDArray[np.bool_]:
        """Whether a sample has any label, shape (N,)."""
        return np.diff(self.starts) > 0

    def of(self, sample: int) -> NDArray[np.int64]:
        """Return the correct classes of a sample."""
        return self.classes[self.starts[sample] : self.starts[sample + 1]]


def label_file_name(name: str) -> str:
    """Return the file name of the label sets with a name."""
    return f"labels-{name}.json"


def label_files(names: Iterable[str]) -> dict[str, str]:
    """Return the names of the label sets among a folder's files, by file name."""
    pattern = re.compile(re.escape(label_file_name("*")).replace(r"\*", "(.+)"))
    return {name: found[1] for name in names if (found := pattern.fullmatch(name))}


def pack_labels(content: LabelFile) -> bytes:
    """Return the bytes of a file of label sets; equal label sets give equal bytes."""
    lines = ",\n".join(f"{json.dumps(key)}: {list(classes)}" for key, classes in sorted(content.labels.items()))
    rest = content.model_dump_json(exclude={"labels"})
    return f'{rest[:-1]},"labels":{{\n{lines}\n}}}}\n'.encode()


def write_labels(store: Store, name: str, content: LabelFile) -> None:
    """Write label sets next to an index."""
    store.write_bytes(label_file_name(name), pack_labels(content))


def renew_labels(store: Store, name: str, content: LabelFile) -> None:
    """Write label sets next to an index; they replace only older ones of the same kind.

    Raises:
        ConfigError: A file of another kind has that name.
        StorageError: They could not be read or written.
    """
    file = label_file_name(name)
    if store.exists(file) and label_kind(store.read_bytes(file)) != label_kind(pack_labels(content)):
        raise ConfigError(f"{store.locate(file)} was not made by this command. Move it away, then try again.")
    write_labels(store, name, content)


def label_kind(content: bytes) -> str | None:
    """Return the kind of a file of label sets, from its ``about``; None if it is no such file."""
    try:
        return LabelFile.model_validate_json(content).about.partition(":")[0]
    except ValidationError:
        return None


def masked_labels(index: ShardIndex, name: str) -> LabelSets:
    """Return the classes of an index as label sets among some of ImageNet's classes; an image of another has none.

    Args:
        index: An index of images of ImageNet's 1,000 classes.
        name: A key of `CLASS_MASKS`.

    Raises:
        DataError: Its classes are others, or in another order.
    """
    names = tuple(timm_info("imagenet_synsets.txt").read_text().split())
    if index.num_classes != len(names) or (index.classes and index.classes != names):
        raise DataError(
            f"the labels '{name}' are for images of ImageNet's {len(names):,} classes in the order of their WordNet "
            f"ids; this set has {index.num_classes:,}"
            + (f", with '{index.classes[0]}' as the first. " if index.classes else ". ")
            + "Make it with 'rsb-cluster shards make' and the name of the data set."
        )
    among = np.array(sorted(map(int, timm_info(CLASS_MASKS[name]).read_text().split())), dtype=np.int64)
    scored = np.isin(index.labels, among)
    return LabelSets(
        starts=np.concatenate([[0], np.cumsum(scored)]).astype(np.int64),
        classes=index.labels[scored].astype(np.int64),
        among=among,
    )


def labels_digest(store: Store, name: str) -> str:
    """Return the SHA-256 (hex) of the file of label sets, or of the list of classes of a mask."""
    if name in CLASS_MASKS:
        return hashlib.sha256(timm_info(CLASS_MASKS[name]).read_bytes()).hexdigest()
    return hashlib.sha256(store.read_bytes(label_file_name(name))).hexdigest()


def load_label_sets(store: Store, index: ShardIndex, name: str) -> LabelSets:
    """Read the label sets next to an index, or return those of a mask (see `masked_labels`).

    Raises:
        DataError: There are none of that name, they are damaged, or a sample of the index is missing.
        StorageError: The folder could not be read.
    """
    if name in CLASS_MASKS:
        return masked_labels(index, name)
    url = store.locate(label_file_name(name))
    try:
        content = read_record(LabelFile, store.read_bytes(label_file_name(name)), url)
    except MissingError as error:
        there = sorted(label_files(store.names()).values()) if store.lists_files else []
        hint = (
            f"Make the ReaL labels with: rsb-cluster shards labels {REAL} {shlex.quote(store.url)}"
            if name == REAL
            else f"It has {', '.join(there) or 'none'}; {', '.join(CLASS_MASKS)} are for ImageNet's classes."
        )
        raise DataError(f"there are no labels '{name}' for {store.url}: {url} does not exist. {hint}") from error
    except ConfigError as error:
        raise DataError(f"{url} is damaged: {error} Make it again.") from error
    keys = [index.key(i) for i in range(index.num_samples)]
    missing = [key for key in keys if key not in content.labels]
    if missing:
        raise DataError(f"{url} has no entry for {len(missing)} images, '{missing[0]}' among them. Make it again.")
    sets = [content.labels[key] for key in keys]
    if any(not 0 <= label < index.num_classes for classes in sets for label in classes):
        raise DataError(f"{url} names classes that the index does not have ({index.num_classes}). Make it again.")
    return LabelSets(
        starts=np.cumsum([0, *map(len, sets)], dtype=np.int64),
        classes=np.array([label for classes in sets for label in classes], dtype=np.int64),
        among=None if content.among is None else np.array(sorted(content.among), dtype=np.int64),
        groups={group: np.isin(keys, sorted(members)) for group, members in content.groups.items()},
    )


def real_labels(keys: Iterable[str], file: Path | None = None) -> LabelFile:
    """Join the ReaL labels (Beyer et al. 2020, arXiv:2006.07159) to images of ImageNet's validation set.

    Args:
        keys: Keys that contain the image's number, as in ``ILSVRC2012_val_00000001``; the join uses that number.
        file: The authors' real.json: a list of 50,000 lists of classes, by that number. None for the copy that timm
            ships.

    Raises:
        ConfigError: The file is not the authors', or a key has no number.
    """
    path = file or timm_info("imagenet_real_labels.json")
    try:
        by_number = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the ReaL labels {path}: {error}. Give the authors' real.json.") from error
    if not isinstance(by_number, list) or len(by_number) != _REAL_IMAGES:
        content = f"{len(by_number):,} entries" if isinstance(by_number, list) else "no list"
        raise ConfigError(f"{path} holds {content}; real.json is a list of {_REAL_IMAGES:,}. Give the authors' file.")
    joined = {}
    for key in keys:
        found = _VAL_NUMBER.search(key)
        if found is None or not 1 <= int(found[1]) <= _REAL_IMAGES:
            raise ConfigError(
                f"the key '{key}' does not name an image of ImageNet's validation set (ILSVRC2012_val_00000001 to "
                f"ILSVRC2012_val_{_REAL_IMAGES:08d}), so it has no ReaL label. Use shards of ImageNet's val."
            )
        joined[key] = by_number[int(found[1]) - 1]
    try:
        return LabelFile(about="ReaL: Beyer et al. 2020, arXiv:2006.07159", labels=joined)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{path} is no list of lists of classes: it has {first['input']!r} for '{first['loc'][1]}'. Give the "
            "authors' file."
        ) from error


def timm_info(name: str) -> Path:
    """Return the path of a file about ImageNet that timm ships, without importing timm, which imports torch."""
    found = find_spec("timm")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0], "data", "_info", name)
