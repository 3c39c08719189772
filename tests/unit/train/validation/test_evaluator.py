"""evaluate: any weights on any shards, each image once, by the right labels, as timm does; and what does not fit is
refused.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_dataset, create_loader, resolve_data_config

from rsb_cluster.data.datasets import known_data_sets
from rsb_cluster.data.index import load_index
from rsb_cluster.data.labels import LabelFile, write_labels
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import DataSource, open_set
from rsb_cluster.data.sources.imagenet import imagenet_synsets
from rsb_cluster.data.subset import choose_classes
from rsb_cluster.errors import ConfigError, DataError, RsbError
from rsb_cluster.evaluation.record import Evaluation, read_evaluations
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.conversion.hub import fetch
from rsb_cluster.train.conversion.state_dict import read_weights
from rsb_cluster.weights.resolve import find_weights
from tests.equality import assert_bit_equal, final_state
from tests.faults.lab import Lab, few_digits
from tests.unit.evaluating import evaluate
from tests.unit.formats import picture


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


def test_a_run_of_some_classes_is_evaluated_on_them(tmp_path: Path, trained: Run) -> None:
    data = Store(data_of(trained))
    parts = {name: choose_classes(load_index(data.child(name)), ("7", "0", "1"), name) for name in ("train", "val")}
    sizes = [f"data.{name}_samples={index.num_samples}" for name, index in parts.items()]
    lab = Lab(
        tmp_path / "runs" / "some", data.url, "data.classes=7,0,1", "data.num_classes=3", *sizes, "train.global_batch=8"
    )
    assert lab.attempt().cause == "finished"
    result = lab.store.read_json("result.json")
    (found,) = evaluate(tmp_path, lab.run.url, data=data.url)
    assert (found.samples, found.values["top1"]) == (parts["val"].num_samples, result["top1"])
    assert (found.data_set, found.data_digest) == ("digits-3-classes", parts["val"].digest)
    exported = read_weights(find_weights(lab.run.url, str(tmp_path), ema=False, fetch=fetch), "", None)
    assert (exported.num_classes, exported.classes) == (3, ("7", "0", "1"))


def test_all_classes_by_name_are_the_run_without_names(tmp_path: Path, trained: Run) -> None:
    lab = Lab(tmp_path / "all", data_of(trained), "train.ema_decay=0.9", f"data.classes={','.join('0123456789')}")
    assert lab.attempt().cause == "finished"
    assert lab.run.spec().train_digest == trained.spec().train_digest
    assert_bit_equal(final_state(lab.run), final_state(trained))


def test_weights_of_no_run_have_a_folder_of_their_own(
    tmp_path: Path, trained: Run, random_weights: dict[int, Path]
) -> None:
    evaluate(tmp_path, random_weights[10], data=data_of(trained), model="test_resnet", resolution=24)
    ((found,), _) = read_evaluations(str(tmp_path))
    assert (found.run_id, found.resolution) == ("", 24)
    assert found.owner.startswith("of-10.safetensors-")


IMAGENET, DIGITS = (0.485, 0.456, 0.406), (0.305, 0.305, 0.305)  # means


def test_mean_and_std_are_what_is_said_first(
    tmp_path: Path, trained: Run, random_weights: dict[int, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The option, the run's recipe, config.json, the data set's entry; else ImageNet's, with a warning."""
    make_set({"val": dataclasses.replace(few_digits()["val"], data_set="")}, Store(tmp_path / "data"))
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(random_weights[10], folder / "model.safetensors")
    said = {"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (folder / "config.json").write_text(json.dumps(said))
    asked: dict[str, Any] = {"model": "test_resnet", "resolution": 24}

    def found(source: Path | str, data: Path | str = tmp_path / "data", **more: Any) -> Evaluation:
        caplog.clear()
        return evaluate(tmp_path, source, data=data, **asked, **more)[0]

    run = found(trained.url)
    assert (run.mean, run.normalization) == (DIGITS, "mean: the run's recipe, std: the run's recipe")
    assert caplog.messages == [] and run.overrides == {}
    assert found(trained.url, mean=IMAGENET).loss != run.loss

    torch.manual_seed(0)
    plain_weights = tmp_path / "plain.pth"
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), plain_weights)
    asked["model"] = "resnet10t"
    plain = found(plain_weights)
    assert (plain.mean, plain.normalization) == (IMAGENET, "mean: ImageNet's, std: ImageNet's")
    assert len(caplog.messages) == 1 and "use --mean R,G,B and --std R,G,B" in caplog.text
    changed = found(plain_weights, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert (changed.mean, changed.std, caplog.messages) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), [])
    assert changed.name != plain.name and changed.loss != plain.loss
    same = found(plain_weights, mean=plain.mean, std=plain.std)
    assert same.name == plain.name and "--mean" in same.normalization
    found(plain_weights, mean=plain.mean)
    assert "use --std R,G,B" in caplog.text and "--mean" not in caplog.text
    of_set = found(plain_weights, data_of(trained))
    assert (of_set.mean, of_set.normalization.split(", ")[0], caplog.messages) == (
        DIGITS,
        "mean: the data set digits",
        [],
    )
    assert of_set.overrides["mean"] == DIGITS

    asked["model"] = "test_resnet"  # timm's default is another than ImageNet's
    assert found(random_weights[10]).mean == (0.5, 0.5, 0.5)
    assert "timm's default for test_resnet" in caplog.text and "use --mean R,G,B" in caplog.text
    of_folder = found(folder, data_of(trained))
    assert of_folder.mean == (0.1, 0.2, 0.3) and "mean: the settings of" in of_folder.normalization
    assert of_folder.std == (0.376, 0.376, 0.376) and list(of_folder.overrides) == ["std"]


