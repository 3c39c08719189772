"""The same predictions as timm's own loader, transforms and model on the same files, image by image."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_dataset, create_loader, resolve_data_config

from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.evaluation.record import Request
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.storage.store import Store
from rsb_cluster.train.distributed import Group
from rsb_cluster.train.validation.evaluator import evaluate_sources

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
    request = Request(
        sources=(str(weights[name]),), runs=str(tmp_path), data=str(photographs / "shards"), model=name,
        resolution=px, exact=True, batch_size=9, predictions=str(tmp_path / "predictions.csv"),
    )  # fmt: skip
    group = Group(Ranks(0, 0, 1, "test", 0, 1), Store(tmp_path), wait_s=10, collective_s=10)
    (found,) = evaluate_sources(request, group)
    group.close()
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = {row["key"].rpartition("/")[2]: row for row in csv.DictReader(file)}
    ours = {key: [int(number) for number in row["predictions"].split()] for key, row in rows.items()}
    theirs = by_timm(name, weights[name], photographs, px)
    assert ours == theirs
    assert len(ours) == IMAGES
    assert len({best[0] for best in ours.values()}) > 3, "weights that say the same of all images prove nothing"
    right = sum(best[0] == int(rows[key]["labels"]) for key, best in theirs.items())
    assert found.values["top1"] == pytest.approx(100 * right / IMAGES)
