"""Where the samples are: finding the shards of a recipe, and refusing those that are not its own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rsb_cluster.catalog import load_recipe
from rsb_cluster.data.index import INDEX_NAME, ShardIndex, load_index
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.job import Job
from rsb_cluster.recipe import Recipe
from rsb_cluster.storage import Store


@dataclass(frozen=True)
class DataSource:
    """Where the samples will come from.

    Attributes:
        url: Folder with ``train/`` and ``val/``.
        train: Index of the training shards, or None where there are none (a dry run may go on without).
        val: Index of the validation shards, or None.
        problem: Why there are none.
    """

    url: str
    train: ShardIndex | None = None
    val: ShardIndex | None = None
    problem: str = ""

    @property
    def is_found(self) -> bool:
        """Whether there are shards."""
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


def find_data(name: str, given: str, job: Job) -> DataSource:
    """Look for the shards of a set, and read their indices.

    Args:
        name: The set, ``data.set`` of a recipe.
        given: What the user said: the set's own folder, or a root that holds it by name; empty: the job's root.
        job: Where to train.
    """
    root = Store(given or job.data or os.environ.get("RSB_DATA") or str(Path.cwd() / "data")).url
    candidates = [root, f"{root}/{name}"] if given else [f"{root}/{name}"]
    for url in candidates:
        store = Store(url)
        if store.exists(f"train/{INDEX_NAME}"):
            return DataSource(url, load_index(store.child("train")), load_index(store.child("val")))
    looked = "\n".join(f"  {url}/train/{INDEX_NAME}" for url in candidates)
    problem = (
        f"no shards of '{name}' were found. Looked for\n{looked}\n"
        "Say where they are with --data, or make them with 'rsb-cluster shards make'. Shards without an index need "
        "'rsb-cluster shards index'."
    )
    return DataSource(candidates[0], problem=problem)


def require(source: DataSource) -> None:
    """Raise DataError where there are no shards."""
    if not source.is_found:
        raise DataError(source.problem)


def make_missing(recipes: Iterable[str], data: str) -> None:
    """Make the shards of those recipes that bring their own data."""
    for name in dict.fromkeys(recipes):
        recipe = load_recipe(name).recipe
        if recipe.data.make:
            make_data(recipe, data)


def make_data(recipe: Recipe, data: str) -> str:
    """Make the shards of a recipe that brings its own data, where they are missing; return their folder.

    The index of ``val`` is the last file of a set that is made, so what was interrupted is made again.
    """
    from rsb_cluster.data.make import make_set
    from rsb_cluster.data.sources import open_set

    url = data or str(Path.cwd() / "data" / recipe.data.set)
    if not Store(url).exists(f"val/{INDEX_NAME}"):
        make_set(open_set(recipe.data.make), Store(url), overwrite=True)
    return url
