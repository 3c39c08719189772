"""Evaluations: what is asked for, and the record of what came out.

A record lies beside the runs, in ``<runs>/evaluations/<run id, or the weights' name and digest>/<name>.json``, so that
one listing finds those of all runs, and weights that are no run's have theirs too. Its name stands for all that can
change the result: the weights, the data, the labels, the metric and how images are prepared.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Literal

from pydantic import ConfigDict, Field

from rsb_cluster.config.schema import Section, read_record
from rsb_cluster.data.datasets import Metric
from rsb_cluster.errors import RsbError, StorageError
from rsb_cluster.runs.run import EVALUATIONS
from rsb_cluster.storage.store import Store

Amp = Literal["off", "fp16", "bf16"]


class EvaluationRequest(Section):
    """What the user asked for. What is empty or zero is decided by the weights: as their run, or timm, evaluates them.

    Attributes:
        sources: Which weights (see `rsb_cluster.train.conversion.state_dict`).
        runs: Folder of runs: where ids are looked up, and where the records go.
        data: Folder of a set or of a part, or a set's name below ``$RSB_DATA`` or ``./data``.
        labels: Name of label sets; empty for the data set's default.
        metric: Compared with published results; empty for the data set's own.
        model: Architecture of a weight file.
        exact: Decode and resize with PIL; None: as the weights' run does.
        ema: Take the moving average of a run's weights.
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
    exact: bool | None = None
    amp: Amp | Literal[""] = ""
    ema: bool = False
    batch_size: int = 128
    workers: int = 0
    predictions: str = ""


class ImageGroup(Section):
    """A named part of the images: its value of the evaluation's metric, and how many images count."""

    value: float
    scored: int


class Evaluation(Section):
    """The record of weights on a part of a data set; percent.

    Attributes:
        weights: Name of the weights.
        weights_digest: SHA-256 that stands for them.
        run_id: The run; empty for other weights.
        step: Optimizer steps of the run.
        procedure: The published procedure that made the weights; empty where that is not known.
        data_set: Name of the set, as in datasets.toml where it is known by name.
        labels: Name of the label sets; empty for the index's classes.
        metric: Which of ``values`` is compared with published results.
        loss: Mean cross-entropy, nats; None with label sets.
        samples: Images of the part.
        scored: Images that count; the others have no label.
        bad: Images that could not be decoded: wrong for every metric.
        finished: Unix time.
    """

    # A later version may say more; what it says here must still be readable.
    model_config = ConfigDict(frozen=True, extra="ignore")

    weights: str
    weights_digest: str
    weights_url: str = ""
    model: str
    procedure: str = ""
    run_id: str = ""
    step: int = 0
    ema: bool = False
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
        """The folder of all evaluations of the same weights: the run's id, or a name made of name and digest."""
        return self.run_id or f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.weights)}-{self.weights_digest[:8]}"

    @property
    def name(self) -> str:
        """Stands for all that can change the result."""
        fields = (
            *("weights_digest", "data_digest", "part", "labels", "labels_digest", "metric"),
            *("resolution", "crop", "interpolation", "exact", "amp"),
        )
        text = json.dumps([getattr(self, field) for field in fields])
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        words = (self.data_set, self.part, self.labels, f"{self.resolution}px", digest)
        return "-".join(word for word in words if word)

    def save(self, runs_url: str) -> str:
        """Write the record; return what is to be said of one that was there with another result, or nothing."""
        store, file = Store(runs_url), f"{EVALUATIONS}/{self.owner}/{self.name}.json"
        said = ""
        if store.exists(file):
            before = read_record(Evaluation, store.read_json(file), store.locate(file))
            if before.values != self.values:
                store.write_json(file.replace(".json", f"-{before.finished:.0f}.json"), before.model_dump(mode="json"))
                said = f"{store.locate(file)}: {before.value} before, {self.value} now; the record of before is kept"
        store.write_json(file, self.model_dump(mode="json"))
        return said


def read_evaluations(runs_url: str) -> tuple[list[Evaluation], list[str]]:
    """Return all evaluations beside a folder of runs, and what is to be said of those that cannot be read."""
    store = Store(runs_url)
    files = [name for name in store.files(EVALUATIONS) if name.endswith(".json")]
    found, problems = [], []
    for file, content in zip(files, store.read_many(files), strict=True):
        try:
            if isinstance(content, StorageError):
                raise content
            found.append(read_record(Evaluation, content, store.locate(file)))
        except (RsbError, ValueError) as error:
            problems.append(f"{store.locate(file)} cannot be read: {error}")
    return found, problems


def plain_values(evaluation: Evaluation) -> Mapping[str, float]:
    """Return all values of an evaluation by what they are, groups included: ``label_set_top1 Blur``."""
    groups = {f"{evaluation.metric} {name}": group.value for name, group in evaluation.groups.items()}
    return {str(metric): value for metric, value in evaluation.values.items()} | groups
