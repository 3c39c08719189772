"""Suites: data sets on which weights are evaluated by one command.

A further set is an entry in datasets.toml, and a line here.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rsb_cluster.config.settings import data_root
from rsb_cluster.data.index import INDEX_NAME
from rsb_cluster.data.labels import CLASS_MASKS, label_file_name
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.evaluation.record import Evaluation
from rsb_cluster.storage.store import Store


@dataclass(frozen=True)
class SuiteItem:
    """One column of a suite.

    Attributes:
        title: Its head.
        data_set: Name in datasets.toml, and of the folder below that of all data sets.
        labels: Name of label sets; empty for the data set's own.
    """

    title: str
    data_set: str
    labels: str = ""


SUITES: Mapping[str, tuple[SuiteItem, ...]] = {
    "imagenet": (
        SuiteItem("val", "imagenet-1k"),
        SuiteItem("ReaL", "imagenet-1k", "real"),
        SuiteItem("V2", "imagenet-v2"),
        SuiteItem("V2 threshold", "imagenet-v2-threshold"),
        SuiteItem("V2 top images", "imagenet-v2-top-images"),
        SuiteItem("Sketch", "imagenet-sketch"),
        SuiteItem("A", "imagenet-a"),
        SuiteItem("A clean", "imagenet-1k", "a-classes"),
        SuiteItem("R", "imagenet-r"),
        SuiteItem("R clean", "imagenet-1k", "r-classes"),
    )
}


@dataclass(frozen=True)
class Suite:
    """What there is of a suite.

    Attributes:
        root: The folder of data sets.
        items: The columns whose data are there, with the folder of each.
        missing: A sentence on each that is not there.
    """

    root: str
    items: tuple[tuple[SuiteItem, str], ...]
    missing: tuple[str, ...]


def find_suite(name: str, data: str = "") -> Suite:
    """Find the data sets of a suite.

    Args:
        name: A key of `SUITES`.
        data: The folder of data sets; empty: ``$RSB_DATA``, or ``./data``.

    Raises:
        ConfigError: There is no such suite.
        DataError: None of the data sets is there.
        StorageError: The folder could not be read.
    """
    if name not in SUITES:
        raise ConfigError(f"there is no suite '{name}'. There is: {', '.join(SUITES)}.")
    root = Store(data or data_root())
    items, missing = [], []
    for item in SUITES[name]:
        val = root.child(item.data_set, "val")
        has_file = item.labels and item.labels not in CLASS_MASKS
        if not val.exists(INDEX_NAME):
            folder = root.child(item.data_set).url
            hint = f"rsb-cluster shards make {item.data_set} {shlex.quote(folder)} --split val --root FOLDER"
            missing.append(f"{item.title} is left out: there is no {val.locate(INDEX_NAME)}. Make it: {hint}")
        elif has_file and not val.exists(label_file_name(item.labels)):
            hint = f"rsb-cluster shards labels {item.labels} {shlex.quote(val.url)}"
            missing.append(f"{item.title} is left out: {val.url} has no labels '{item.labels}'. Add them: {hint}")
        else:
            items.append((item, root.child(item.data_set).url))
    if not items:
        raise DataError("\n".join((f"{root.url} has none of the data sets of the suite '{name}'.", *missing)))
    return Suite(root.url, tuple(items), tuple(missing))


def suite_rows(found: Iterable[tuple[SuiteItem, Evaluation]]) -> dict[str, dict[str, float | None]]:
    """Return the value of each column by weights, in the order in which they were evaluated.

    Args:
        found: The evaluations, with the column of each.
    """
    rows: dict[str, tuple[str, dict[str, float | None]]] = {}
    for item, evaluation in found:
        name = f"{evaluation.weights}{' (EMA)' if evaluation.ema else ''}"
        rows.setdefault(evaluation.owner, (name, {}))[1][item.title] = evaluation.value
    names = [name for name, _ in rows.values()]
    return {name if names.count(name) == 1 else f"{name} ({owner})": values for owner, (name, values) in rows.items()}
