"""Images as files in folders."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

from rsb_cluster.data.scan import IMAGE_EXTENSIONS
from rsb_cluster.data.sources.source import DataSource, Sample, extension_of, safe_keys
from rsb_cluster.errors import ConfigError


@dataclass(frozen=True)
class _ReadFile:
    """Reads entries of (key, file below the folder, class)."""

    folder: Path

    def __call__(self, entry: tuple[str, str, int]) -> Sample:
        key, file, label = entry
        try:
            content = (self.folder / file).read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read the image {self.folder / file}: {error.strerror}. Check it.") from error
        return key, content, extension_of(file), label


def file_source(
    description: str, classes: Sequence[str], folder: Path, files: Sequence[tuple[str, int]], sizes: Sequence[int] = ()
) -> DataSource:
    """Return the source of given image files below a folder; they are kept as they are.

    Args:
        description: As in `DataSource`.
        classes: Names of the classes.
        folder: The folder.
        files: Paths below it, each with its class.
        sizes: Size of each file, bytes; if empty, it is determined here.

    Raises:
        ConfigError: A file does not exist.
    """
    keys = safe_keys([file for file, _ in files])
    entries = [(key, file, label) for key, (file, label) in zip(keys, files, strict=True)]
    known = array("q", sizes or (_size(folder / file) for file, _ in files))
    return DataSource(description, tuple(classes), entries, _ReadFile(folder), sizes=known, show=itemgetter(1))


def class_folders(path: Path) -> tuple[str, ...]:
    """Return the names of a folder's sub-folders, sorted; hidden ones are left out.

    Raises:
        ConfigError: There is no such folder, or it has no sub-folders.
    """
    if not path.is_dir():
        raise ConfigError(f"there is no folder {path}. Check the path.")
    classes = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not _is_hidden(entry.name)))
    if not classes:
        raise ConfigError(f"{path} has no sub-folders. It needs one folder of images for each class.")
    return classes


def image_folder(path: Path, *, classes: Sequence[str] = (), names: Sequence[str] = ()) -> DataSource:
    """Open a folder of images with one sub-folder per class, as torchvision's ``ImageFolder`` does.

    Image files are kept as they are. Folders may be nested below the class. Files without an image's extension and
    hidden files (such as macOS's ``._x.jpg``) are skipped.

    Args:
        path: The folder.
        classes: The names of the class folders, in the order of their numbers; if empty, those found, sorted.
        names: Names of the classes, if they differ from the folders.

    Raises:
        ConfigError: There is no class folder, one is not in ``classes``, or one of those found has no image.
    """
    found = class_folders(path)
    folders = tuple(classes) or found
    unknown = sorted(set(found) - set(folders))
    if unknown:
        raise ConfigError(
            f"{path} has {len(unknown)} class folders that are missing in train: {', '.join(unknown[:5])}. "
            "Give both the same class folders, or remove these."
        )
    files: list[tuple[str, int]] = []
    sizes = array("q")
    for label, name in enumerate(folders):
        for file, size in images(path / name):
            files.append((file.relative_to(path).as_posix(), label))
            sizes.append(size)
    counts = Counter(label for _, label in files)
    empty = [name for label, name in enumerate(folders) if not counts[label]]
    if empty and not classes:
        raise ConfigError(
            f"{len(empty)} class folders in {path} have no image: {', '.join(empty[:5])}. Remove them, or fill them."
        )
    if not files:
        raise ConfigError(
            f"{path} has no image in its class folders. Extensions of images: {', '.join(IMAGE_EXTENSIONS)}."
        )
    source = file_source(f"images in {path}", tuple(names) or folders, path, files, sizes)
    return replace(source, folder=path)


def images(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the image files below a folder, in a fixed order, and their sizes in bytes.

    Each size is read right after its folder was listed: network file systems return both in one response.

    Raises:
        ConfigError: A file is a dangling link.
    """
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in sorted(files):
            if extension_of(name) in IMAGE_EXTENSIONS and not _is_hidden(name):
                file = Path(parent, name)
                yield file, _size(file)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise ConfigError(f"cannot read the image {file}: {error.strerror}. Check it.") from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
