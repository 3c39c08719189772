"""Data sets with a folder of images and a file of annotations."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rsb_cluster.data.labels import LabelFile
from rsb_cluster.data.order import permutation
from rsb_cluster.data.sources.folder import file_source
from rsb_cluster.data.sources.imagenet import imagenet_synsets
from rsb_cluster.data.sources.source import SHUFFLE_SEED, DataSource
from rsb_cluster.errors import ConfigError

VIZWIZ_LABELS = "vizwiz"
INDL_CLASSES = ("different", "same")  # whether the two lines are equally long (parallel, collinear)


def inat_2019(root: Path, split: str) -> DataSource:
    """Open iNaturalist 2019: ``train2019.json`` and ``val2019.json`` in COCO's format, and ``train_val2019/``.

    torchvision's ``INaturalist`` reads the images of 2019 without these files, and so without train and val.

    Raises:
        ConfigError: A file is missing or invalid.
    """
    path = root / f"{split}2019.json"
    with _file_errors(path):
        content = _json(path)
        # The ids of the categories are not always their positions in the list.
        categories = sorted(content["categories"], key=lambda category: int(category["id"]))
        label = {category["id"]: i for i, category in enumerate(categories)}
        category_of = {a["image_id"]: a["category_id"] for a in content["annotations"]}
        files = [(str(i["file_name"]), label[category_of[i["id"]]]) for i in content["images"]]
        names = [str(category["name"]) for category in categories]
    return file_source(f"iNaturalist 2019 in {root}, {split}", names, root, sorted(files))


def vizwiz(root: Path, split: str) -> DataSource:
    """Open VizWiz-Classification: ``annotations.json`` and ``images/``.

    Its labels are not public; EvalAI scores predictions. Public are the 200 ImageNet classes that can be predicted,
    which are kept as the label sets `vizwiz`. Labels can be added in a ``labels.json``, in our own format:
    ``{"<image>": {"labels": [<class>, ...], "flaws": ["Blur", ...]}, ...}``. Each flaw becomes a group; an image
    without a flaw is in the group ``Clean``, all others are in ``Corrupted``.

    Args:
        root: The folder.
        split: ``val``; it is for evaluation only.

    Raises:
        ConfigError: A file is missing or invalid.
    """
    path = root / "annotations.json"
    with _file_errors(path):
        content = _json(path)
        among = tuple(sorted(int(category["id"]) for category in content["categories"]))
        files = sorted(str(image) for image in content["images"])
    known = _vizwiz_labels(root / "labels.json")
    # Class 0 stands for "unknown": the index needs a class for each image, but evaluation uses the label sets.
    listed = file_source(
        f"VizWiz-Classification in {root}",
        imagenet_synsets(),
        root / "images",
        [(file, min(known.get(file, {}).get("labels", ()), default=0)) for file in files],
    )
    groups: dict[str, list[str]] = {}
    labels: dict[str, tuple[int, ...]] = {}
    for key, file, _ in listed.entries:
        labels[key] = tuple(known.get(file, {}).get("labels", ()))
        if file in known:
            flaws = known[file].get("flaws", ())
            for group in (*flaws, "Corrupted" if flaws else "Clean"):
                groups.setdefault(group, []).append(key)
    about = "VizWiz-Classification" + ("" if known else ": labels are not public, send predictions to EvalAI")
    sets = LabelFile(about=about, among=among, labels=labels, groups=groups)
    return replace(listed, labels={VIZWIZ_LABELS: sets})


def indl_folder(root: Path, split: str) -> DataSource:
    """Open a set of InDL as written by its authors' script: images, and a ``label.csv`` with ``name`` and ``label``.

    A fifth of it, chosen by a fixed seed, is val.

    Raises:
        ConfigError: A file is missing or invalid.
    """
    path = root / "label.csv"
    with _file_errors(path), path.open(newline="", encoding="utf-8-sig") as file:
        files = sorted((row["name"], int(row["label"])) for row in csv.DictReader(file))
    is_val = np.zeros(len(files), dtype=bool)
    is_val[permutation(len(files), SHUFFLE_SEED)[: len(files) // 5]] = True
    chosen = [listed for listed, val in zip(files, is_val, strict=True) if val == (split == "val")]
    return file_source(f"InDL in {root}, {split}", INDL_CLASSES, root, chosen)


def _vizwiz_labels(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with _file_errors(path):
        return {str(name): {"labels": v["labels"], "flaws": v.get("flaws", ())} for name, v in _json(path).items()}


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Translate errors of reading and parsing a file to ours."""
    try:
        yield
    except OSError as error:
        found = ", ".join(sorted(p.name for p in path.parent.iterdir())[:8]) if path.parent.is_dir() else "no folder"
        raise ConfigError(f"cannot read {path}: {error.strerror}. Found: {found}. Check --root.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not in the format of its data set: {type(error).__name__} {error}. Download it again."
        ) from error
