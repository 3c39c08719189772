"""The target of an evaluation: a split of a data set, its labels and its metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rsb_cluster.config.settings import data_root
from rsb_cluster.data.datasets import DataSet, Metric, known_data_sets
from rsb_cluster.data.index import INDEX_NAME, ShardIndex, check_class_names, load_index
from rsb_cluster.data.labels import LabelSets, labels_digest, load_label_sets
from rsb_cluster.data.scoring import TOP_K, check_metrics
from rsb_cluster.data.split_folder import read_source_record
from rsb_cluster.data.subset import choose_classes, choose_sets
from rsb_cluster.errors import ConfigError, DataError, did_you_mean
from rsb_cluster.evaluation.record import EvaluationRequest
from rsb_cluster.storage.store import Store


@dataclass(frozen=True, eq=False)
class Target:
    """A split of a data set, with the labels and metrics that score it.

    Attributes:
        store: The split's folder.
        name: Name of the data set.
        known: Its entry in datasets.toml.
        sets: The label sets; None for the index's classes.
        labels_digest: SHA-256 of the label sets (see `rsb_cluster.data.labels.labels_digest`).
        metrics: The metrics; the first is compared with published results.
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


def open_target(request: EvaluationRequest) -> Target:
    """Read the target of a request.

    Raises:
        ConfigError: The metric does not apply to the labels.
        DataError: There are no such shards or labels, or no image has a label.
    """
    store, part = _part(request.data, request.part)
    index = load_index(store)
    *_, parent, folder = store.url.rstrip("/").rsplit("/", 2)
    name = str(read_source_record(store).get("data_set") or (parent if folder == part else folder))
    known = known_data_sets().get(name)
    labels = request.labels or (known.default_labels if known else "")
    sets = load_label_sets(store, index, labels) if labels else None
    if sets is not None and not sets.scored.any() and not request.predictions:
        raise DataError(
            f"no image of {store.url} has a label in '{labels}': {known.note if known else 'nothing can be scored'}. "
            "Use --save-predictions to write the predictions to a file."
        )
    digest = labels_digest(store, labels) if labels else ""
    metrics = _metrics(request.metric, known, index.num_classes, sets)
    return Target(store, index, name, part, known, labels, sets, digest, metrics)


def choose_target_classes(target: Target, classes: Sequence[str], metric: Metric | Literal[""]) -> Target:
    """Return the part of a target that weights of some classes only can be evaluated on (``data.classes``).

    It has a name of its own: results on all classes are no reference for it.

    Args:
        target: The target.
        classes: The classes of the weights, in their order; empty for all of the data.
        metric: The metric that was asked for; may be empty.

    Raises:
        ConfigError: The data have no such class, or the metric does not apply to so few.
    """
    if not classes or tuple(classes) == target.index.classes:
        return target
    url = target.store.url
    index = choose_classes(target.index, classes, url)
    sets = target.sets and choose_sets(target.sets, target.index, classes, url)
    metrics = _metrics(metric, None, index.num_classes, sets)
    name = f"{target.name}-{len(classes)}-classes"
    return replace(target, index=index, name=name, known=None, sets=sets, metrics=metrics)


def _part(data: str, part: str) -> tuple[Store, str]:
    """Return the folder of a split, given the set's folder, the set's name, or the folder itself."""
    candidates = [Store(data).child(part), Store(data)]
    if "/" not in data:
        root = Store(data_root())
        candidates.insert(1, root.child(data, part))
    found = [store for store in candidates if store.exists(INDEX_NAME)]
    if not found:
        files = "\n".join(f"  {store.locate(INDEX_NAME)}" for store in candidates)
        raise DataError(
            f"there are no shards with an index. Looked for\n{files}\nGive their folder with --data, make them with "
            f"'rsb-cluster shards make', or index those that are there with 'rsb-cluster shards index'."
            f"{did_you_mean(data, known_data_sets())}"
        )
    url = found[0].url
    return found[0], part if url.endswith(f"/{part}") else url.rsplit("/", 1)[1]


def _metrics(
    asked: Metric | Literal[""], known: DataSet | None, num_classes: int, sets: LabelSets | None
) -> tuple[Metric, ...]:
    if sets is not None:
        if asked not in ("", "label_set_top1"):
            raise ConfigError(f"--metric {asked} needs one true class per image, and these labels are sets. Omit it.")
        return ("label_set_top1",)
    own: Iterable[Metric] = (known.metric, *known.also) if known and known.metric != "label_set_top1" else ()
    wide: Iterable[Metric] = ("top1", "top5") if num_classes > TOP_K else ("top1",)
    metrics: tuple[Metric, ...] = tuple(dict.fromkeys((*((asked,) if asked else ()), *own, *wide)))
    check_metrics(metrics, num_classes)
    return metrics


def check_classes(name: str, num_classes: int, classes: tuple[str, ...], target: Target) -> None:
    """Refuse weights whose classes differ from those of the data.

    Args:
        name: Name of the weights.
        num_classes: Number of outputs of their classifier.
        classes: Names of their classes; empty if unknown.
        target: The data.

    Raises:
        ConfigError: The numbers, or the names, differ.
    """
    index, url = target.index, target.store.url
    fits = num_classes == index.num_classes if index.classes else num_classes >= index.num_classes
    if not fits:
        raise ConfigError(
            f"{name} has {num_classes} classes, {url} has {index.num_classes}. Evaluate weights that were trained, or "
            "fine-tuned, on this data set."
        )
    check_class_names(name, classes, url, index.classes)
