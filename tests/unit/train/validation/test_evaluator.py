"""evaluate: any weights on any shards, each image once, by the right labels; and what does not fit is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from rsb_cluster.data.datasets import known_data_sets
from rsb_cluster.data.index import load_index
from rsb_cluster.data.labels import LabelFile, real_labels, write_labels
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import Source
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.evaluation.record import Evaluation, Request, read_evaluations
from rsb_cluster.evaluation.target import open_target
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.distributed import Group
from rsb_cluster.train.validation.evaluator import evaluate_sources
from tests.faults.lab import few_digits
from tests.unit.formats import picture


def evaluate(folder: Path, *sources: str | Path, data: str | Path, **asked: Any) -> list[Evaluation]:
    """Evaluate in this process."""
    torch.set_num_threads(1)
    request = Request(sources=tuple(map(str, sources)), runs=str(folder), data=str(data), **asked)
    group = Group(Ranks(0, 0, 1, "test", 0, 1), Store(folder), wait_s=10, collective_s=10)
    try:
        return list(evaluate_sources(request, group))
    finally:
        group.close()


def rows_in(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def data_of(run: Run) -> str:
    return run.spec().data


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Files of weights by their number of classes."""
    folder = tmp_path_factory.mktemp("weights")
    files = {classes: folder / f"of-{classes}.safetensors" for classes in (7, 10, 1000)}
    for classes, file in files.items():
        torch.manual_seed(classes)
        safetensors.torch.save_file(timm.create_model("test_resnet", num_classes=classes).state_dict(), file)
    return files


@pytest.fixture(scope="module")
def validation_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards like those of ImageNet's val: a thousand classes, twelve images of which the first has no ReaL label."""
    folder = tmp_path_factory.mktemp("val")
    keys = [f"n01/ILSVRC2012_val_{number:08d}" for number in range(1, 13)]
    names = tuple(f"n{i:08d}" for i in range(1000))
    read = lambda key: (key, picture(int(key[-2:]), px=40), "jpg", int(key[-2:]))  # noqa: E731
    source = Source("val", names, keys, read, labels={"real": real_labels(keys)}, data_set="imagenet-1k")
    make_set({"val": source}, Store(folder), shard_samples=5)
    return folder


def test_a_run_has_the_numbers_of_its_own_evaluation(tmp_path: Path, trained: Run) -> None:
    result = trained.store.read_json("result.json")
    (found,) = evaluate(tmp_path, trained.url, data=data_of(trained))
    (average,) = evaluate(tmp_path, trained.url, data=data_of(trained), ema=True)
    assert (found.values["top1"], found.values["top5"]) == (result["top1"], result["top5"])
    assert found.loss == pytest.approx(result["loss"], rel=1e-6)
    assert (average.values["top1"], average.loss) == (result["ema"]["top1"], pytest.approx(result["ema"]["loss"]))
    assert (found.run_id, found.step, found.metric, found.samples) == (trained.run_id, 18, "top1", 32)
    kept, problems = read_evaluations(trained.runs_url)
    assert problems == []
    assert {one.weights_digest for one in kept if one.run_id == trained.run_id} >= {
        found.weights_digest, average.weights_digest,
    }  # fmt: skip


def test_weights_of_no_run_have_a_folder_of_their_own(
    tmp_path: Path, trained: Run, random_weights: dict[int, Path]
) -> None:
    evaluate(tmp_path, random_weights[10], data=data_of(trained), model="test_resnet", resolution=24)
    ((found,), _) = read_evaluations(str(tmp_path))
    assert (found.run_id, found.resolution) == ("", 24)
    assert found.owner.startswith("of-10.safetensors-")


