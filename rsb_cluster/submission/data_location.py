"""Where the samples are: find the shards of a recipe, and refuse shards that do not match it."""

from __future__ import annotations

import logging
import shlex
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.settings import data_root
from rsb_cluster.data.index import INDEX_NAME, SHARD_SUFFIX, ShardIndex, check_class_names, load_index, shards_of
from rsb_cluster.data.make import SetPlan, plan_set
from rsb_cluster.data.sources import SPLITS, open_set
from rsb_cluster.data.split_folder import abbreviate, read_source_record
from rsb_cluster.data.subset import choose_classes
from rsb_cluster.errors import ConfigError, DataError, StorageError
from rsb_cluster.storage.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataLocation:
    """Where the samples of a run are.

    Attributes:
        url: Folder with ``train/`` and ``val/``.
        train: Index of the training shards, or None if there are none (a dry run continues without).
        val: Index of the validation shards, or None.
        to_make: Name of the data set to make there before the submit; the indices are those it will have. Or empty.
        problem: Why there are no shards.
        classes: The only classes that the indices have, in their order; empty for all.
    """

    url: str
    train: ShardIndex | None = None
    val: ShardIndex | None = None
    to_make: str = ""
    problem: str = ""
    classes: tuple[str, ...] = ()

    def choose(self, classes: tuple[str, ...]) -> DataLocation:
        """Return the same data with some classes only (``data.classes`` of a recipe), or all if none is named.

        Raises:
            ConfigError: A part has no such class, or no sample of any.
        """
        train, val = (
            index and choose_classes(index, classes, f"{self.url}/{part}")
            for part, index in (("train", self.train), ("val", self.val))
        )
        return replace(self, train=train, val=val, classes=classes)

    @property
    def is_found(self) -> bool:
        """Whether the shards exist, or will be made."""
        return self.train is not None and self.val is not None

    @property
    def folders(self) -> list[str]:
        """All folders that a node must be able to read: that of the indices, and those of the shards."""
        store = Store(self.url)
        parts = (("train", self.train), ("val", self.val))
        return [self.url, *(shards_of(store.child(name), index).url for name, index in parts if index is not None)]

    @property
    def digest(self) -> str:
        """Digest of the content of both parts; ``unknown`` without shards."""
        return f"{self.train.digest}+{self.val.digest}" if self.train and self.val else "unknown"

    def check(self, recipe: Recipe) -> None:
        """Refuse shards that do not match a recipe, or each other, or are not there.

        Raises:
            ConfigError: They do not match.
            DataError: Shards of an index are missing.
        """
        if self.train is not None and self.val is not None:
            check_class_names(f"{self.url}/train", self.train.classes, f"{self.url}/val", self.val.classes)
        for name, index, expected in (
            ("train", self.train, recipe.data.train_samples),
            ("val", self.val, recipe.data.val_samples),
        ):
            if index is None:
                continue
            if index.num_samples != expected:
                raise ConfigError(
                    f"{self.url}/{name} holds {index.num_samples} samples, but the recipe has "
                    f"data.{name}_samples = {expected}. If this is the right data, add "
                    f"--set data.{name}_samples={index.num_samples}."
                )
            largest = int(index.labels.max(initial=-1))
            if largest >= recipe.data.num_classes:
                raise ConfigError(
                    f"{self.url}/{name} has a sample of class {largest}, but the recipe has data.num_classes = "
                    f"{recipe.data.num_classes}. Use --set data.num_classes={max(largest + 1, index.num_classes)}."
                )
            if not self.to_make:
                _check_shards(Store(self.url).child(name), index)


