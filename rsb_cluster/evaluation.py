"""Evaluations: what is asked for, what predictions are compared with, and the record of what came out.

A record lies beside the runs, in ``<runs>/evaluations/<run id, or the weights' name and digest>/<name>.json``, so that
one listing finds those of all runs, and weights that are no run's have theirs too. Its name stands for all that can
change the result: the weights, the data, the labels, the metric and how images are prepared.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field

from rsb_cluster.data.datasets import DataSet, Metric, known_data_sets
from rsb_cluster.data.index import INDEX_NAME, ShardIndex, load_index
from rsb_cluster.data.labels import LabelSets, label_file_name, load_label_sets
from rsb_cluster.data.make import source_of
from rsb_cluster.data.scoring import BEST, check_metrics
from rsb_cluster.errors import ConfigError, DataError, StorageError, did_you_mean
from rsb_cluster.recipe import Section, validate
from rsb_cluster.run import EVALUATIONS
from rsb_cluster.storage import Store

Amp = Literal["off", "fp16", "bf16"]


class Request(Section):
    """What the user asked for. What is empty or zero is decided by the weights: as their run, or timm, evaluates them.

    Attributes:
        sources: Which weights (see `rsb_cluster.train.weights`).
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


class Group(Section):
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
    groups: dict[str, Group] = Field({})
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
            before = validate(Evaluation, store.read_json(file), store.locate(file))
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
            found.append(validate(Evaluation, json.loads(content), store.locate(file)))
        except (StorageError, ConfigError, ValueError) as error:
            problems.append(f"{store.locate(file)} cannot be read: {error}")
    return found, problems


# --- what predictions are compared with ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Target:
    """A part of a data set, and the labels and metrics by which it is scored.

    Attributes:
        store: The part's folder.
        name: Name of the data set.
        known: What datasets.toml says of it.
        sets: The label sets; None for the index's classes.
        labels_digest: SHA-256 of the file of label sets.
        metrics: The first is compared with published results.
    """

    store: Store
    index: ShardIndex
    name: str
    part: str
    known: DataSet | None
    labels: str
    sets: LabelSets | None
    labels_digest: str
    metrics: tuple[Metric, ...]


def open_target(request: Request) -> Target:
    """Find and read what predictions are to be compared with.

    Raises:
        ConfigError: The labels and the metric do not fit.
        DataError: There are no such shards or labels, or no image has a label.
    """
    store, part = _part(request.data, request.part)
    index = load_index(store)
    last = store.url.rstrip("/").rsplit("/", 2)
    name = str(source_of(store).get("data_set") or (last[1] if last[2] == part else last[2]))
    known = known_data_sets().get(name)
    labels = request.labels or (known.default_labels if known else "")
    sets = load_label_sets(store, index, labels) if labels else None
    if sets is not None and not sets.scored.any() and not request.predictions:
        raise DataError(
            f"no image of {store.url} has a label in '{labels}': {known.note if known else 'nothing can be scored'}. "
            "With --save-predictions the predictions are written to a file."
        )
    digest = hashlib.sha256(store.read_bytes(label_file_name(labels))).hexdigest() if labels else ""
    metrics = _metrics(request.metric, known, index.num_classes, sets)
    return Target(store, index, name, part, known, labels, sets, digest, metrics)


def _part(data: str, part: str) -> tuple[Store, str]:
    """Return the folder of a part: of a set's folder, of a set by its name, or as it is named itself."""
    candidates = [Store(data).child(part), Store(data)]
    if "/" not in data:
        root = Store(os.environ.get("RSB_DATA") or str(Path.cwd() / "data"))
        candidates.insert(1, root.child(data, part))
    found = [store for store in candidates if store.exists(INDEX_NAME)]
    if not found:
        looked = "\n".join(f"  {store.locate(INDEX_NAME)}" for store in candidates)
        raise DataError(
            f"there are no shards with an index. Looked for\n{looked}\nSay where they are with --data, or make them "
            f"with 'rsb-cluster shards make'.{did_you_mean(data, known_data_sets())}"
        )
    url = found[0].url
    return found[0], part if url.endswith(f"/{part}") else url.rsplit("/", 1)[1]


def _metrics(
    asked: Metric | Literal[""], known: DataSet | None, num_classes: int, sets: LabelSets | None
) -> tuple[Metric, ...]:
    if sets is not None:
        if asked not in ("", "label_set_top1"):
            raise ConfigError(f"--metric {asked} is for one right class an image; these labels are sets: leave it out.")
        return ("label_set_top1",)
    own: Iterable[Metric] = (known.metric, *known.also) if known and known.metric != "label_set_top1" else ()
    wide: Iterable[Metric] = ("top1", "top5") if num_classes > BEST else ("top1",)
    metrics: tuple[Metric, ...] = tuple(dict.fromkeys((*((asked,) if asked else ()), *own, *wide)))
    check_metrics(metrics, num_classes)
    return metrics


def check_classes(name: str, num_classes: int, classes: tuple[str, ...], target: Target) -> None:
    """Refuse weights whose classes are not those of the data.

    Args:
        name: Of the weights.
        num_classes: Outputs of their classifier.
        classes: Names of their classes; empty where they are not known.
        target: The data.

    Raises:
        ConfigError: The numbers, or the names, differ.
    """
    index, url = target.index, target.store.url
    fits = num_classes == index.num_classes if index.classes else num_classes >= index.num_classes
    if not fits:
        raise ConfigError(
            f"{name} tells {num_classes} classes apart, {url} has {index.num_classes}. Evaluate weights that were "
            "trained, or fine-tuned, on this data set."
        )
    pairs = zip(classes, index.classes, strict=False)
    unlike = next(((i, ours, theirs) for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if unlike is not None:
        number, ours, theirs = unlike
        raise ConfigError(
            f"class {number} is '{ours}' for {name} and '{theirs}' in {url}: their predictions would mean other "
            "things. Make the shards anew with the classes in the order of the training data."
        )


def plain_values(evaluation: Evaluation) -> Mapping[str, float]:
    """Return all values of an evaluation by what they are, groups included: ``label_set_top1 Blur``."""
    groups = {f"{evaluation.metric} {name}": group.value for name, group in evaluation.groups.items()}
    return {str(metric): value for metric, value in evaluation.values.items()} | groups