def test_which_weights_of_a_file_were_taken_is_said(
    tmp_path: Path, trained: Run, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    state, average = (timm.create_model("test_resnet", num_classes=10).state_dict() for _ in range(2))
    torch.save({"model": state, "model_ema": average}, tmp_path / "both.pth")
    asked: dict[str, Any] = {"data": data_of(trained), "model": "test_resnet", "resolution": 24}
    (default,) = evaluate(tmp_path, tmp_path / "both.pth", **asked)
    assert "both.pth holds model_ema and model: model_ema is evaluated. --ema and --no-ema choose." in caplog.messages
    (chosen,) = evaluate(tmp_path, tmp_path / "both.pth", ema=True, **asked)
    (plain,) = evaluate(tmp_path, tmp_path / "both.pth", ema=False, **asked)
    assert [(one.entry, one.ema) for one in (default, chosen, plain)] == [
        ("model_ema", True), ("model_ema", True), ("model", False),
    ]  # fmt: skip
    assert default.name == chosen.name != plain.name and default.loss == chosen.loss != plain.loss


def test_outputs_that_are_not_finite_are_an_error(tmp_path: Path, trained: Run) -> None:
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    safetensors.torch.save_file(state | {"fc.bias": torch.full((10,), float("inf"))}, tmp_path / "inf.safetensors")
    with pytest.raises(RsbError, match=r"the outputs of inf.safetensors are not finite"):
        evaluate(tmp_path, tmp_path / "inf.safetensors", data=data_of(trained), model="test_resnet", resolution=24)


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


def test_classes_that_are_not_those_of_the_data_are_refused(
    tmp_path: Path, trained: Run, random_weights: dict[int, Path]
) -> None:
    with pytest.raises(ConfigError, match=r"of-7.safetensors has 7 classes, .* has 10"):
        evaluate(tmp_path, random_weights[7], data=data_of(trained), model="test_resnet")
    swapped = dataclasses.replace(few_digits()["val"], classes=("1", "0", *map(str, range(2, 10))))
    make_set({"val": swapped}, Store(tmp_path / "swapped"))
    with pytest.raises(ConfigError, match=r"class 0 is '0' for digits-test_resnet-.* and '1' in .*swapped"):
        evaluate(tmp_path, trained.url, data=tmp_path / "swapped")


def test_an_image_that_cannot_be_decoded_is_wrong_and_counted(tmp_path: Path, random_weights: dict[int, Path]) -> None:
    images = {str(i): picture(i, px=40) for i in range(9)} | {"9": b"no image"}
    source = DataSource("", tuple("0123456789"), list(images), lambda key: (key, images[key], "jpg", 4))
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
from rsb_cluster.evaluation.record import EvaluationRequest
from rsb_cluster.storage.store import Store
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.validation.evaluator import evaluate_sources
for world in (1, 2, 4):
    folder = tempfile.mkdtemp()
    request = EvaluationRequest(**json.loads(sys.argv[1]) | {"predictions": f"{sys.argv[2]}/{world}.csv"})
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            group = ProcessGroup(Ranks(rank, rank, world, "test", 0, world), Store(folder), wait_s=60, collective_s=60)
            (found,) = evaluate_sources(request, group)
            if rank == 0:
                # Not by stdout, where some versions of gloo write, too.
                with open(f"{sys.argv[2]}/{world}.json", "w") as file:
                    file.write(found.model_dump_json())
            group.exit_together()
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
    found = [Evaluation.model_validate_json((tmp_path / f"{world}.json").read_text()) for world in (1, 2, 4)]
    assert [one.processes for one in found] == [1, 2, 4]
    assert all((one.values, one.scored) == (found[0].values, 32) for one in found)
    texts = {(tmp_path / f"{world}.csv").read_text() for world in (1, 2, 4)}
    assert len(texts) == 1


# --- agreement with timm ----------------------------------------------------------------------------------------------

MODELS = ("resnet10t", "deit_tiny_patch16_224", "mobilenetv3_small_050")
IMAGES, CLASSES = 32, 16  # all five best of 16 are compared: another crop or interpolation changes some


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of two photographs in odd sizes, in the formats and modes that image folders have."""
    folder = tmp_path_factory.mktemp("photographs")
    draw = np.random.default_rng(0)
    scenes = [Image.fromarray(image) for image in load_sample_images().images]
    for i in range(IMAGES):
        width, height = (int(side) for side in draw.integers(60, 420, 2))
        left, top = int(draw.integers(0, 640 - width)), int(draw.integers(0, 427 - min(height, 400)))
        part = scenes[i % 2].crop((left, top, left + width, top + min(height, 400))).rotate(90 * (i % 4), expand=True)
        file = folder / "val" / f"class{i % CLASSES:02d}" / f"image{i:02d}.{'png' if i % 8 == 7 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        part.convert({3: "L", 5: "CMYK", 7: "P"}.get(i % 8, "RGB")).save(file)
    shutil.copytree(folder / "val", folder / "train")  # an image folder has both
    make_set(open_set(str(folder), split="val"), Store(folder / "shards"), shard_samples=10)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights. BatchNorm's statistics are those of photographs, or all images would be of one class."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("weights")
    scenes = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    seen = (scenes[:, :416].permute(0, 3, 1, 2).float() / 255 - 0.45) / 0.225
    crops = torch.cat([seen[:, :, top : top + 208, left : left + 208] for top in (0, 208) for left in (0, 208, 416)])
    files = {}
    for name in MODELS:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=CLASSES)
        torch.nn.init.normal_(model.get_classifier().weight, std=0.5)
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.train().momentum = None  # the mean of all batches
        if "deit" not in name:
            with torch.no_grad():
                model(crops)
        files[name] = folder / f"{name}.safetensors"
        safetensors.torch.save_file(model.state_dict(), files[name])
    return files


def by_timm(name: str, file: Path, images: Path, px: int) -> dict[str, list[int]]:
    """What timm's validate.py does: the classes by logit, best first, by the name of the file."""
    fixed = {"img_size": px} if "deit" in name else {}
    overlay = {"file": str(file), "num_classes": CLASSES}
    model = timm.create_model(
        name, pretrained=True, num_classes=CLASSES, pretrained_cfg_overlay=overlay, **fixed
    ).eval()
    config = resolve_data_config({"img_size": px}, model=model)
    dataset = create_dataset("", root=str(images / "val"))
    loader = create_loader(
        dataset, input_size=config["input_size"], batch_size=7, num_workers=0, device=torch.device("cpu"),
        interpolation=config["interpolation"], mean=config["mean"], std=config["std"], crop_pct=config["crop_pct"],
    )  # fmt: skip
    with torch.inference_mode():
        best = torch.cat([model(batch).topk(5).indices for batch, _ in loader])
    return {Path(dataset.filename(i)).stem: best[i].tolist() for i in range(len(dataset))}


# timm's ImageDataset leaves files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("px", [160, 224])
@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_timms_image_by_image(
    tmp_path: Path, photographs: Path, weights: dict[str, Path], name: str, px: int
) -> None:
    file = tmp_path / "predictions.csv"
    asked: dict[str, Any] = {"model": name, "resolution": px, "exact": True, "batch_size": 9, "predictions": str(file)}
    (found,) = evaluate(tmp_path, weights[name], data=photographs / "shards", **asked)
    rows = {row["key"].rpartition("/")[2]: row for row in rows_in(file)}
    ours = {key: [int(number) for number in row["predictions"].split()] for key, row in rows.items()}
    theirs = by_timm(name, weights[name], photographs, px)
    assert ours == theirs
    assert len(ours) == IMAGES
    assert len({best[0] for best in ours.values()}) > 3, "weights that say the same of all images prove nothing"
    right = sum(best[0] == int(rows[key]["labels"]) for key, best in theirs.items())
    assert found.values["top1"] == pytest.approx(100 * right / IMAGES)


def test_classes_outside_of_a_mask_are_neither_predicted_nor_scored(tmp_path: Path) -> None:
    """Logits made by hand: class 0 is the best of all, and none of ImageNet-A's or -R's; then 11, 1 and 6."""
    weights = timm.create_model("test_resnet", num_classes=1000).state_dict()
    (bias,) = (name for name in weights if name.endswith("fc.bias"))
    weights[bias.replace("bias", "weight")].zero_()
    weights[bias].zero_()
    for label, logit in ((0, 9.0), (11, 8.0), (1, 7.0), (6, 6.0)):
        weights[bias][label] = logit
    safetensors.torch.save_file(weights, tmp_path / "made.safetensors")

    def value(data_set: str, labels: list[int], asked: str = "") -> tuple[float, int]:
        read = lambda i: (f"k{i}", picture(i, px=32), "jpg", labels[i])  # noqa: E731
        source = DataSource("", imagenet_synsets(), range(len(labels)), read, data_set=data_set)
        folder = tmp_path / f"{data_set}{asked}{len(labels)}"
        make_set({"val": source}, Store(folder))
        (found,) = evaluate(
            tmp_path, tmp_path / "made.safetensors", data=folder, labels=asked, model="test_resnet", resolution=32
        )
        assert found.labels == (asked or known_data_sets()[data_set].default_labels)
        return found.values[found.metric], found.scored

    assert value("imagenet-a", [6, 11, 11, 988]) == (50.0, 4)
    assert value("imagenet-r", [1, 11, 11, 11]) == (75.0, 4)
    assert value("imagenet-sketch", [0, 11, 11, 11]) == (25.0, 4)
    # "Clean": images of the same classes of val, among the same logits.
    assert value("imagenet-1k", [0, 0, 1, 11, 6, 6], "a-classes") == (pytest.approx(100 / 3), 3)
    assert value("imagenet-1k", [0, 0, 1, 11, 6, 6], "r-classes") == (25.0, 4)
    with pytest.raises(DataError, match=r"no image of .* has a label in 'a-classes'"):
        value("imagenet-a", [0, 1])
