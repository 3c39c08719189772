"""Evaluations: requests, and records of the results.

A record is kept beside the runs, in ``<runs>/evaluations/<run id, or the weights' name and digest>/<name>.json``, so
that one listing finds those of all runs and of other weights. Its name has a digest of everything that can change the
result: the weights, the data, the labels, the metric and the preprocessing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from rsb_cluster.config.schema import Section, read_record
from rsb_cluster.data.datasets import Metric
from rsb_cluster.errors import AccessError, RsbError, StorageError
from rsb_cluster.runs.run import EVALUATIONS
from rsb_cluster.runs.sharing import make_common_folder
from rsb_cluster.storage.store import Store

Amp = Literal["off", "fp16", "bf16"]
_Mean = Annotated[float, Field(ge=0, le=1)]
_Std = Annotated[float, Field(gt=0, le=1)]


class EvaluationRequest(Section):
    """A request of the user. Empty and zero fields default to the evaluation of the weights' run, or of timm.

    Attributes:
        sources: The weights (see `rsb_cluster.weights.resolve`).
        runs: Folder of runs, in which ids are looked up and records are written.
        data: Folder of a set or of a split, or a set's name below ``$RSB_DATA`` or ``./data``.
        labels: Name of label sets; empty for the data set's default.
        metric: The metric that is compared with published results; empty for the data set's own.
        model: Architecture of a weights file.
        mean: Mean of each channel (RGB) that the network expects, on a scale of 0 to 1; None: see `Evaluation`.
        std: Standard deviation of each channel, likewise.
        exact: Decode and resize with PIL; None: as the weights' run does.
        ema: Evaluate the moving average; None: a run's weights, and the average in a file that has one.
        batch_size: Images in a forward pass of a process.
        workers: Decoding threads of a process.
        predictions: Local file for the predictions; empty for none.
    """

    sources: tuple[str, ...]
    runs: str
    data: str
    part: str = "val"
    labels: str = ""
    metric: Metric | Literal[""] = ""
    model: str = ""
    resolution: int = 0
    crop: float = 0.0
    interpolation: Literal["", "bicubic", "bilinear"] = ""
    mean: tuple[_Mean, _Mean, _Mean] | None = None
    std: tuple[_Std, _Std, _Std] | None = None
    exact: bool | None = None
    amp: Amp | Literal[""] = ""
    ema: bool | None = None
    batch_size: int = 128
    workers: int = 0
    predictions: str = ""


class ImageGroup(Section):
    """A named group of images: its value of the evaluation's metric, and the number of scored images."""

    value: float
    scored: int


