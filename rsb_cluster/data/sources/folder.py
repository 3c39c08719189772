"""Images as files in folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rsb_cluster.data.scan import IMAGE_EXTENSIONS
from rsb_cluster.data.sources.source import Sample, Source, extension_of, safe_keys
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


def listed_files(description: str, classes: Sequence[str], folder: Path, files: Iterable[tuple[str, int]]) -> Source:
    """Return the source of files that are named, below a folder, with their classes; they are kept as they are."""
    named = list(files)
    keys = safe_keys([file for file, _ in named])
    entries = [(key, file, label) for key, (file, label) in zip(keys, named, strict=True)]
    return Source(description, tuple(classes), entries, _ReadFile(folder))


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


def image_folder(path: Path, *, classes: Sequence[str] = (), names: Sequence[str] = ()) -> Source:
    """Open a folder of images with one sub-folder per class, as torchvision's ``ImageFolder`` does.

    Image files are kept as they are. Folders may be nested below the class. Files without an image's extension and
    hidden files (macOS leaves ``._x.jpg`` behind) are passed over.

    Args:
        path: The folder.
        classes: The names of the class folders, in the order of their numbers; where empty, those found, sorted.
        names: What the classes are to be called, if not as their folders.

    Raises:
        ConfigError: There is no class folder, one that is not in ``classes``, or one of the found ones has no image.
    """
    found = class_folders(path)
    folders = tuple(classes) or found
    unknown = sorted(set(found) - set(folders))
    if unknown:
        raise ConfigError(
            f"{path} has {len(unknown)} class folders that train lacks: {', '.join(unknown[:5])}. "
            "Give both the same class folders, or remove these."
        )
    files = [
        (file.relative_to(path).as_posix(), label) for label, name in enumerate(folders) for file in images(path / name)
    ]
    counts = Counter(label for _, label in files)
    empty = [name for label, name in enumerate(folders) if not counts[label]]
    if empty and not classes:
        raise ConfigError(
            f"{len(empty)} class folders in {path} have no image: {', '.join(empty[:5])}. Remove them, or fill them."
        )
    if not files:
        raise ConfigError(f"{path} has no image in its class folders. Images end in: {', '.join(IMAGE_EXTENSIONS)}.")
    return listed_files(f"images in {path}", tuple(names) or folders, path, files)


def images(folder: Path) -> Iterator[Path]:
    """Yield the image files below a folder, in a fixed order."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in sorted(files):
            if extension_of(name) in IMAGE_EXTENSIONS and not _is_hidden(name):
                yield Path(parent, name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
