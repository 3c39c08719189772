"""A recipe with other data than its own: what the index knows is filled in, and what does not fit is said."""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsb_cluster.config.catalog import Resolved
from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Data, Recipe
from rsb_cluster.config.schema import flatten
from rsb_cluster.data.datasets import known_data_sets
from rsb_cluster.data.index import ShardIndex
from rsb_cluster.data.sampled import Triple, pixel_statistics, shorter_sides
from rsb_cluster.data.split_folder import read_source_record
from rsb_cluster.data.verify import class_samples
from rsb_cluster.errors import RsbError
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.data_location import DataLocation

log = logging.getLogger(__name__)

# A batch that is lowered, as train/ has fewer images than one, leaves so many steps in an epoch, and has a pair of
# images for each of the eight GPUs of a node. It does not depend on the job, as a run's id must not.
STEPS_OF_EPOCH, LEAST_BATCH = 8, 16
# From random weights, more epochs than this of fewer images than this mostly repeat them.
MANY_EPOCHS, FEW_IMAGES = 50, 5000
IMBALANCE = 10  # images of the largest class over those of the smallest
FP16_ON_CPU = "1 against 13 images/s for a ResNet-50 on two cores"  # measured


def fit_to_data(resolved: Resolved, location: DataLocation, *, stats: bool = False) -> Resolved:
    """Return a recipe for the data that it is to be trained on.

    If these are not the recipe's own, the number of classes and of images, and the name of the set, are those of the
    index; a batch that is larger than the data is lowered. So they are if the user chooses some classes. Fields that
    the user gave are left alone. If the data are the recipe's own, nothing changes: other counts then mean that shards
    are missing, which `DataLocation.check` refuses.

    Args:
        resolved: The recipe.
        location: The data.
        stats: Also measure mean and standard deviation of the training images.
    """
    train, val = location.train, location.val
    if train is None or val is None:
        return resolved
    values: dict[str, Any] = {}
    is_other = not _is_its_own(resolved.recipe.data, location)
    if is_other or "data.classes" in resolved.given:  # with some classes only, the other images are not missing
        values = {
            "data.set": _name(location) if is_other else resolved.recipe.data.set,
            "data.num_classes": max(train.num_classes, val.num_classes),
            "data.train_samples": train.num_samples,
            "data.val_samples": val.num_samples,
        }
        if train.num_samples < resolved.recipe.train.global_batch:
            values["train.global_batch"] = batch = _smaller_batch(train.num_samples)
            if batch % (2 * max(1, resolved.recipe.train.virtual_ranks)):  # Mixup needs pairs in each of them
                values["train.virtual_ranks"] = 0  # chosen at submit
    if stats:
        values["data.mean"], values["data.std"] = _pixel_statistics(location)
    values = {key: value for key, value in values.items() if key not in resolved.given}
    return resolved.replace(values) if values else resolved


def filled(before: Recipe, after: Recipe) -> dict[str, Any]:
    """Return the fields that `fit_to_data` has replaced, with their values."""
    old, new = flatten(before), flatten(after)
    return {key: new[key] for key in new if new[key] != old[key]}


def doubts(resolved: Resolved, job: Job, location: DataLocation) -> list[str]:
    """Return a sentence for each setting that does not fit the data, the batch or the hardware, and what to do."""
    recipe, train = resolved.recipe, location.train
    found = [_rate_for_another_batch(resolved)]
    if recipe.train.amp == "fp16" and not job.gpus_per_node:
        found.append(
            f"train.amp = fp16 is slow on CPUs ({FP16_ON_CPU}). Use --set train.amp=off, or GPUs: --gpus-per-node N."
        )
    if train is not None:
        found += [
            _one_class(train),
            _classes_without_images(recipe, train),
            _few_images(recipe, train),
            imbalance(train),
        ]
        if recipe.data != resolved.original.data:  # those of a published procedure are as it has them
            found.append(_small_pictures(recipe, location))
    return [doubt for doubt in found if doubt]


def describe_classes(index: ShardIndex) -> str:
    """Return the number of classes with images, and how many each has."""
    counts = class_samples(index)
    there = counts[counts > 0]
    if there.min() == there.max():
        return f"{len(there):,}, {there.min():,} images each"
    smallest, largest = int(np.where(counts > 0, counts, counts.max() + 1).argmin()), int(counts.argmax())
    names = index.class_names
    return (
        f"{len(there):,}, {counts[smallest]:,} ({names[smallest]}) to {counts[largest]:,} ({names[largest]}) images "
        "each"
    )


