"""Images as files in folders."""

from __future__ import annotations

import shlex
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from stat import S_ISREG

from rsb_cluster.data.image_files import IMAGE_EXTENSIONS, SNIFFED_BYTES, sniff, stored_extension
from rsb_cluster.data.left_out import printable
from rsb_cluster.data.sources.source import DataSource, Sample, extension_of, safe_keys
from rsb_cluster.data.sources.tree import ImageTree
from rsb_cluster.data.spelling import same_name, spelled
from rsb_cluster.data.split_folder import abbreviate
from rsb_cluster.data.subset import class_numbers
from rsb_cluster.errors import ConfigError, is_text


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
        return key, content, stored_extension(extension_of(file) or sniff(content[:SNIFFED_BYTES])), label


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
        ConfigError: A file does not exist, or is empty.
    """
    keys = safe_keys([file for file, _ in files])
    entries = [(key, file, label) for key, (file, label) in zip(keys, files, strict=True)]
    known = array("q", sizes or (_size(folder / file) for file, _ in files))
    if 0 in known:
        empty = [file for (file, _), size in zip(files, known, strict=True) if not size]
        raise ConfigError(
            f"{description}: {len(empty):,} files are empty: {abbreviate(map(printable, empty))}. "
            "Restore them, or remove them."
        )
    return DataSource(description, tuple(classes), entries, _ReadFile(folder), sizes=known, show=itemgetter(1))


def class_folders(path: Path) -> tuple[str, ...]:
    """Return the names of a folder's sub-folders, sorted; hidden ones and those of systems and tools are left out.

    Raises:
        ConfigError: There is no such folder, it has no sub-folders, or two of them are not two classes.
    """
    return _class_folders(ImageTree(path), path)


def image_folder(
    path: Path, *, classes: Sequence[str] = (), names: Sequence[str] = (), only: Sequence[str] = ()
) -> DataSource:
    """Open a folder of images with one sub-folder per class, as torchvision's ``ImageFolder`` does.

    Image files are kept as they are. Folders may be nested below the class. What is left out is in the source's notes:
    hidden files (such as macOS's ``._x.jpg``), those of systems and tools, and those that are no images.

    Args:
        path: The folder.
        classes: The names of the class folders, in the order of their numbers; if empty, those found, sorted.
        names: Names of the classes, if they differ from the folders.
        only: The class folders to read; if empty, all. They need not be in this order.

    Raises:
        ConfigError: There is no class folder, one of ``only`` is missing, one is not in ``classes``, one of those found
            has no image, or an image is an empty file.
    """
    tree = ImageTree(path)
    found = {same_name(name): name for name in _class_folders(tree, path)}
    for name in found.values():
        if not is_text(name):
            raise ConfigError(f"{path}: the name of the class folder {name!r} is not UTF-8. Rename it.")
    others: list[str] = []
    if only:
        if not classes:
            class_numbers(only, tuple(found.values()), str(path))  # says which is missing
        others = [name for key, name in found.items() if key not in set(map(same_name, only))]
        found = {key: name for key, name in found.items() if name not in others}
    folders = tuple(classes) or tuple(found.values())
    unknown = sorted(found.keys() - set(map(same_name, folders)))
    if unknown:
        raise ConfigError(
            f"{path} has {len(unknown)} class folders that are missing in train: "
            f"{', '.join(spelled(found[name]) for name in unknown[:5])}. "
            "Give both the same class folders, or remove these."
        )
    files: list[tuple[str, int]] = []
    sizes = array("q")
    for label, name in enumerate(folders):
        for file, size in tree.images(found[same_name(name)]) if same_name(name) in found else ():
            files.append((file, label))
            sizes.append(size)
    counts = Counter(label for _, label in files)
    empty = [name for label, name in enumerate(folders) if not counts[label]]
    notes = tuple(tree.left_out.notes())
    if others:
        notes = (f"class folders that are not chosen: {len(others):,} ({abbreviate(map(printable, others))})", *notes)
    if files and empty and not classes:
        raise ConfigError(
            "\n".join(
                (
                    f"{len(empty)} class folders in {path} have no image: {', '.join(map(spelled, empty[:5]))}. "
                    "Remove them, fill them, or name the others with --classes.",
                    *notes,
                )
            )
        )
    if not files:
        what = f"{path} has no image in its class folders. Extensions of images: {', '.join(IMAGE_EXTENSIONS)}."
        raise ConfigError("\n".join((what, *notes)))
    source = file_source(f"images in {path}", tuple(names) or folders, path, files, sizes)
    return replace(source, folder=path, notes=notes)


def images(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the image files below a folder, in a fixed order, and their sizes in bytes (see `ImageTree`)."""
    return ((folder / file, size) for file, size in ImageTree(folder).images())


def _class_folders(tree: ImageTree, path: Path) -> tuple[str, ...]:
    if not path.exists():
        raise ConfigError(f"there is no folder {path}. Check the path.")
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder. If it is an archive, unpack it and give the folder with the images.")
    classes = tree.classes()
    if not classes:
        tars = any(path.glob("*.tar"))
        index = f"rsb-cluster shards index {shlex.quote(str(path))}"
        hint = f" If its .tar files are shards, run: {index}" if tars else ""
        raise ConfigError(
            "\n".join(
                (
                    f"{path} has no sub-folders. It needs one folder of images for each class, or a table with the "
                    f"class of each image (--labels FILE.csv).{hint}",
                    *tree.left_out.notes(),
                )
            )
        )
    return classes


def _size(file: Path) -> int:
    try:
        found = file.stat()
    except OSError as error:
        raise ConfigError(f"cannot read the image {file}: {error.strerror}. Check it.") from error
    if not S_ISREG(found.st_mode):  # never opened: a pipe would wait for ever
        raise ConfigError(f"the image {file} is no regular file. Restore it, or take it out of the list.")
    return found.st_size
