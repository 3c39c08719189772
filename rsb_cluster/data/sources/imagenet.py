"""ImageNet-1k as downloaded from its authors or from Kaggle, and ImageNet-V2.

The tars and the extracted class folders give the same shards, byte for byte: keys, order and image files are the same.
torchvision's ``ImageNet`` is not used: it extracts the 150 GB next to the tars before it reads anything.
"""

from __future__ import annotations

import csv
import io
import re
import sys
import tarfile
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from rsb_cluster.data.labels import REAL, real_labels, timm_info
from rsb_cluster.data.sources.folder import class_folders, file_source, image_folder, images
from rsb_cluster.data.sources.source import DataSource, Sample, extension_of, safe_keys
from rsb_cluster.errors import ConfigError

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"

KAGGLE_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
KAGGLE_TRUTH = "LOC_val_solution.csv"

_VAL_FILE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_V2_FOLDER = "imagenetv2-"


def imagenet_1k(root: Path, split: str) -> DataSource:
    """Open ImageNet-1k, from folders if they exist, else from the tars. Val includes the ReaL labels.

    Args:
        root: Folder with ``train/`` and ``val/`` with a folder per class (``n01440764``), or with the two tars; or as
            Kaggle ships it, with both in ``ILSVRC/Data/CLS-LOC``. A ``val`` that is not sorted into class folders, or
            is a tar, needs the devkit in root, packed or extracted, or Kaggle's ``LOC_val_solution.csv``.
        split: ``train`` or ``val``.

    Raises:
        ConfigError: A file is missing or damaged.
    """
    folder = next((root / name for name in KAGGLE_FOLDERS if (root / name).is_dir()), root)
    source = _train(folder) if split == "train" else _val(root, folder)
    if split == "val":
        source = replace(source, labels={REAL: real_labels(entry[0] for entry in source.entries)})
    return source


def imagenet_v2(root: Path, variant: str) -> DataSource:
    """Open a variant of ImageNet-V2: 1,000 folders named by the class number.

    torchvision's ``ImageFolder`` sorts them as text: "10" comes before "2", and nearly all labels are wrong.

    Args:
        root: The folder of a variant, or one that holds ``imagenetv2-...`` folders.
        variant: The beginning of the variant's name; empty for the only one.
    """
    variants = sorted(path for path in root.glob(f"{_V2_FOLDER}{variant}*") if path.is_dir())
    if len(variants) > 1:
        raise ConfigError(
            f"{root} holds {len(variants)} variants of ImageNet-V2: {', '.join(path.name for path in variants)}. "
            "Use one of these folders as --root; timm's results are on matched-frequency."
        )
    folder = variants[0] if variants else root
    if not variants and folder.name.startswith(_V2_FOLDER) and not folder.name.startswith(f"{_V2_FOLDER}{variant}"):
        raise ConfigError(f"{root} is another variant of ImageNet-V2 than {variant}. Check --root.")
    odd = [name for name in class_folders(folder) if not name.isdecimal()]
    if odd:
        raise ConfigError(f"{folder} has the folder '{odd[0]}'; ImageNet-V2's are called 0 to 999. Check --root.")
    return image_folder(folder, classes=[str(i) for i in range(1000)], names=imagenet_synsets())


def imagenet_folders(root: Path, name: str) -> DataSource:
    """Open other images of ImageNet's classes: ImageNet-A, -R or -Sketch, a folder for each class (``n01443537``).

    A class keeps its number among the 1,000, however few of them the set has.

    Args:
        root: That folder, or the one that it is in.
        name: Its name as its authors pack it.
    """
    return image_folder(root / name if (root / name).is_dir() else root, classes=imagenet_synsets())


