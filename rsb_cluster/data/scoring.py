"""Metrics: functions of predicted and true classes, in percent.

Notation: N scored images, K classes. An image that could not be decoded has the prediction -1, which is wrong for every
metric. A mean over classes is over those that have an image, for F1 and precision also over those that were predicted,
as in scikit-learn; 0/0 counts as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from rsb_cluster.data.datasets import Metric
from rsb_cluster.data.labels import LabelSets
from rsb_cluster.errors import ConfigError

METRICS: tuple[Metric, ...] = get_args(Metric)
UNDECODABLE = -1
TOP_K = 5  # number of predictions kept of each image

Classes = NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """The values of some metrics.

    Attributes:
        values: Percent, by metric.
        scored: Number of images with a label; the others are not scored.
        groups: The first metric, percent, and the number of images, for each named group of images.
    """

    values: Mapping[Metric, float]
    scored: int
    groups: Mapping[str, tuple[float, int]] = field(default_factory=dict)


def score_classes(best: Classes, labels: Classes, metrics: tuple[Metric, ...], num_classes: int) -> Scores:
    """Score predictions for images with one true class each.

    Args:
        best: The classes with the largest logits, best first, shape (N, up to 5); -1 for none.
        labels: The true classes, shape (N,).
        metrics: The metrics to compute.
        num_classes: K.

    Raises:
        ConfigError: A metric does not apply to such labels.
    """
    check_metrics(metrics, num_classes)
    return Scores({metric: 100 * _FUNCTIONS[metric](best, labels, num_classes) for metric in metrics}, len(labels))


def check_metrics(metrics: tuple[Metric, ...], num_classes: int) -> None:
    """Raise ConfigError for metrics that do not apply to one true class per image, or to so many classes."""
    if "label_set_top1" in metrics:
        raise ConfigError(
            "metric 'label_set_top1' needs label sets: add --labels with their name, or choose another --metric."
        )
    if num_classes != 2 and (binary := {"recall", "precision"} & set(metrics)):
        raise ConfigError(
            f"metric '{min(binary)}' is for two classes, and there are {num_classes}. "
            "Use mean_per_class or macro_precision."
        )
    if "top5" in metrics and num_classes <= TOP_K:
        raise ConfigError(f"metric 'top5' says nothing about {num_classes} classes. Use another --metric.")


def score_sets(best: Classes, sets: LabelSets) -> Scores:
    """Score predictions for images with a set of correct classes each; images with an empty set are skipped.

    A group without a scored image is left out.

    Args:
        best: As in `score_classes`.
        sets: The label sets of the same images.
    """
    right = np.array([first in sets.of(i) for i, first in enumerate(best[:, 0].tolist())], dtype=bool)
    groups = {name: sets.scored & members for name, members in sets.groups.items()}
    return Scores(
        {"label_set_top1": 100 * _share(right[sets.scored])},
        int(sets.scored.sum()),
        {name: (100 * _share(right[chosen]), int(chosen.sum())) for name, chosen in groups.items() if chosen.any()},
    )


def _share(right: NDArray[np.bool_]) -> float:
    return float(right.mean()) if right.size else float("nan")


def _top1(best: Classes, labels: Classes, _: int) -> float:
    return _share(best[:, 0] == labels)


def _top5(best: Classes, labels: Classes, _: int) -> float:
    return _share((best == labels[:, None]).any(axis=1))


@dataclass(frozen=True)
class _Counts:
    """For each class: true and false positives, false and true negatives; shape (K,)."""

    tp: Classes
    fp: Classes
    fn: Classes
    tn: Classes

    @staticmethod
    def count(best: Classes, labels: Classes, num_classes: int) -> _Counts:
        predicted = best[:, 0]
        tp = np.bincount(labels[predicted == labels], minlength=num_classes)
        images = np.bincount(labels, minlength=num_classes)
        positives = np.bincount(predicted[predicted != UNDECODABLE], minlength=num_classes)
        return _Counts(tp, positives - tp, images - tp, len(labels) - images - (positives - tp))


def _macro(rate: Callable[[_Counts], tuple[Classes, Classes]], *, also_predicted: bool = True) -> Callable[..., float]:
    """Return the mean over classes of numerator / denominator."""

    def mean(best: Classes, labels: Classes, num_classes: int) -> float:
        counts = _Counts.count(best, labels, num_classes)
        numerator, denominator = rate(counts)
        rates = np.divide(numerator, denominator, out=np.zeros(num_classes), where=denominator > 0)
        included = counts.tp + counts.fn + (counts.fp if also_predicted else 0) > 0
        return float(rates[included].mean()) if included.any() else float("nan")

    return mean


def _of_class_1(rate: Callable[[_Counts], tuple[Classes, Classes]]) -> Callable[..., float]:
    def metric(best: Classes, labels: Classes, num_classes: int) -> float:
        numerator, denominator = (counts[1] for counts in rate(_Counts.count(best, labels, num_classes)))
        return float(numerator / denominator) if denominator else 0.0

    return metric


def _recall(c: _Counts) -> tuple[Classes, Classes]:
    return c.tp, c.tp + c.fn


def _precision(c: _Counts) -> tuple[Classes, Classes]:
    return c.tp, c.tp + c.fp


_FUNCTIONS: Mapping[Metric, Callable[[Classes, Classes, int], float]] = {
    "top1": _top1,
    "top5": _top5,
    "mean_per_class": _macro(_recall, also_predicted=False),
    "macro_f1": _macro(lambda c: (2 * c.tp, 2 * c.tp + c.fp + c.fn)),
    "macro_precision": _macro(_precision),
    "macro_specificity": _macro(lambda c: (c.tn, c.tn + c.fp)),
    "recall": _of_class_1(_recall),
    "precision": _of_class_1(_precision),
}
