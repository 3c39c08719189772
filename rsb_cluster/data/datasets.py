"""The data sets known by name: number of images, download, and metrics. datasets.toml holds them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict

Metric = Literal[
    "top1",  # correct images among all images
    "top5",  # images whose class is among the five best predictions
    "mean_per_class",  # mean over classes of the share of correct images (macro recall)
    "label_set_top1",  # images whose prediction is in their label set, among images that have one
    "macro_f1",  # mean over classes of F1
    "macro_precision",  # mean over classes of TP / (TP + FP)
    "macro_specificity",  # mean over classes of TN / (TN + FP)
    "recall",  # TP / (TP + FN) of class 1, of two
    "precision",  # TP / (TP + FP) of class 1, of two
]


class DataSet(BaseModel):
    """A data set that `rsb-cluster shards make` knows by name.

    Attributes:
        name: Name on the command line and in recipes (``data.set``).
        title: Name in prose.
        samples: Number of images of each split, ``train`` and ``val``.
        classes: Number of classes.
        metric: The metric that is compared with published results.
        also: Other metrics that are reported.
        mean: Mean of each channel (RGB) that networks for it expect, on a scale of 0 to 1; None if that varies.
        std: Standard deviation of each channel, likewise.
        default_labels: The label sets for scoring (`rsb_cluster.data.labels`); empty for the index's labels.
        reader: The function that opens it, and its argument.
        files: The files required in ``--root``; empty if none.
        download: Where to download it.
        licence: Its licence in short; no legal advice.
        note: A remark; may be empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    samples: Mapping[Literal["train", "val"], int]
    classes: int
    metric: Metric
    also: tuple[Metric, ...] = ()
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    default_labels: str = ""
    reader: str
    files: str = ""
    download: str
    licence: str
    note: str = ""


@cache
def known_data_sets() -> Mapping[str, DataSet]:
    """Return the data sets of datasets.toml by name, in its order."""
    content = tomllib.loads((files("rsb_cluster.data") / "datasets.toml").read_text(encoding="utf-8"))
    return MappingProxyType({name: DataSet(name=name, **fields) for name, fields in content.items()})