def test_real_labels_are_sets_and_images_without_are_skipped(
    tmp_path: Path, validation_images: Path, random_weights: dict[int, Path]
) -> None:
    file = tmp_path / "predictions.csv"
    asked: dict[str, Any] = {"data": validation_images, "model": "test_resnet", "resolution": 32}
    (found,) = evaluate(tmp_path, random_weights[1000], labels="real", predictions=str(file), **asked)
    (plain,) = evaluate(tmp_path, random_weights[1000], **asked)
    rows = rows_in(file)
    right = [row for row in rows if row["predictions"].split()[0] in row["labels"].split()]
    labelled = [row for row in rows if row["labels"]]
    assert (found.metric, found.scored, found.samples) == ("label_set_top1", len(labelled), 12)
    assert 0 < len(labelled) < 12
    assert found.values == {"label_set_top1": pytest.approx(100 * len(right) / len(labelled))}
    assert (plain.metric, plain.labels, set(plain.values)) == ("top1", "", {"top1", "top5"})
    assert plain.name != found.name


def test_predictions_are_among_the_classes_that_an_answer_may_be(tmp_path: Path, trained: Run) -> None:
    """As VizWiz has it: logits of some classes only, groups by flaw, images whose labels are not known."""
    val = Store(tmp_path / "val")
    make_set({"val": few_digits()["val"]}, Store(tmp_path))
    index = load_index(val)
    keys = [index.key(i) for i in range(index.num_samples)]
    labels = {key: ((1, 3) if i % 4 else ()) for i, key in enumerate(keys)}
    groups = {"Blur": tuple(keys[:8]), "Clean": tuple(keys[8:])}
    write_labels(val, "vizwiz", LabelFile(about="", among=(1, 3, 8), labels=labels, groups=groups))
    file = tmp_path / "p.csv"
    (found,) = evaluate(tmp_path, trained.url, data=tmp_path, labels="vizwiz", predictions=str(file))
    firsts = {row["key"]: row["predictions"].split() for row in rows_in(file)}
    assert all(sorted(best) == ["1", "3", "8"] for best in firsts.values())
    right = {key: best[0] in ("1", "3") for key, best in firsts.items() if labels[key]}
    assert found.values["label_set_top1"] == pytest.approx(100 * sum(right.values()) / 24)
    blur = [right[key] for key in keys[:8] if key in right]
    assert found.groups["Blur"].scored == len(blur) == 6
    assert found.groups["Blur"].value == pytest.approx(100 * sum(blur) / 6)
    empty = LabelFile(about="", among=(1, 3, 8), labels=dict.fromkeys(keys, ()))
    write_labels(val, "vizwiz", empty)
    with pytest.raises(DataError, match=r"no image of .* has a label in 'vizwiz'.*--save-predictions"):
        evaluate(tmp_path, trained.url, data=tmp_path, labels="vizwiz")
    (unknown,) = evaluate(tmp_path, trained.url, data=tmp_path, labels="vizwiz", predictions=str(file))
    assert (unknown.values, unknown.value, unknown.scored) == ({}, None, 0)


