"""Where the samples are: finding the shards of a recipe, and refusing those that are not its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.data.index import INDEX_NAME, SHARD_SUFFIX, ShardIndex, load_index
from rsb_cluster.data.make import SetPlan, plan_set
from rsb_cluster.data.part import source_of
from rsb_cluster.data.sources import SPLITS, open_set
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.storage.store import Store


@dataclass(frozen=True)
class DataLocation:
    """Where the samples will come from.

    Attributes:
        url: Folder with ``train/`` and ``val/``.
        train: Index of the training shards, or None where there are none (a dry run may go on without).
        val: Index of the validation shards, or None.
        to_make: The data set to make there: the shards are not there yet, and the indices are those they will have.
        problem: Why there are none.
    """

    url: str
    train: ShardIndex | None = None
    val: ShardIndex | None = None
    to_make: str = ""
    problem: str = ""

    @property
    def is_found(self) -> bool:
        """Whether there are shards, or will be."""
        return self.train is not None and self.val is not None

    @property
    def digest(self) -> str:
        """Stands for the content of both parts; unknown without data."""
        return f"{self.train.digest}+{self.val.digest}" if self.train and self.val else "unknown"

    def check(self, recipe: Recipe) -> None:
        """Refuse shards that are not those of a recipe. Raises ConfigError."""
        for name, index, wanted in (
            ("train", self.train, recipe.data.train_samples),
            ("val", self.val, recipe.data.val_samples),
        ):
            if index is None:
                continue
            if index.num_samples != wanted:
                raise ConfigError(
                    f"{self.url}/{name} holds {index.num_samples} samples, the recipe says "
                    f"data.{name}_samples = {wanted}. If this is the right data, add "
                    f"--set data.{name}_samples={index.num_samples}."
                )
            largest = int(index.labels.max(initial=-1))
            if largest >= recipe.data.num_classes:
                raise ConfigError(
                    f"{self.url}/{name} has a sample of class {largest}, the recipe says data.num_classes = "
                    f"{recipe.data.num_classes}. Use --set data.num_classes={max(largest + 1, index.num_classes)}."
                )


def find_data(name: str, given: str, job: Job, make: str = "") -> DataLocation:
    """Look for the shards of a set, and read their indices. Nothing is written.

    Args:
        name: The set, ``data.set`` of a recipe.
        given: What the user said: the set's own folder, or a root that holds it by name; empty: the job's root.
        job: Where to train.
        make: The data set that can be made where there are no shards, ``data.make`` of a recipe; empty: none.

    Raises:
        DataError: There are shards without those of ``val``, or an index is damaged.
        StorageError: A folder could not be read.
    """
    root = Store(given or job.data or os.environ.get("RSB_DATA") or str(Path.cwd() / "data")).url
    candidates = [root, f"{root}/{name}"] if given else [f"{root}/{name}"]
    begun = [url for url in candidates if make and _is_begun(Store(url))]
    for url in candidates:
        store = Store(url)
        if store.exists(f"train/{INDEX_NAME}") and url not in begun:
            return DataLocation(url, load_index(store.child("train")), load_index(store.child("val")))
    looked = "\n".join(f"  {url}/train/{INDEX_NAME}" for url in candidates)
    problem = (
        f"no shards of '{name}' were found. Looked for\n{looked}\n"
        "Say where they are with --data, or make them with 'rsb-cluster shards make'."
    )
    for part in (Store(url).child(part) for url in candidates for part in SPLITS):
        if _lacks_index(part):
            problem += f"\n{part.url} holds shards without an index: run 'rsb-cluster shards index {part.url}'."
    if not make:
        return DataLocation(candidates[0], problem=problem)
    url = (begun or candidates)[0]
    try:
        _plan(make, url)
    except ConfigError as error:
        advice = f"\nWith --data {url}/{name} they are made in that folder." if url != candidates[-1] else ""
        return DataLocation(url, problem=f"{problem}\nThe shards of '{make}' are not made in {url}: {error}{advice}")
    return DataLocation(url, *_made_aside(make), to_make=make)


def require_data(source: DataLocation) -> None:
    """Raise DataError where there are no shards."""
    if not source.is_found:
        raise DataError(source.problem)


def make_missing_shards(sources: Iterable[DataLocation]) -> list[str]:
    """Make the shards that sources count on and that are not there yet; return their folders.

    It is the last thing before runs are submitted: whatever may refuse them has been asked by then.

    Raises:
        ConfigError: Something else is in a folder by now.
        DataError: The shards are not those that were counted on.
        StorageError: A folder could not be written.
    """
    missing = {source.url: source for source in sources if source.to_make}
    for url, source in missing.items():
        made = _plan(source.to_make, url).make()
        if DataLocation(url, made["train"], made["val"]).digest != source.digest:
            raise DataError(f"the shards in {url} were made by somebody else in this moment. Try again.")
    return list(missing)


def _plan(make: str, url: str) -> SetPlan:
    return plan_set(open_set(make), Store(url))


@cache
def _made_aside(make: str) -> tuple[ShardIndex, ShardIndex]:
    """Return the indices of a set that brings its own data: the same samples give the same bytes anywhere.

    With them all can be checked, and the runs be named, before anything is written where the user will find it.
    """
    with tempfile.TemporaryDirectory(prefix="rsb-cluster-") as folder:
        made = _plan(make, folder).make()
    return made["train"], made["val"]


def _is_begun(store: Store) -> bool:
    """Whether a set was begun here by 'shards make', and lacks a part."""
    records = [source_of(store.child(part)) for part in SPLITS]
    return any(records) and not all(store.exists(f"{part}/{INDEX_NAME}") for part in SPLITS)


def _lacks_index(store: Store) -> bool:
    names = store.names()
    return INDEX_NAME not in names and any(name.endswith(SHARD_SUFFIX) for name in names)
