"""Sources of samples for shards: data sets known by name, folders of images, parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rsb_cluster.data.datasets import DataSet, known_data_sets
from rsb_cluster.data.sources.chosen import choose_from
from rsb_cluster.data.sources.digits import digits
from rsb_cluster.data.sources.folder import class_folders, image_folder
from rsb_cluster.data.sources.illusions import indl
from rsb_cluster.data.sources.imagenet import imagenet_1k, imagenet_folders, imagenet_v2
from rsb_cluster.data.sources.label_table import LabelTable, read_labels
from rsb_cluster.data.sources.labelled import labelled_set
from rsb_cluster.data.sources.layout import open_image_folders
from rsb_cluster.data.sources.lists import inat_2019, indl_folder, vizwiz
from rsb_cluster.data.sources.parquet import ParquetChoice, is_parquet, parquet_set
from rsb_cluster.data.sources.source import SPLITS, DataSource, Sample, readable
from rsb_cluster.data.spelling import same_name, spelled
from rsb_cluster.errors import ConfigError, did_you_mean, expand_home

__all__ = ["SPLITS", "DataSource", "LabelTable", "ParquetChoice", "Sample", "open_set", "read_labels"]


def open_set(
    source: str,
    *,
    root: Path | None = None,
    split: str | None = None,
    any_count: bool = False,
    classes: Sequence[str] = (),
    choice: ParquetChoice | None = None,
    table: LabelTable | None = None,
) -> dict[str, DataSource]:
    """Open a source given by the user.

    Args:
        source: A name in datasets.toml (``imagenet-1k``, ``digits``); the name of a torchvision data set; or a folder
            (with a ``/`` if its name is also one of those) of images or of parquet files. A folder with ``train/`` and
            ``val/`` is both splits; any other folder is the one that ``split`` names.
        root: Folder of a data set known by name.
        split: ``train`` or ``val`` for one of them; None for both.
        any_count: Accept a known data set with an unexpected number of images or classes, and missing parquet files.
        classes: Only these classes, numbered in this order; all if empty.
        choice: The configuration and the columns of parquet files.
        table: The classes of the images in a folder, which then needs no folder per class.

    Returns:
        The source of each split, for `rsb_cluster.data.make.plan_set`.

    Raises:
        ConfigError: There is no such source, or it is invalid.
    """
    with readable(source):
        opened = _open(source, root, split, any_count, classes, choice, table)
    if classes:
        opened = {name: choose_from(part, classes) for name, part in opened.items()}
    first = next(iter(opened))  # both have the same classes
    if not opened[first].data_set:
        more = filter(None, (_look_alike(opened[first].classes), _not_in_order(opened[first].classes)))
        opened[first] = replace(opened[first], notes=(*opened[first].notes, *more))
    return opened


def _look_alike(classes: Sequence[str]) -> str:
    """Return a note on classes that may have been meant as one; empty if there are none."""
    spellings: dict[str, list[str]] = {}
    for name in classes:
        spellings.setdefault(" ".join(same_name(name).casefold().split()), []).append(name)
    twins = (names for names in spellings.values() if len(names) > 1)
    found = [" and ".join(f"'{name}'" if name.isascii() else spelled(name) for name in names) for names in twins]
    if not found:
        return ""
    shown = "; ".join(found[:5]) + ("; ..." if len(found) > 5 else "")
    return f"classes whose names differ only in case, spaces or accents, and are different classes here: {shown}"


def _not_in_order(classes: Sequence[str]) -> str:
    """Return a note where the numbers of classes are not what their names suggest; empty otherwise."""
    if classes and all(name.isdecimal() for name in classes) and list(classes) != sorted(classes, key=int):
        number, name = next((n, name) for n, name in enumerate(classes) if n != int(name))
        return f"classes are numbered in the order of their names as text: class {number} is '{name}'"
    return ""


def _open(
    source: str,
    root: Path | None,
    split: str | None,
    any_count: bool,
    classes: Sequence[str],
    choice: ParquetChoice | None,
    table: LabelTable | None,
) -> dict[str, DataSource]:
    if split is not None and split not in SPLITS:
        raise ConfigError(f"the split '{split}' is none of: {', '.join(SPLITS)}.")
    splits = (split,) if split else SPLITS
    known = known_data_sets()
    if "://" in source:
        raise ConfigError(
            f"{source}: images and parquet files are read from this machine's folders. Copy them here, or mount the "
            "bucket. Shards need only an index: rsb-cluster shards index URL -o FOLDER"
        )
    if not source:
        raise ConfigError("the source is empty. Name a data set (rsb-cluster shards list) or a folder.")
    if table is not None:
        if not expand_home(source).is_dir():
            raise ConfigError(f"--labels is for a folder of images or of tars, and there is no folder {source}.")
        return labelled_set(expand_home(source), split, table)
    # A name takes precedence over a folder: torchvision itself creates a folder FashionMNIST in the current one.
    if source in known:
        return _open_known(known[source], root, split, any_count)
    path = expand_home(source)
    if "/" not in source and source not in (".", ".."):
        from rsb_cluster.data.sources.vision import data_set_names, torchvision_dataset

        others = data_set_names()
        if source in others:
            return {name: torchvision_dataset(source, root, name) for name in splits}
        if not path.exists():
            hint = _suggestion(source, (*known, *others)) or " Write a folder with a slash: ./folder"
            raise ConfigError(
                f"'{source}' is neither a known data set (rsb-cluster shards list), nor one of torchvision, "
                f"nor a folder.{hint}"
            )
    return _open_folder(path, split, any_count, classes, choice)


def _suggestion(source: str, known: Sequence[str]) -> str:
    """Suggest the first data set whose name goes on like the given one (imagenet: imagenet-1k), else the closest."""
    longer = next((name for name in known if name.startswith(f"{source}-")), "")
    return f" Did you mean '{longer}'?" if longer else did_you_mean(source, known)


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
            part = replace(_open_part(data_set, root and expand_home(root), name), data_set=data_set.name)
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
    if reader == "parquet":
        assert root is not None  # as below
        return parquet_set(root, split, any_count=True)[split]
    if reader == "torchvision":
        from rsb_cluster.data.sources.vision import torchvision_dataset

        return torchvision_dataset(argument, root, split)
    assert root is not None  # required above for every data set with files
    if reader == "imagenet-v2":
        return imagenet_v2(root, argument)
    if reader == "imagenet-folders":
        return imagenet_folders(root, argument)
    if reader == "folders":
        return _two_folders(root, argument.split(","), split)
    return _READERS[reader](root, split)


_READERS = {"imagenet": imagenet_1k, "inat-2019": inat_2019, "vizwiz": vizwiz}


def _two_folders(root: Path, folders: list[str], split: str) -> DataSource:
    train, val = folders
    classes = class_folders(root / train) if (root / train).is_dir() else ()
    return image_folder(root / (train if split == "train" else val), classes=classes)


def _open_folder(
    path: Path, split: str | None, any_count: bool, classes: Sequence[str], choice: ParquetChoice | None
) -> dict[str, DataSource]:
    if is_parquet(path):
        return parquet_set(path, split, choice, any_count)
    if choice:
        raise ConfigError(f"--config and the columns are for parquet files, and {path} has none. Omit them.")
    return open_image_folders(path, split, classes)