def find_data(name: str, folder: str, job: Job, make: str = "") -> DataLocation:
    """Find the shards of a data set and read their indices. Nothing is written.

    Args:
        name: The data set, ``data.set`` of a recipe.
        folder: From the user: the data set's folder, or a folder of data sets; empty: the job's folder of data sets.
        job: Where to train.
        make: The data set to make if there are no shards, ``data.make`` of a recipe; empty: none.

    Raises:
        DataError: The shards of ``val`` are missing, or an index is damaged.
        StorageError: A folder could not be read.
    """
    root = Store(folder or job.data or data_root()).url
    candidates = [root, f"{root}/{name}"] if folder else [f"{root}/{name}"]
    incomplete = [url for url in candidates if make and _is_incomplete(Store(url))]
    for url in candidates:
        store = Store(url)
        if store.exists(f"train/{INDEX_NAME}") and url not in incomplete:
            return DataLocation(url, load_index(store.child("train")), load_index(store.child("val")))
    searched = "\n".join(f"  {url}/train/{INDEX_NAME}" for url in candidates)
    problem = (
        f"no shards of '{name}' were found. Searched for\n{searched}\n"
        "Name their folder with --data, or make them with 'rsb-cluster shards make'."
    )
    for store in map(Store, candidates):
        if store.exists(INDEX_NAME):
            problem += f"\n{store.url} is one part of a set: name the folder with train/ and val/."
    for store in (folder for url in candidates for folder in (Store(url), *map(Store(url).child, SPLITS))):
        if _lacks_index(store):
            index = f"rsb-cluster shards index {shlex.quote(store.url)}"
            problem += f"\n{store.url} holds shards but no index: run '{index}'."
    if not make:
        return DataLocation(candidates[0], problem=problem)
    url = (incomplete or candidates)[0]
    try:
        _plan(make, url)
    except ConfigError as error:
        own = shlex.quote(f"{url}/{name}")
        advice = f"\nUse --data {own} to make them in that folder." if url != candidates[-1] else ""
        return DataLocation(url, problem=f"{problem}\nThe shards of '{make}' cannot be made in {url}: {error}{advice}")
    return DataLocation(url, *_expected_indices(make), to_make=make)


def require_data(source: DataLocation) -> None:
    """Raise DataError if there are no shards."""
    if not source.is_found:
        raise DataError(source.problem)


def make_missing_shards(sources: Iterable[DataLocation]) -> list[str]:
    """Make the shards that recipes need and make themselves, if they do not exist yet; return their folders.

    Call it last before runs are submitted, when all checks have passed.

    Raises:
        ConfigError: A folder holds something else by now.
        DataError: The shards differ from those that were planned.
        StorageError: A folder could not be written.
    """
    missing = [source for source in sources if source.to_make]
    made = {source.url: _plan(source.to_make, source.url).make() for source in missing}
    for source in missing:
        expected = {"train": source.train, "val": source.val}
        there = {part: choose_classes(index, source.classes, source.url) for part, index in made[source.url].items()}
        if not all(index and there[part].has_digest(index.digest) for part, index in expected.items()):
            raise DataError(f"another process wrote other shards to {source.url} at the same time. Submit again.")
    return list(made)


def _plan(make: str, url: str) -> SetPlan:
    return plan_set(open_set(make), Store(url))


@cache
def _expected_indices(make: str) -> tuple[ShardIndex, ShardIndex]:
    """Return the indices that a data set will have, by making it in a temporary folder: shards are reproducible.

    So everything can be checked, and the runs have their ids, before anything is written to the user's folders.
    """
    log.info("making the small data set '%s' once, to know its checksums ...", make)
    with tempfile.TemporaryDirectory(prefix="rsb-cluster-") as folder:
        made = _plan(make, folder).make()
    return made["train"], made["val"]


def _is_incomplete(store: Store) -> bool:
    """Whether 'shards make' started a data set here and did not finish it."""
    records = [read_source_record(store.child(part)) for part in SPLITS]
    return any(records) and not all(store.exists(f"{part}/{INDEX_NAME}") for part in SPLITS)


def _check_shards(store: Store, index: ShardIndex) -> None:
    """Raise DataError if shards of an index are missing, as far as their folder can be listed."""
    folder = shards_of(store, index)
    try:
        there = set(folder.names()) if folder.lists_files else set(index.shards)
    except StorageError:  # to read files it need not be allowed to list them
        return
    if missing := [name for name in index.shards if name not in there]:
        raise DataError(
            f"{folder.url} lacks {len(missing):,} of the {len(index.shards):,} shards in its index: "
            f"{abbreviate(missing)}. Copy them there again; or, for those that are there: rsb-cluster shards index "
            f"{shlex.quote(store.url)}"
        )


def _lacks_index(store: Store) -> bool:
    names = store.names()
    return INDEX_NAME not in names and any(name.endswith(SHARD_SUFFIX) for name in names)
