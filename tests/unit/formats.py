"""Small copies of data sets, laid out on disk as their authors ship them.

Each function fills a folder, which is the ``--root`` of ``shards make``, and returns what is in it: for each part the
image files' bytes and their right classes. The images are noise, so all differ.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
import random
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

Content = dict[str, dict[bytes, int]]  # of each part: image file -> class

# The first ids of ImageNet's classes, sorted, as their numbers are.
WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361")


def picture(seed: int, *, format: str = "JPEG", px: int = 12) -> bytes:
    """A file with an image of its own."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (px, px), random.Random(seed).randbytes(px * px * 3)).save(buffer, format)
    return buffer.getvalue()


def write(file: Path, content: bytes) -> bytes:
    """Write a file, its folders included."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return content


def class_folders(folder: Path, names: tuple[str, ...], per_class: int, *, seed: int, suffix: str) -> dict[bytes, int]:
    """A folder of images for each class."""
    format = {"JPEG": "JPEG", "jpeg": "JPEG", "jpg": "JPEG", "tif": "TIFF", "png": "PNG"}[suffix]
    return {
        write(folder / name / f"{name}_{i}.{suffix}", picture(seed + 1000 * label + i, format=format)): label
        for label, name in enumerate(names)
        for i in range(per_class)
    }


def folder_of(folder: Path, names: Iterable[str]) -> Path:
    """A folder of PNGs with these names, whatever ending they have."""
    for i, name in enumerate(names):
        write(folder / name, picture(i, format="PNG"))
    return folder


def imagenet_folders(root: Path) -> Content:
    """ImageNet-1k unpacked and sorted into class folders."""
    train = class_folders(root / "train", WNIDS, 6, seed=0, suffix="JPEG")
    val = {}
    for number in range(1, 13):
        wnid = WNIDS[number * 3 % 4]
        content = picture(9000 + number)
        val[write(root / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG", content)] = WNIDS.index(wnid)
    return {"train": train, "val": val}


def imagenet_tars(root: Path, *, packed_devkit: bool = True, val_tar: bool = True) -> Content:
    """The same images as the tars that are downloaded: classes in a tar of tars, val flat, its labels in the devkit.

    The devkit's numbers are in another order than the sorted ids, and it also has synsets above the classes.
    """
    from scipy.io import savemat

    unpacked = root / "unpacked"
    content = imagenet_folders(unpacked)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in reversed(WNIDS):  # the real one is not sorted either
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for file in sorted((unpacked / "train" / wnid).iterdir(), reverse=True):
                    inner.add(file, file.name)
            member = tarfile.TarInfo(f"{wnid}.tar")
            member.size = len(buffer.getvalue())
            outer.addfile(member, io.BytesIO(buffer.getvalue()))
    files = {file.name: file for file in (unpacked / "val").rglob("*.JPEG")}
    if val_tar:
        with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
            for name in sorted(files, reverse=True):
                tar.add(files[name], name)
    else:
        for name, file in files.items():
            write(root / "val" / name, file.read_bytes())
    number_of = {wnid: number for number, wnid in enumerate((WNIDS[2], WNIDS[0], WNIDS[3], WNIDS[1]), 1)}
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    synsets = np.empty(len(WNIDS) + 1, dtype=kind)
    for wnid, number in number_of.items():
        synsets[number - 1] = (number, wnid, f"words of {wnid}", "", 0)
    synsets[-1] = (len(WNIDS) + 1, "n00000001", "all of them", "", len(WNIDS))
    kit = root / "ILSVRC2012_devkit_t12"
    (kit / "data").mkdir(parents=True)
    savemat(kit / "data" / "meta.mat", {"synsets": synsets})
    truth = "".join(f"{number_of[files[name].parent.name]}\n" for name in sorted(files))
    write(kit / "data" / "ILSVRC2012_validation_ground_truth.txt", truth.encode())
    if packed_devkit:
        with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
            tar.add(kit, kit.name)
        kit.rename(root / "kit")
    unpacked.rename(root.with_name(f"{root.name}-unpacked"))
    return content


def imagenet_kaggle(root: Path) -> Content:
    """The same images as Kaggle ships them: val flat, its classes in a table, and a test set without any."""
    content = imagenet_folders(root / "unpacked")
    folder = root / "ILSVRC" / "Data" / "CLS-LOC"
    rows = ["ImageId,PredictionString"]
    for number, file in enumerate(sorted((root / "unpacked" / "val").rglob("*.JPEG"), reverse=True)):
        boxes = f"{file.parent.name} 85 1 499 272 " * (1 + number % 2)
        rows.append(f"{file.stem},{boxes}")
        write(folder / "val" / file.name, file.read_bytes())
        write(folder / "test" / f"ILSVRC2012_test_{number:08d}.JPEG", picture(7000 + number))
    (root / "unpacked" / "train").rename(folder / "train")
    (root / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} a name, another\n" for wnid in WNIDS))
    write(root / "ILSVRC" / "ImageSets" / "CLS-LOC" / "val.txt", b"ILSVRC2012_val_00000001 1\n")
    return content


def imagenet_v2(root: Path, variant: str = "matched-frequency") -> Content:
    """ImageNet-V2: folders are numbers, and "10" sorts before "2"."""
    folder = root / f"imagenetv2-{variant}-format-val"
    val = {}
    for label in (0, 1, 2, 10, 99, 100, 999):
        for i in range(2):
            val[write(folder / str(label) / f"{label:04x}{i}.jpeg", picture(7 * label + i))] = label
    return {"val": val}


def imagenet_subset(root: Path, name: str, classes: dict[str, int]) -> Content:
    """ImageNet-A, -R and -Sketch: folders of some of ImageNet's classes, which keep their numbers, and a text."""
    val = {}
    for wnid, label in classes.items():
        for i in range(2):
            val[write(root / name / wnid / f"{wnid}_{i}.jpg", picture(3 * label + i))] = label
    write(root / name / "README.txt", b"n01498041 stingray\n")
    return {"val": val}