def imagenet_synsets() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet's classes in the order of their numbers, from timm's list."""
    return tuple(timm_info("imagenet_synsets.txt").read_text().split())


def _train(root: Path) -> DataSource:
    if (root / "train").is_dir():
        return image_folder(root / "train")
    tar = _require_file(root / TRAIN_TAR, f"{root / 'train'} with a folder per class")
    with _tar_errors(tar), tar.open("rb") as file:
        found = [
            (f"{wnid}/{name}", wnid, offset, size)
            for wnid, start in sorted((Path(name).stem, offset) for name, offset, _ in _members(file, 0))
            for name, offset, size in sorted(_members(file, start))
        ]
    classes = tuple(sorted({wnid for _, wnid, _, _ in found}))
    return _in_tar(tar, classes, found)


def _val(root: Path, parent: Path) -> DataSource:
    """Open val in a folder; what the root holds besides tells the classes of its images."""
    folder = parent / "val"
    if folder.is_dir():
        if any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir()):
            known = class_folders(parent / "train") if (parent / "train").is_dir() else ()
            return image_folder(folder, classes=known)
        truth = _Truth.open(root)
        files = sorted((truth.wnid_of(file.name), file.name, size) for file, size in images(folder))
        # The key contains the class folder, as if val were sorted into class folders.
        label = {wnid: i for i, wnid in enumerate(truth.classes)}
        listed = [(name, label[wnid]) for wnid, name, _ in files]
        flat = file_source(f"images in {folder}", truth.classes, folder, listed, [size for *_, size in files])
        keys = safe_keys([f"{wnid}/{name}" for wnid, name, _ in files])
        entries = [(key, *entry[1:]) for key, entry in zip(keys, flat.entries, strict=True)]
        return replace(flat, entries=entries, folder=folder)
    tar = _require_file(root / VAL_TAR, f"{folder} with the images")
    truth = _Truth.open(root)
    with _tar_errors(tar), tar.open("rb") as file:
        found = sorted((truth.wnid_of(name), name, offset, size) for name, offset, size in _members(file, 0))
    return _in_tar(tar, truth.classes, [(f"{wnid}/{name}", wnid, offset, size) for wnid, name, offset, size in found])


@dataclass(frozen=True)
class _Truth:
    """The classes, and the ground truth of the validation images, as WordNet ids."""

    classes: tuple[str, ...]
    truth: Mapping[int, str]  # by the number in ILSVRC2012_val_00000001.JPEG
    file: str

    def wnid_of(self, name: str) -> str:
        found = _VAL_FILE.fullmatch(name)
        wnid = self.truth.get(int(found[1])) if found else None
        if wnid is None:
            raise ConfigError(f"'{name}' is not one of the {len(self.truth):,} images of {self.file}. Remove it.")
        return wnid

    @classmethod
    def open(cls, root: Path) -> _Truth:
        """Read the devkit, or Kaggle's list if that is all there is."""
        has_devkit = (root / DEVKIT).is_dir() or (root / f"{DEVKIT}.tar.gz").is_file()
        above = (root, *root.absolute().parents[:3])  # the root may be any folder down to the one of train and val
        lists = [folder / KAGGLE_TRUTH for folder in above if (folder / KAGGLE_TRUTH).is_file()]
        return cls._of_kaggle(lists[0]) if lists and not has_devkit else cls._of_devkit(root)

    @classmethod
    def _of_kaggle(cls, path: Path) -> _Truth:
        """Read rows of an image's name, and its class with a box: ``ILSVRC2012_val_00048981,n03995372 85 1 499 272``.

        The box may be followed by others, with the class before each.
        """
        truth: dict[int, str] = {}
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                found = _VAL_FILE.fullmatch(f"{row.get('ImageId')}.JPEG")
                classes = set((row.get("PredictionString") or "").split()[::5])
                if found is None or len(classes) != 1:
                    raise ConfigError(
                        f"{path} is not Kaggle's list of classes: it has the row {row}. Download it again."
                    )
                truth[int(found[1])] = classes.pop()
        return cls(tuple(sorted(set(truth.values()))), truth, str(path))

    @classmethod
    def _of_devkit(cls, root: Path) -> _Truth:
        """Read meta.mat and the ground truth.

        The ground truth has ILSVRC's class numbers, 1 to 1,000. Models are trained with the order of the sorted WordNet
        ids, which differs; meta.mat maps the numbers to these.
        """
        from scipy.io import loadmat

        read = _devkit_reader(root)
        synsets = loadmat(io.BytesIO(read("data/meta.mat")), squeeze_me=True)["synsets"]
        leaves = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
        numbers = read("data/ILSVRC2012_validation_ground_truth.txt").split()
        truth = {i: leaves[int(number)] for i, number in enumerate(numbers, 1)}
        return cls(tuple(sorted(leaves.values())), truth, "the devkit")


def _devkit_reader(root: Path) -> Callable[[str], bytes]:
    """Return a function that reads a file of the devkit."""
    if (root / DEVKIT).is_dir():
        return lambda name: (root / DEVKIT / name).read_bytes()
    packed = _require_file(
        root / f"{DEVKIT}.tar.gz",
        f"{root / KAGGLE_TRUTH}, nor a val sorted into class folders; they tell the classes of the validation images",
    )

    def read(name: str) -> bytes:
        with _tar_errors(packed), tarfile.open(packed) as tar:
            content = tar.extractfile(f"{DEVKIT}/{name}")
            assert content is not None
            return content.read()

    return read


@dataclass(frozen=True)
class _ReadMember:
    """Reads entries of (key, extension, class, first byte, size) in a tar."""

    tar: Path

    def __call__(self, entry: tuple[str, str, int, int, int]) -> Sample:
        key, extension, label, offset, size = entry
        with self.tar.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise ConfigError(f"{self.tar} is truncated: it ends inside of '{key}'. Download it again.")
        return key, content, extension, label


def _in_tar(tar: Path, classes: tuple[str, ...], found: list[tuple[str, str, int, int]]) -> DataSource:
    label = {wnid: i for i, wnid in enumerate(classes)}
    keys = safe_keys([name for name, *_ in found])
    entries = [
        (key, sys.intern(extension_of(name)), label[wnid], offset, size)
        for key, (name, wnid, offset, size) in zip(keys, found, strict=True)
    ]
    sizes = array("q", (size for *_, size in found))
    return DataSource(f"images in {tar}", classes, entries, _ReadMember(tar), sizes=sizes)


def _members(file: BinaryIO, start: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, first byte and size of the files in the tar that starts at an offset of a file."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory
            if member.isreg():
                yield member.name, member.offset_data, member.size


def _require_file(path: Path, alternative: str) -> Path:
    if not path.is_file():
        found = (
            sorted(entry.name for entry in path.parent.iterdir())[:8] if path.parent.is_dir() else ["no such folder"]
        )
        raise ConfigError(
            f"there is neither {path} nor {alternative}. Found: {', '.join(found) or 'nothing'}. "
            "Download it from https://image-net.org (after registering), or use another --root."
        )
    return path


@contextmanager
def _tar_errors(tar: Path) -> Iterator[None]:
    """Turn tarfile's errors into ours."""
    try:
        yield
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise ConfigError(f"{tar} is not a complete tar: {error}. Download it again.") from error
