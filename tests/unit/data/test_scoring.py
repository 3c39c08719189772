"""Metrics against cases done by hand and against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from rsb_cluster.data.labels import LabelSets
from rsb_cluster.data.scoring import METRICS, score_classes, score_sets
from rsb_cluster.errors import ConfigError

OF_CLASSES = tuple(m for m in METRICS if m not in ("label_set_top1", "recall", "precision"))


def best(*rows):
    return np.array(rows, dtype=np.int64)


def test_every_metric_on_a_case_done_by_hand():
    """Six images of three classes: class 0 right twice and once taken for 1; class 1 right once; class 2 never."""
    labels = np.array([0, 0, 0, 1, 2, 2])
    predicted = best([0], [0], [1], [1], [0], [1])
    found = score_classes(predicted, labels, tuple(m for m in OF_CLASSES if m != "top5"), 3).values
    by_hand = {
        "top1": 3 / 6,
        "mean_per_class": (2 / 3 + 1 + 0) / 3,
        "macro_f1": (4 / 6 + 2 / 4 + 0) / 3,  # 2 TP / (2 TP + FP + FN)
        "macro_precision": (2 / 3 + 1 / 3 + 0) / 3,
        "macro_specificity": (2 / 3 + 3 / 5 + 1) / 3,
    }
    assert found == pytest.approx({name: 100 * value for name, value in by_hand.items()})


def test_recall_and_precision_are_those_of_class_1_and_not_swapped():
    """Four of class 1, of which one is found; InDL's repository calls a wrong answer on class 0 a false negative."""
    labels = np.array([1, 1, 1, 1, 0, 0])
    predicted = best([1], [0], [0], [0], [1], [0])
    found = score_classes(predicted, labels, ("recall", "precision", "top1"), 2).values
    assert found == pytest.approx({"recall": 25.0, "precision": 50.0, "top1": 100 * 2 / 6})


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=60))
def test_metrics_are_scikit_learns(pairs):
    labels, predicted = (np.array(side) for side in zip(*pairs, strict=True))
    found = score_classes(predicted[:, None], labels, tuple(m for m in OF_CLASSES if m != "top5"), 6).values
    there = np.unique([labels, predicted])
    tables = sk.multilabel_confusion_matrix(labels, predicted, labels=there)
    expected = {
        "top1": sk.accuracy_score(labels, predicted),
        "mean_per_class": sk.recall_score(labels, predicted, average="macro", labels=np.unique(labels)),
        "macro_f1": sk.f1_score(labels, predicted, average="macro", zero_division=0),
        "macro_precision": sk.precision_score(labels, predicted, average="macro", zero_division=0),
        "macro_specificity": np.mean([tn / max(1, tn + fp) for (tn, fp), _ in tables]),
    }
    assert found == pytest.approx({name: 100 * value for name, value in expected.items()})


@given(st.integers(0, 2**32 - 1))
def test_top5_is_scikit_learns(seed):
    draw = np.random.default_rng(seed)
    logits, labels = draw.normal(size=(20, 9)), draw.integers(0, 9, 20)
    ordered = np.argsort(-logits, axis=1)[:, :5]
    expected = sk.top_k_accuracy_score(labels, logits, k=5, labels=range(9))
    assert score_classes(ordered, labels, ("top5",), 9).values["top5"] == pytest.approx(100 * expected)


def test_an_image_that_cannot_be_decoded_is_wrong_and_no_false_positive():
    labels, predicted = np.array([0, 0, 1]), best([-1], [0], [1])
    found = score_classes(predicted, labels, ("top1", "mean_per_class", "macro_precision"), 2).values
    assert found == pytest.approx({"top1": 200 / 3, "mean_per_class": 75.0, "macro_precision": 100.0})


def test_label_sets_skip_what_has_no_label_and_score_groups():
    sets = LabelSets(
        starts=np.array([0, 2, 2, 3, 4]),
        classes=np.array([3, 5, 7, 1]),
        groups={"Blur": np.array([True, True, False, True]), "none": np.array([False, True, False, False])},
    )
    found = score_sets(best([5, 1], [0, 2], [7, 3], [2, 1]), sets)
    assert found.scored == 3
    assert found.values == pytest.approx({"label_set_top1": 200 / 3})
    assert found.groups == {"Blur": (pytest.approx(50.0), 2)}
    nothing = LabelSets(starts=np.zeros(5, dtype=np.int64), classes=np.empty(0, dtype=np.int64))
    empty = score_sets(best([5], [0], [7], [2]), nothing)
    assert empty.scored == 0
    assert np.isnan(empty.values["label_set_top1"])


@pytest.mark.parametrize(
    ("metric", "classes", "message"),
    [
        ("label_set_top1", 10, "needs label sets: add --labels"),
        ("recall", 10, "'recall' is for two classes, and there are 10"),
        ("top5", 5, "'top5' says nothing about 5 classes"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(metric, classes, message):
    with pytest.raises(ConfigError, match=message):
        score_classes(best([0]), np.array([0]), (metric,), classes)