def test_the_data_set_says_the_metrics(tmp_path: Path, validation_images: Path) -> None:
    metrics = {}
    for name, known in known_data_sets().items():
        folder = tmp_path / name
        entries = list(range(2 * known.classes if known.classes < 20 else 3))
        read = lambda i, k=known.classes: (f"{i}", b"x", "jpg", i % k)  # noqa: E731
        labels = {"vizwiz": LabelFile(about="", labels={str(i): (i,) for i in entries})} if "vizwiz" in name else {}
        names = tuple(f"c{i}" for i in range(known.classes))
        source = Source("", names, entries, read, labels=labels, data_set=name)
        make_set({"val": source}, Store(folder))
        metrics[name] = open_target(Request(sources=(), runs="", data=str(folder))).metrics
    assert metrics["imagenet-1k"] == metrics["imagenet-v2"] == metrics["stanford-cars"] == ("top1", "top5")
    assert metrics["flowers102"] == ("top1", "mean_per_class", "top5")
    assert metrics["nct-crc-he"] == ("top1", "macro_f1", "macro_precision", "macro_specificity", "top5")
    assert metrics["indl-zollner"] == ("recall", "precision", "top1")
    assert metrics["vizwiz-classification"] == ("label_set_top1",)
    chosen = Request(sources=(), runs="", data=str(tmp_path / "flowers102"), metric="mean_per_class")
    assert open_target(chosen).metrics[0] == "mean_per_class"
    for asked, message in (
        ({"data": tmp_path / "flowers102", "metric": "recall"}, "'recall' is for two classes"),
        ({"data": validation_images, "labels": "real", "metric": "top5"}, "--metric top5 is for one right class"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_target(Request(sources=(), runs="", **{key: str(value) for key, value in asked.items()}))


def test_classes_that_are_not_those_of_the_data_are_refused(
    tmp_path: Path, trained: Run, random_weights: dict[int, Path]
) -> None:
    with pytest.raises(ConfigError, match=r"of-7.safetensors tells 7 classes apart, .* has 10"):
        evaluate(tmp_path, random_weights[7], data=data_of(trained), model="test_resnet")
    swapped = dataclasses.replace(few_digits()["val"], classes=("1", "0", *map(str, range(2, 10))))
    make_set({"val": swapped}, Store(tmp_path / "swapped"))
    with pytest.raises(ConfigError, match=r"class 0 is '0' for digits-test_resnet-.* and '1' in .*swapped"):
        evaluate(tmp_path, trained.url, data=tmp_path / "swapped")


def test_what_is_not_there_is_named(tmp_path: Path, trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSB_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"no shards with an index(.|\n)*digts/val/index(.|\n)*Did you mean 'digits'"):
        open_target(Request(sources=(), runs="", data="digts"))
    with pytest.raises(DataError, match=r"there are no labels 'real'.*rsb-cluster shards labels real"):
        open_target(Request(sources=(), runs="", data=data_of(trained), labels="real"))
    whole, part = (open_target(Request(sources=(), runs="", data=data_of(trained) + end)) for end in ("", "/train"))
    assert (whole.part, part.part, whole.name, part.name) == ("val", "train", "digits", "digits")
    assert whole.index.num_samples == 32


def test_an_image_that_cannot_be_decoded_is_wrong_and_counted(tmp_path: Path, random_weights: dict[int, Path]) -> None:
    images = {str(i): picture(i, px=40) for i in range(9)} | {"9": b"no image"}
    source = Source("", tuple("0123456789"), list(images), lambda key: (key, images[key], "jpg", 4))
    make_set({"val": source}, Store(tmp_path))
    file = tmp_path / "p.csv"
    asked: dict[str, Any] = {"model": "test_resnet", "resolution": 32, "predictions": str(file)}
    (found,) = evaluate(tmp_path, random_weights[10], data=tmp_path, **asked)
    rows = {row["key"]: row["predictions"].split() for row in rows_in(file)}
    assert (found.bad, found.samples, rows["9"]) == (1, 10, [])
    assert found.values["top1"] == 10 * sum(best[:1] == ["4"] for best in rows.values())


FORKED = """
import json, os, sys, tempfile
import torch
from rsb_cluster.evaluation.record import Request
from rsb_cluster.storage.store import Store
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.train.distributed import Group
from rsb_cluster.train.validation.evaluator import evaluate_sources
for world in (1, 2, 4):
    folder = tempfile.mkdtemp()
    request = Request(**json.loads(sys.argv[1]) | {"predictions": f"{sys.argv[2]}/{world}.csv"})
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            group = Group(Ranks(rank, rank, world, "test", 0, world), Store(folder), wait_s=60, collective_s=60)
            (found,) = evaluate_sources(request, group)
            if rank == 0:
                print(found.model_dump_json(), flush=True)
            group.leave_together()
            group.close()
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world
"""


def test_counts_and_predictions_are_those_of_one_process(tmp_path: Path, trained: Run) -> None:
    """Processes are forked, so that torch is imported once; 32 images, in batches of five, on 1, 2 and 4 of them."""
    request = {"sources": [trained.url], "runs": str(tmp_path), "data": data_of(trained), "batch_size": 5}
    done = subprocess.run(
        [sys.executable, "-c", FORKED, json.dumps(request), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    found = [Evaluation.model_validate_json(line) for line in done.stdout.splitlines()]
    assert [one.processes for one in found] == [1, 2, 4]
    assert all((one.values, one.scored) == (found[0].values, 32) for one in found)
    texts = {(tmp_path / f"{world}.csv").read_text() for world in (1, 2, 4)}
    assert len(texts) == 1