# Some classes of ImageNet-A, and of -R, with their numbers among the 1,000.
A_CLASSES = {"n01498041": 6, "n01531178": 11, "n12267677": 988}
R_CLASSES = {"n01443537": 1, "n01484850": 2, "n12267677": 988}


def cifar(root: Path, *, classes: int) -> Content:
    """CIFAR-10 or -100: pickles of rows of 3,072 bytes, and the names of the classes."""
    small = classes == 10
    folder = root / ("cifar-10-batches-py" if small else "cifar-100-python")
    folder.mkdir(parents=True)
    parts = (
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}
        if small
        else {"train": ["train"], "val": ["test"]}
    )
    content: Content = {}
    generator = np.random.default_rng(classes)
    for part, files in parts.items():
        content[part] = {}
        for name in files:
            rows = generator.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
            labels = generator.integers(0, classes, 4).tolist()
            key = "labels" if small else "fine_labels"
            with (folder / name).open("wb") as file:
                pickle.dump({"data": rows.reshape(4, 3072), key: labels}, file)
            content[part] |= {pixels.transpose(1, 2, 0).tobytes(): label for pixels, label in zip(rows, labels)}  # noqa: B905
    names = [f"class {i}" for i in range(classes)]
    with (folder / ("batches.meta" if small else "meta")).open("wb") as file:
        pickle.dump({"label_names" if small else "fine_label_names": names}, file)
    return content


def flowers(root: Path) -> Content:
    """Flowers-102: all images in one folder, labels from 1 and three lists in .mat files."""
    from scipy.io import savemat

    base = root / "flowers-102"
    labels = [1, 1, 2, 3, 102, 102]
    files = [write(base / "jpg" / f"image_{i:05d}.jpg", picture(i)) for i in range(1, 7)]
    savemat(base / "imagelabels.mat", {"labels": labels})
    savemat(base / "setid.mat", {"trnid": [1, 4], "valid": [2, 6], "tstid": [3, 5]})
    train, val = ({files[i - 1]: labels[i - 1] - 1 for i in part} for part in ((1, 4, 2, 6), (3, 5)))
    return {"train": train, "val": val}


def cars(root: Path) -> Content:
    """Stanford Cars: annotations from 1 in .mat files."""
    from scipy.io import savemat

    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["Acura", "BMW"], dtype=object)})
    content: Content = {}
    for part, ours, labels, path in (
        ("train", "train", [1, 2, 2, 1], base / "devkit" / "cars_train_annos.mat"),
        ("test", "val", [2, 1], base / "cars_test_annos_withlabels.mat"),
    ):
        rows = np.empty(len(labels), dtype=[("fname", object), ("class", object)])
        content[ours] = {}
        for i, label in enumerate(labels):
            rows[i] = (f"{i:05d}.jpg", label)
            image = write(base / f"cars_{part}" / f"{i:05d}.jpg", picture(100 * len(part) + i))
            content[ours][image] = label - 1
        savemat(path, {"annotations": rows})
    return content


def inat_2019(root: Path) -> Content:
    """iNaturalist 2019: one tree of images, and a JSON in COCO's form for each part."""
    categories = [{"id": i, "name": f"species {i}"} for i in (2, 0, 1)]
    content: Content = {}
    for part, count, first in (("train", 9, 0), ("val", 3, 100)):
        content[part] = {}
        records, annotations = [], []
        for i in range(count):
            label = i % 3
            name = f"train_val2019/Plants/{label}/{first + i:04d}.jpg"
            content[part][write(root / name, picture(first + i))] = label
            records.append({"id": first + i, "file_name": name, "width": 12, "height": 12})
            annotations.append({"id": first + i, "image_id": first + i, "category_id": label})
        annotations.reverse()
        form = {"info": {}, "images": records, "categories": categories, "annotations": annotations, "licenses": []}
        (root / f"{part}2019.json").write_text(json.dumps(form))
    return content


