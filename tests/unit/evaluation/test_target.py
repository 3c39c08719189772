"""What an evaluation is on: the part, its labels and metrics; what is not there is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsb_cluster.data.datasets import known_data_sets
from rsb_cluster.data.labels import LabelFile
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import DataSource
from rsb_cluster.data.sources.imagenet import imagenet_synsets
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.evaluation.record import EvaluationRequest
from rsb_cluster.evaluation.target import open_target
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store


def test_the_data_set_says_the_metrics(tmp_path: Path, validation_images: Path) -> None:
    metrics = {}
    for name, known in known_data_sets().items():
        folder = tmp_path / name
        entries = list(range(2 * known.classes if known.classes < 20 else 7))  # 6 is a class of ImageNet-A
        read = lambda i, k=known.classes: (f"{i}", b"x", "jpg", i % k)  # noqa: E731
        labels = {"vizwiz": LabelFile(about="", labels={str(i): (i,) for i in entries})} if "vizwiz" in name else {}
        names = imagenet_synsets() if known.classes == 1000 else tuple(f"c{i}" for i in range(known.classes))
        source = DataSource("", names, entries, read, labels=labels, data_set=name)
        make_set({"val": source}, Store(folder))
        metrics[name] = open_target(EvaluationRequest(sources=(), runs="", data=str(folder))).metrics
    assert metrics["imagenet-1k"] == metrics["imagenet-v2"] == metrics["stanford-cars"] == ("top1", "top5")
    assert metrics["flowers102"] == ("top1", "mean_per_class", "top5")
    assert metrics["nct-crc-he"] == ("top1", "macro_f1", "macro_precision", "macro_specificity", "top5")
    assert metrics["indl-zollner"] == ("recall", "precision", "top1")
    assert metrics["vizwiz-classification"] == metrics["imagenet-a"] == metrics["imagenet-r"] == ("label_set_top1",)
    assert metrics["imagenet-sketch"] == ("top1", "top5")
    chosen = EvaluationRequest(sources=(), runs="", data=str(tmp_path / "flowers102"), metric="mean_per_class")
    assert open_target(chosen).metrics[0] == "mean_per_class"
    for asked, message in (
        ({"data": tmp_path / "flowers102", "metric": "recall"}, "'recall' is for two classes"),
        ({"data": validation_images, "labels": "real", "metric": "top5"}, "--metric top5 needs one true class"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_target(EvaluationRequest(sources=(), runs="", **{key: str(value) for key, value in asked.items()}))


def test_what_is_not_there_is_named(tmp_path: Path, trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSB_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"no shards with an index(.|\n)*digts/val/index(.|\n)*Did you mean 'digits'"):
        open_target(EvaluationRequest(sources=(), runs="", data="digts"))
    with pytest.raises(DataError, match=r"there are no labels 'real'.*rsb-cluster shards labels real"):
        open_target(EvaluationRequest(sources=(), runs="", data=trained.spec().data, labels="real"))
    whole, part = (
        open_target(EvaluationRequest(sources=(), runs="", data=trained.spec().data + end)) for end in ("", "/train")
    )
    assert (whole.part, part.part, whole.name, part.name) == ("val", "train", "digits", "digits")
    assert whole.index.num_samples == 32