def imbalance(index: ShardIndex) -> str:
    """Return a sentence if some classes have many times the images of others, or none; else an empty string."""
    counts = class_samples(index)
    if empty := int((counts == 0).sum()):
        return f"{empty:,} of {len(counts):,} classes {'has' if empty == 1 else 'have'} no training image."
    if (ratio := counts.max() / counts.min()) < IMBALANCE:
        return ""
    return (
        f"classes are imbalanced: {describe_classes(index)} ({ratio:.0f} times). Top-1 counts images, so it is mostly "
        "that of the large classes."
    )


def _is_its_own(data: Data, location: DataLocation) -> bool:
    """Whether data are those of a recipe: by their name, or because two of three numbers are the same."""
    train, val = location.train, location.val
    assert train is not None and val is not None
    same = (
        data.num_classes == max(train.num_classes, val.num_classes),
        data.train_samples == train.num_samples,
        data.val_samples == val.num_samples,
    )
    return sum(same) >= 2 or bool(location.to_make) or _name(location) == data.set


@cache
def _recorded_name(url: str) -> str:
    """Return the name of a published set in the record of `shards make`; empty for other data."""
    records = (read_source_record(Store(url).child(part)) for part in ("train", "val"))
    return next((str(record["data_set"]) for record in records if record.get("data_set")), "")


def _name(location: DataLocation) -> str:
    """Return the name of a data set: the published one's, else that of its folder."""
    return _recorded_name(location.url) or location.url.rstrip("/").rpartition("/")[2]


def _smaller_batch(images: int) -> int:
    """Return a power of two, or all images where there are very few."""
    wanted = max(images // STEPS_OF_EPOCH, LEAST_BATCH)
    return min(1 << (wanted.bit_length() - 1), images)


@cache
def _pixel_statistics(location: DataLocation) -> tuple[Triple, Triple]:
    assert location.train is not None
    log.info("measuring mean and std of training images in %s ...", location.url)
    return pixel_statistics(Store(location.url).child("train"), location.train)


def _rate_for_another_batch(resolved: Resolved) -> str:
    """Return a sentence if the batch was changed and the learning rate was not."""
    before, after = resolved.original, resolved.recipe
    if before.train.global_batch == after.train.global_batch or before.optimizer.lr != after.optimizer.lr:
        return ""
    ratio = after.train.global_batch / before.train.global_batch
    # LAMB's and Adam's step does not depend on the gradient's size: the square root is the usual rule for them.
    lr = after.optimizer.lr * (ratio if after.optimizer.name == "sgd" else math.sqrt(ratio))
    rule = "in proportion" if after.optimizer.name == "sgd" else "by the square root"
    return (
        f"optimizer.lr = {after.optimizer.lr:g} is for a batch of {before.train.global_batch:,}, and this one has "
        f"{after.train.global_batch:,}. Scaled {rule}: --set optimizer.lr={lr:.2g}"
    )


def _one_class(train: ShardIndex) -> str:
    if train.num_classes > 1:
        return ""
    return f"all images are of one class ({train.class_names[0]}), so there is nothing to learn. Are these the classes?"


def _classes_without_images(recipe: Recipe, train: ShardIndex) -> str:
    if recipe.data.num_classes <= train.num_classes:
        return ""
    return (
        f"data.num_classes = {recipe.data.num_classes:,}, and the data have {train.num_classes:,}: the other outputs "
        f"are never right. Use --set data.num_classes={train.num_classes}."
    )


def _few_images(recipe: Recipe, train: ShardIndex) -> str:
    epochs = recipe.schedule.epochs
    if recipe.init.weights or epochs <= MANY_EPOCHS or train.num_samples >= FEW_IMAGES:
        return ""
    return (
        f"{epochs:,} epochs of {train.num_samples:,} images from random weights mostly repeat them. Start from trained "
        f"weights (--init {recipe.model.name}, or a run), or train less: --set schedule.epochs=N."
    )


def _small_pictures(recipe: Recipe, location: DataLocation) -> str:
    """Return a sentence if most pictures are smaller than the crop; those of known sets are meant to be scaled up."""
    assert location.train is not None
    if location.to_make or recipe.data.make or _name(location) in known_data_sets():
        return ""
    try:
        sides = _sides(location)
    except RsbError as error:
        return f"the sizes of the pictures could not be read: {error}"
    side = max(recipe.augment.resolution, recipe.eval.resolution)
    if not len(sides) or np.median(sides) >= side:
        return ""
    seen = f"{sides[0]} to {sides[-1]}" if sides[0] < sides[-1] else f"{sides[0]}"
    return (
        f"most pictures are smaller than the crop of {side} px: the shorter sides of {len(sides)} are {seen} px, and "
        "are scaled up. A smaller augment.resolution and eval.resolution train faster."
    )


@cache
def _sides(location: DataLocation) -> NDArray[np.int64]:
    assert location.train is not None
    return shorter_sides(Store(location.url).child("train"), location.train)
