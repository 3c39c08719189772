"""Which folders of a user's data set are its splits."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rsb_cluster.data.image_files import is_readable
from rsb_cluster.data.left_out import is_debris
from rsb_cluster.data.sources.folder import class_folders, image_folder
from rsb_cluster.data.sources.source import SPLITS, DataSource, extension_of
from rsb_cluster.data.split_folder import abbreviate
from rsb_cluster.data.split_names import as_ours, splits_in
from rsb_cluster.errors import ConfigError

# As data sets call their splits, in lower case. A class may have such a name, too.
_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev", "eval")}
_TEST = ("test", "testing", "evaluation")  # val, where there is no other
_ALL_NAMES = frozenset((*_NAMES["train"], *_NAMES["val"], *_TEST))
_WRAPPERS = 4  # folders that are entered to find the splits, as archives often add one
# In front of what a name's words end with: trainset, TrainImages.
_WORD_END = re.compile(r"(?<=[a-z])(?=[A-Z])|(?i:(?<=[a-z])(?=(?:sets?|data|images?)(?:[^a-z]|$)))")


def open_image_folders(path: Path, split: str | None, only: Sequence[str] = ()) -> dict[str, DataSource]:
    """Open a folder with a folder for each split; or, where one split is asked for, one with a folder for each class.

    Args:
        path: The folder; one that only wraps another is entered.
        split: ``train`` or ``val``; None for both.
        only: The classes to read; all if empty.

    Raises:
        ConfigError: There is no such folder or class, it is unclear which folders are splits, or images cannot be read.
    """
    inner = _unwrapped(path)
    entries = _entries(inner)
    folders = [entry for entry in entries if entry.is_dir()]
    parts = _splits(inner, folders)
    if not parts:
        return _open_classes(inner, folders, split, only)
    wanted = (split,) if split else SPLITS
    if missing := [name for name in wanted if name not in parts]:
        _refuse_missing(inner, folders, missing[0])
    # One list of names for both: a class that val lacks must not shift the numbers of the others.
    classes = class_folders(parts["train"]) if "train" in parts and split == "val" else ()
    opened: dict[str, DataSource] = {}
    for name in wanted:
        source = image_folder(parts[name], classes=classes, only=only)
        classes = source.classes
        read = [f"read from {parts[name]}"] if parts[name] != path / name else []
        opened[name] = replace(source, notes=(*read, *source.notes))
    if beside := [entry.name for entry in entries if entry not in parts.values()]:
        note = f"left out, beside the splits: {len(beside):,} ({abbreviate(beside)})"
        opened[wanted[0]] = replace(opened[wanted[0]], notes=(*opened[wanted[0]].notes, note))
    return opened


def split_folders(path: Path) -> Mapping[str, Path]:
    """Return the folder of each split in a folder; those that there are.

    Raises:
        ConfigError: There is no such folder, or several may be one split.
    """
    return _splits(path, [entry for entry in _entries(path) if entry.is_dir()])


def _open_classes(path: Path, folders: Sequence[Path], split: str | None, only: Sequence[str]) -> dict[str, DataSource]:
    if len(folders) == 1 and _holds_only_folders(folders[0]):
        raise ConfigError(
            f"{path} has one folder, {folders[0].name}, which holds folders only: "
            f"{abbreviate(entry.name for entry in _entries(folders[0]))}. If these are the classes, give {folders[0]}."
        )
    class_folders(path)
    if not only:  # whoever names them knows that they are classes
        _refuse_splits_as_classes(path, folders)
    if split is None:
        raise ConfigError(f"{path} has no train/ and val/, so it is a single split. Add --split train or --split val.")
    return {split: image_folder(path, only=only)}


def _refuse_splits_as_classes(path: Path, folders: Sequence[Path]) -> None:
    """Refuse class folders that are splits by the words in their names, or that hold folders called like splits."""
    named: dict[str, list[Path]] = {}
    for folder in folders:
        words = splits_in(_WORD_END.sub(" ", folder.name))
        if len(words) == 1 and _holds_only_folders(folder):
            named.setdefault(words[0], []).append(folder)
    if len(named) > 1:
        ours, _ = as_ours(named)
        commands = [
            shlex.join(["rsb-cluster", "shards", "make", str(found[0]), "DEST", "--split", split])
            for split, found in ours.items()
        ]
        raise ConfigError(
            f"the folders of {path} have the names of splits, and not of classes: "
            f"{', '.join(folder.name for found in named.values() for folder in found)}. Call them train and val, or "
            f"make each alone: {'; '.join(commands)}. If they are classes, name them with --classes."
        )
    for folder in folders:
        if (train := _inside(folder, _NAMES["train"])) and (other := _inside(folder, (*_NAMES["val"], *_TEST))):
            raise ConfigError(
                f"the class folders of {path} hold splits, which would be made one: {train.relative_to(path)}, "
                f"{other.relative_to(path)}. Put the splits above the classes: train/CLASS and val/CLASS."
            )


def _inside(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the first of some folders that is in a folder, without listing it: a class may have a million images."""
    spelled = (folder / spelling for name in names for spelling in (name, name.capitalize(), name.upper()))
    return next(filter(Path.is_dir, spelled), None)