def nct_crc_he(root: Path) -> Content:
    """NCT-CRC-HE-100K and CRC-VAL-HE-7K: TIFFs in a folder per tissue."""
    tissues = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
    return {
        "train": class_folders(root / "NCT-CRC-HE-100K", tissues, 3, seed=0, suffix="tif"),
        "val": class_folders(root / "CRC-VAL-HE-7K", tissues, 1, seed=500, suffix="tif"),
    }


def vizwiz(root: Path) -> Content:
    """VizWiz-Classification as it is public: images and the classes that an answer may be, but no labels."""
    names = [f"VizWiz_{part}_{i:08d}.jpg" for i, part in enumerate(("train", "val", "test", "val"))]
    categories = [{"id": 291, "wordnet_id": "n02129165"}, {"id": 7, "wordnet_id": "n01514668"}]
    write(root / "annotations.json", json.dumps({"categories": categories, "images": names}).encode())
    return {"val": {write(root / "images" / name, picture(i)): 0 for i, name in enumerate(names)}}


def indl(root: Path) -> Content:
    """A set of InDL as the authors' script writes it with pandas; which part an image is in is our choice."""
    root.mkdir(parents=True, exist_ok=True)
    content = {}
    with (root / "label.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["", "name", "label", "value"])
        for i in range(20):
            content[write(root / f"zollner{i}.png", picture(i, format="PNG"))] = i % 2
            rows.writerow([i, f"zollner{i}.png", i % 2, 0.0])
    return {"all": content}


def parquet(root: Path, *, paths: bool = True, names: bool = True, text_labels: bool = False) -> Content:
    """A data set of the Hugging Face Hub: structs of bytes and path, row groups, the names in the metadata."""
    content: Content = {}
    (root / "data").mkdir(parents=True)
    (root / "README.md").write_text("---\nlicense: mit\n---\n")
    for part, word, files in (("train", "train", 2), ("val", "validation", 1)):
        content[part] = {}
        for number in range(files):
            file = root / "data" / f"{word}-{number:05d}-of-{files:05d}.parquet"
            seed = 100 * files + 10 * number
            content[part] |= parquet_file(file, seed, paths=paths and word, names=names, text_labels=text_labels)
    return content


def parquet_file(
    file: Path, seed: int, *, paths: str | bool = False, names: bool = True, text_labels: bool = False
) -> dict[bytes, int]:
    """A parquet file of ten images of three classes; paths, if any, begin with a word."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    classes, rows, content = ["cat", "dog", "owl"], [], {}
    for i in range(10):
        image = picture(seed + i, format="PNG" if i % 2 else "JPEG")
        label = i // 4  # sorted by class
        content[image] = label
        path = f"{paths}/{classes[label]}.{seed + i}.{'png' if i % 2 else 'jpg'}" if paths else None
        rows.append({"image": {"bytes": image, "path": path}, "label": label})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = [classes[row["label"]] if text_labels else row["label"] for row in rows]
    columns = {
        "image": pa.array([row["image"] for row in rows], kind),
        "label": pa.array(labels, pa.string() if text_labels else pa.int64()),
    }
    feature = {"label": {"names": classes, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    about = {"huggingface": json.dumps({"info": {"features": feature}})} if names else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(about), file, row_group_size=4)
    return content


MINI_CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  splits:
  - name: train
    num_bytes: 6284840508.0
    num_examples: 20
  - name: validation
    num_examples: 10
  - name: test
    num_examples: 10
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/validation-*
  - split: test
    path: data/test-*
license: other
---
## Dataset Description
"""


def mini_imagenet(root: Path) -> Content:
    """timm/mini-imagenet, as a download of the Hub's command line leaves it."""
    content = parquet(root)
    (root / "README.md").write_text(MINI_CARD)
    parquet_file(root / "data" / "test-00000-of-00001.parquet", 900)
    parquet_file(root / ".cache" / "huggingface" / "download" / "data" / "train-00000-of-00002.parquet", 0)
    write(root / ".gitattributes", b"*.parquet filter=lfs\n")
    return content


# How each is made, by the name under which it is known.
FORMATS: dict[str, Callable[[Path], Content]] = {
    "imagenet-1k": imagenet_tars,
    "imagenet-v2": imagenet_v2,
    "imagenet-v2-threshold": lambda root: imagenet_v2(root, "threshold0.7"),
    "imagenet-v2-top-images": lambda root: imagenet_v2(root, "top-images"),
    "imagenet-a": lambda root: imagenet_subset(root, "imagenet-a", A_CLASSES),
    "imagenet-r": lambda root: imagenet_subset(root, "imagenet-r", R_CLASSES),
    "imagenet-sketch": lambda root: imagenet_subset(root, "sketch", {"n01440764": 0, "n15075141": 999}),
    "mini-imagenet": mini_imagenet,
    "cifar10": lambda root: cifar(root, classes=10),
    "cifar100": lambda root: cifar(root, classes=100),
    "flowers102": flowers,
    "stanford-cars": cars,
    "inat2019": inat_2019,
    "nct-crc-he": nct_crc_he,
    "vizwiz-classification": vizwiz,
}