class Evaluation(Section):
    """The result of weights on a split of a data set; percent.

    Attributes:
        weights: Name of the weights.
        weights_digest: SHA-256 of the weights.
        run_id: The run; empty for other weights.
        step: Optimizer steps of the run.
        ema: Whether they are a moving average.
        entry: The state dict that was taken from a file of several (``model_ema``); empty for others.
        procedure: The published procedure that trained the weights; empty if unknown.
        data_set: Name of the set, that of datasets.toml if it is known by name.
        labels: Name of the label sets; empty for the index's classes.
        mean: Mean of each channel (RGB) that was subtracted, on a scale of 0 to 1; None in records of earlier versions.
        std: Standard deviation of each channel, likewise.
        normalization: Where mean and std come from.
        overrides: What was used instead of what the weights, or timm's defaults for them, say.
        metric: The metric of ``values`` that is compared with published results.
        loss: Mean cross-entropy, nats; None with label sets.
        samples: Number of images of the split.
        scored: Number of images with a label.
        bad: Number of images that could not be decoded: wrong for every metric.
        finished: Unix time.
    """

    # A later version may add fields; the record must still be readable.
    model_config = ConfigDict(frozen=True, extra="ignore")

    weights: str
    weights_digest: str
    weights_url: str = ""
    model: str
    procedure: str = ""
    run_id: str = ""
    step: int = 0
    ema: bool = False
    entry: str = ""
    data: str
    data_set: str
    part: str
    data_digest: str
    labels: str = ""
    labels_digest: str = ""
    resolution: int
    crop: float
    interpolation: str
    exact: bool
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    normalization: str = ""
    overrides: dict[str, Any] = Field({})
    amp: Amp = "off"
    metric: Metric
    values: dict[Metric, float]
    groups: dict[str, ImageGroup] = Field({})
    loss: float | None = None
    samples: int
    scored: int
    bad: int = 0
    processes: int = 1
    images_per_s: float = 0.0
    finished: float = 0.0
    code: dict[str, str] = Field({})
    packages: dict[str, str] = Field({})

    @property
    def value(self) -> float | None:
        """The metric's value; None where no image has a label."""
        return self.values.get(self.metric)

    @property
    def owner(self) -> str:
        """The folder of all evaluations of the same weights: the run's id, or the weights' name and digest."""
        return self.run_id or f"{safe_name(self.weights)}-{self.weights_digest[:8]}"

    @property
    def name(self) -> str:
        """The name of the record, with a digest of everything that can change the result."""
        fields = (
            *("weights_digest", "data_digest", "part", "labels", "labels_digest", "metric"),
            *("resolution", "crop", "interpolation", "exact", "amp"),
        )
        values = [getattr(self, field) for field in fields]
        text = json.dumps([*values, self.overrides] if self.overrides else values, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        parts = (self.data_set, self.part, self.labels, f"{self.resolution}px", digest)
        return "-".join(part for part in parts if part)

    def save(self, runs_url: str) -> str:
        """Write the record; return a warning if there was one with another result, else an empty string."""
        store, file = Store(runs_url), f"{EVALUATIONS}/{self.owner}/{self.name}.json"
        make_common_folder(runs_url, EVALUATIONS, self.owner)
        warning = ""
        if store.exists(file):
            before = read_record(Evaluation, store.read_json(file), store.locate(file))
            if before.values != self.values:
                store.write_json(file.replace(".json", f"-{before.finished:.0f}.json"), before.model_dump(mode="json"))
                warning = f"{store.locate(file)}: was {before.value}, is {self.value} now; the earlier record is kept"
        store.write_json(file, self.model_dump(mode="json"))
        return warning


def safe_name(weights: str) -> str:
    """Return the name of weights as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", weights)


def read_evaluations(runs_url: str) -> tuple[list[Evaluation], list[str]]:
    """Return all evaluations in a folder of runs, and the errors of those that cannot be read."""
    store = Store(runs_url)
    files, problems = _evaluation_files(store)
    found = []
    for file, content in zip(files, store.read_many(files), strict=True):
        try:
            if isinstance(content, StorageError):
                raise content
            found.append(read_record(Evaluation, content, store.locate(file)))
        except (RsbError, ValueError) as error:
            problems.append(f"{store.locate(file)} cannot be read: {error}")
    return found, problems


def _evaluation_files(store: Store) -> tuple[list[str], list[str]]:
    """Return the files of all evaluations in a folder of runs, and the errors of folders that cannot be read."""
    try:
        return _json_files(store, EVALUATIONS), []
    except AccessError as error:
        files, problems = [], [str(error)]
        with suppress(AccessError):
            names = store.names(EVALUATIONS)
            problems = []  # it can be read, and one below it cannot
            for name in names:
                try:
                    files += _json_files(store, f"{EVALUATIONS}/{name}")
                except AccessError as one:
                    problems.append(str(one))
        return files, problems


def _json_files(store: Store, folder: str) -> list[str]:
    return [name for name in store.files(folder) if name.endswith(".json")]


def plain_values(evaluation: Evaluation) -> Mapping[str, float]:
    """Return all values of an evaluation by metric, and by metric and group: ``label_set_top1 Blur``."""
    groups = {f"{evaluation.metric} {name}": group.value for name, group in evaluation.groups.items()}
    return {str(metric): value for metric, value in evaluation.values.items()} | groups