def _splits(path: Path, folders: Sequence[Path]) -> Mapping[str, Path]:
    """Return the folder of each split that there is; empty if the folders are classes."""
    exact = {folder.name: folder for folder in folders if folder.name in SPLITS}
    if len(exact) == len(SPLITS):
        return exact
    # Folders that are all called like splits are no classes; else a split is one that holds classes and no images.
    all_splits = all(folder.name.lower() in _ALL_NAMES for folder in folders)
    likely = [folder for folder in folders if folder.name.lower() in _ALL_NAMES]
    if not all_splits:
        likely = [folder for folder in likely if _holds_only_folders(folder)]
    found = {split: exact.get(split) or _one_of(path, likely, split, names) for split, names in _NAMES.items()}
    found["val"] = found["val"] or _one_of(path, likely, "val", _TEST)
    return {split: folder for split, folder in found.items() if folder is not None and folder in likely}


def _one_of(path: Path, folders: Sequence[Path], split: str, names: Sequence[str]) -> Path | None:
    found = [folder for folder in folders if folder.name.lower() in names]
    if len(found) > 1:
        raise ConfigError(
            f"{path} has {len(found)} folders that may be {split}: {', '.join(folder.name for folder in found)}. "
            f"Call the one to use {split}."
        )
    return found[0] if found else None


def _refuse_missing(path: Path, folders: Sequence[Path], missing: str) -> None:
    other = "val" if missing == "train" else "train"
    names = (*_NAMES[missing], *(_TEST if missing == "val" else ()))
    raise ConfigError(
        f"{path} has no folder for {missing}, which may be called {', '.join(names)}; its folders are "
        f"{', '.join(folder.name for folder in folders)}. To make {other} alone, add --split {other}."
    )


def _unwrapped(path: Path) -> Path:
    """Return the folder with the splits: the given one, or one that is alone in it."""
    inner = path
    for _ in range(_WRAPPERS):
        folders = [entry for entry in _entries(inner) if entry.is_dir()]
        if any(folder.name.lower() in _ALL_NAMES for folder in folders):
            return inner
        if len(folders) != 1 or not _holds_only_folders(inner):
            return path
        inner = folders[0]
    return path


def _holds_only_folders(path: Path) -> bool:
    """Whether a folder holds folders and no image next to them."""
    entries = _entries(path)
    return any(map(Path.is_dir, entries)) and not any(is_readable(extension_of(entry.name)) for entry in entries)


def _entries(path: Path) -> list[Path]:
    if not path.is_dir():
        class_folders(path)  # says why not
    return sorted(entry for entry in path.iterdir() if not is_debris(entry.name))
