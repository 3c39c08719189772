"""Sources of samples for shards: data sets known by name, folders of images, parquet files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rsb_cluster.data.datasets import DataSet, known_data_sets
from rsb_cluster.data.scan import IMAGE_EXTENSIONS
from rsb_cluster.data.sources.digits import digits
from rsb_cluster.data.sources.folder import class_folders, image_folder
from rsb_cluster.data.sources.illusions import indl
from rsb_cluster.data.sources.imagenet import imagenet_1k, imagenet_v2
from rsb_cluster.data.sources.lists import inat_2019, indl_folder, vizwiz
from rsb_cluster.data.sources.parquet import is_parquet, parquet, parquet_splits
from rsb_cluster.data.sources.source import SPLITS, DataSource, Sample, extension_of
from rsb_cluster.errors import ConfigError, did_you_mean

__all__ = ["SPLITS", "DataSource", "Sample", "open_set"]


def open_set(
    source: str, *, root: Path | None = None, split: str | None = None, any_count: bool = False
) -> dict[str, DataSource]:
    """Open a source given by the user.

    Args:
        source: A name in datasets.toml (``imagenet-1k``, ``digits``); the name of a torchvision data set; or a folder
            (with a ``/`` if its name is also one of those) of images or of parquet files. A folder with ``train/`` and
            ``val/`` is both splits; any other folder is the one that ``split`` names.
        root: Folder of a data set known by name.
        split: ``train`` or ``val`` for one of them; None for both.
        any_count: Accept a known data set with an unexpected number of images or classes.

    Returns:
        The source of each split, for `rsb_cluster.data.make.plan_set`.

    Raises:
        ConfigError: There is no such source, or it is invalid.
    """
    if split is not None and split not in SPLITS:
        raise ConfigError(f"the split '{split}' is none of: {', '.join(SPLITS)}.")
    splits = (split,) if split else SPLITS
    known = known_data_sets()
    # A name takes precedence over a folder: torchvision itself creates a folder FashionMNIST in the current one.
    if source in known:
        return _open_known(known[source], root, split, any_count)
    path = Path(source).expanduser()
    if "/" not in source and source not in (".", ".."):
        from rsb_cluster.data.sources.vision import data_set_names, torchvision_dataset

        others = data_set_names()
        if source in others:
            return {name: torchvision_dataset(source, root, name) for name in splits}
        if not path.is_dir():
            hint = did_you_mean(source, (*known, *others)) or " Write a folder with a slash: ./folder"
            raise ConfigError(
                f"'{source}' is neither a known data set (rsb-cluster shards list), nor one of torchvision, "
                f"nor a folder.{hint}"
            )
    return _open_folder(path, split)


def _open_known(data_set: DataSet, root: Path | None, split: str | None, any_count: bool) -> dict[str, DataSource]:
    missing = [] if split is None or split in data_set.samples else [split]
    if missing:
        raise ConfigError(f"{data_set.name} has no {missing[0]}: it has {', '.join(data_set.samples)} only.")
    if root is None and data_set.files:
        raise ConfigError(
            f"{data_set.name} needs --root FOLDER, a folder with {data_set.files} "
            f"(nothing is downloaded; it is available at {data_set.download})."
        )
    opened: dict[str, DataSource] = {}
    for name, expected in data_set.samples.items():
        if split in (None, name):
            part = replace(_open_part(data_set, root and root.expanduser(), name), data_set=data_set.name)
            opened[name] = part
            for what, there, right in (
                ("images", len(part), expected),
                # Where torchvision has no class names, only images are counted.
                ("classes", len(part.classes) or data_set.classes, data_set.classes),
            ):
                if there != right and not any_count:
                    raise ConfigError(
                        f"{part.description}: found {there:,} {what}, but {name} of {data_set.name} has {right:,}. "
                        "Was a download or an extraction interrupted? To use them anyway, pass --any-count."
                    )
    return opened


def _open_part(data_set: DataSet, root: Path | None, split: str) -> DataSource:
    """Call the function named by the data set's ``reader`` in datasets.toml, with the argument after the colon."""
    reader, _, argument = data_set.reader.partition(":")
    if reader == "digits":
        return digits(split)
    if reader == "indl":
        return indl_folder(root, split) if root else indl(argument, split)
    if reader == "torchvision":
        from rsb_cluster.data.sources.vision import torchvision_dataset

        return torchvision_dataset(argument, root, split)
    assert root is not None  # required above for every data set with files
    if reader == "folders":
        return _two_folders(root, argument.split(","), split)
    return _READERS[reader](root, split)


_READERS = {"imagenet": imagenet_1k, "imagenet-v2": imagenet_v2, "inat-2019": inat_2019, "vizwiz": vizwiz}


def _two_folders(root: Path, folders: list[str], split: str) -> DataSource:
    train, val = folders
    classes = class_folders(root / train) if (root / train).is_dir() else ()
    return image_folder(root / (train if split == "train" else val), classes=classes)


def _open_folder(path: Path, split: str | None) -> dict[str, DataSource]:
    splits = (split,) if split else SPLITS
    parts = {name: path / name for name in SPLITS}
    if is_parquet(path):
        named = parquet_splits(path)
        if split is None and not named:
            raise ConfigError(f"the names of the .parquet files in {path} do not tell their split. Add --split.")
        return {name: parquet(path, name) for name in splits if split or name in named}
    if all(part.is_dir() for part in parts.values()):
        # One list of names for both: a class that val lacks must not shift the numbers of the others.
        classes = class_folders(parts["train"])
        return {name: image_folder(parts[name], classes=classes) for name in splits}
    if split is not None and _has_folders(parts[split]):
        return {split: image_folder(parts[split])}
    folders = class_folders(path)
    if all(name in _NAMES_OF_SPLITS and _has_folders(path / name) for name in folders):
        raise ConfigError(
            f"the folders in {path} are splits and no classes: {', '.join(folders)}. Name one of them, such as "
            f"{path / folders[-1]}, with --split train or --split val; or call them train and val."
        )
    if split is None:
        raise ConfigError(f"{path} has no train/ and val/, so it is a single split. Add --split train or --split val.")
    return {split: image_folder(path)}


# As data sets call them. A class may have such a name, too, but then its folder holds images.
_NAMES_OF_SPLITS = ("dev", "eval", "test", "testing", "train", "training", "val", "valid", "validation")


def _has_folders(path: Path) -> bool:
    """Whether a folder holds folders and no image next to them: it is a split, as a class holds images."""
    if not path.is_dir():
        return False
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    return any(map(Path.is_dir, entries)) and not any(extension_of(entry.name) in IMAGE_EXTENSIONS for entry in entries)
