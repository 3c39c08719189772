"""Where the samples are: find the shards of a recipe, and refuse shards that do not match it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.index import INDEX_NAME, SHARD_SUFFIX, ShardIndex, check_class_names, load_index
from rsb_cluster.data.make import SetPlan, plan_set
from rsb_cluster.data.sources import SPLITS, open_set
from rsb_cluster.data.split_folder import read_source_record
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.storage.store import Store


@dataclass(frozen=True)
class DataLocation:
    """Where the samples of a run are.

    Attributes:
        url: Folder with ``train/`` and ``val/``.
        train: Index of the training shards, or None if there are none (a dry run continues without).
        val: Index of the validation shards, or None.
        to_make: Name of the data set to make there before the submit; the indices are those it will have. Or empty.
        problem: Why there are no shards.
    """

    url: str
    train: ShardIndex | None = None
    val: ShardIndex | None = None
    to_make: str = ""
    problem: str = ""

    @property
    def is_found(self) -> bool:
        """Whether the shards exist, or will be made."""
        return self.train is not None and self.val is not None

    @property
    def digest(self) -> str:
        """Digest of the content of both parts; ``unknown`` without shards."""
        return f"{self.train.digest}+{self.val.digest}" if self.train and self.val else "unknown"

    def check(self, recipe: Recipe) -> None:
        """Refuse shards that do not match a recipe, or each other. Raises ConfigError."""
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
    root = Store(folder or job.data or os.environ.get("RSB_DATA") or str(Path.cwd() / "data")).url
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
    for part in (Store(url).child(part) for url in candidates for part in SPLITS):
        if _lacks_index(part):
            problem += f"\n{part.url} holds shards but no index: run 'rsb-cluster shards index {part.url}'."
    if not make:
        return DataLocation(candidates[0], problem=problem)
    url = (incomplete or candidates)[0]
    try:
        _plan(make, url)
    except ConfigError as error:
        advice = f"\nUse --data {url}/{name} to make them in that folder." if url != candidates[-1] else ""
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
    missing = {source.url: source for source in sources if source.to_make}
    for url, source in missing.items():
        made = _plan(source.to_make, url).make()
        if DataLocation(url, made["train"], made["val"]).digest != source.digest:
            raise DataError(f"another process wrote other shards to {url} at the same time. Submit again.")
    return list(missing)


def _plan(make: str, url: str) -> SetPlan:
    return plan_set(open_set(make), Store(url))


@cache
def _expected_indices(make: str) -> tuple[ShardIndex, ShardIndex]:
    """Return the indices that a data set will have, by making it in a temporary folder: shards are reproducible.

    So everything can be checked, and the runs have their ids, before anything is written to the user's folders.
    """
    with tempfile.TemporaryDirectory(prefix="rsb-cluster-") as folder:
        made = _plan(make, folder).make()
    return made["train"], made["val"]


def _is_incomplete(store: Store) -> bool:
    """Whether 'shards make' started a data set here and did not finish it."""
    records = [read_source_record(store.child(part)) for part in SPLITS]
    return any(records) and not all(store.exists(f"{part}/{INDEX_NAME}") for part in SPLITS)


def _lacks_index(store: Store) -> bool:
    names = store.names()
    return INDEX_NAME not in names and any(name.endswith(SHARD_SUFFIX) for name in names)
