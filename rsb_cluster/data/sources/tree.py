"""Walks folders of images: links are followed, no folder is read twice, and what is left out is counted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rsb_cluster.data.image_files import SNIFFED_BYTES, UNREAD_EXTENSIONS, is_readable, sniff
from rsb_cluster.data.left_out import DEBRIS, LeftOut, is_debris, printable
from rsb_cluster.data.sources.source import extension_of
from rsb_cluster.data.spelling import same_name, spelled
from rsb_cluster.errors import ConfigError

LOOSE = "in no class folder"
_AGAIN = "a link to a folder that is read anyway"
_SPECIAL = "no regular file"


class ImageTree:
    """A folder with a sub-folder for each class.

    Attributes:
        left_out: What is left out, by paths below the folder.

    Raises:
        ConfigError: There is no such folder, or it cannot be listed.
    """

    def __init__(self, root: Path) -> None:
        self.left_out = LeftOut()
        self._root = root
        self._prefix = os.path.join(root, "")  # noqa: PTH118 - of the paths of all entries
        self._real = Path(os.path.realpath(root))
        self._seen: set[tuple[int, int]] = set()  # device and inode of the folders that were read

    def classes(self) -> tuple[str, ...]:
        """Return the names of the class folders, sorted.

        Raises:
            ConfigError: Two of them are the same folder, or differ only in how they spell accents.
        """
        found: list[str] = []
        for entry in self._list(self._root):
            if _is_folder(entry):
                found.append(entry.name)
            else:
                self.left_out.add(LOOSE, entry.name)
        self._refuse_twins(found)
        for name in found:
            path = self._root / name
            if path.is_symlink() and self._is_read_anyway(path):
                raise ConfigError(
                    f"the class folder {path} is a link to {os.path.realpath(path)}, which is read as well: its images "
                    "would have two classes. Remove the link."
                )
        return tuple(found)

    def images(self, name: str = "") -> Iterator[tuple[str, int]]:
        """Yield the image files of a class folder, or of all, in a fixed order: the path below the root, size in bytes.

        Each size is read right after its folder was listed: network file systems return both in one response.

        Raises:
            ConfigError: A folder cannot be listed, or an image is a dangling link.
        """
        waiting = [os.path.join(self._root, name)]  # noqa: PTH118 - Path costs as much as the rest for each file
        while waiting:
            folder = waiting.pop()
            if not self._enter(folder):
                continue
            folders = []
            for entry in self._list(folder):
                if not _is_folder(entry):
                    if self._is_image(entry):
                        yield self._below(entry.path), _size(entry)
                elif entry.is_symlink() and self._is_read_anyway(Path(entry.path)):
                    self.left_out.add(_AGAIN, self._below(entry.path))
                else:
                    folders.append(entry.path)
            waiting += reversed(folders)

    def _list(self, folder: str | Path) -> list[os.DirEntry[str]]:
        """Return a folder's entries, sorted, without those that are none of the user's."""
        try:
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            raise ConfigError(f"cannot list the folder {folder}: {error.strerror}. Check it.") from error
        kept = [entry for entry in entries if not is_debris(entry.name)]
        if len(kept) < len(entries):
            for entry in entries:
                if is_debris(entry.name):
                    self.left_out.add(DEBRIS, self._below(entry.path))
        return kept

    def _enter(self, folder: str) -> bool:
        """Whether a folder has not been read before."""
        found = os.stat(folder)  # noqa: PTH116 - as above
        identity = found.st_dev, found.st_ino
        if identity in self._seen:
            self.left_out.add(_AGAIN, self._below(folder))
            return False
        self._seen.add(identity)
        return True

    def _is_read_anyway(self, link: Path) -> bool:
        """Whether a link leads to a folder above it, or to one that is read through its own name."""
        target = Path(os.path.realpath(link))
        if Path(os.path.realpath(link.parent)).is_relative_to(target):
            return True
        return target.is_relative_to(self._real) and not any(map(is_debris, target.relative_to(self._real).parts))

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        """Whether a file is an image that can be read; if not, it is counted."""
        extension = extension_of(entry.name)
        if entry.is_symlink() and not _is_reachable(entry):
            if is_readable(extension):
                target = printable(str(Path(entry.path).readlink()))
                raise ConfigError(
                    f"cannot read the image {entry.path}: it is a link to {target}, which does not exist or cannot be "
                    "reached. Restore that file, or remove the link."
                )
        elif not entry.is_file():
            self.left_out.add(_SPECIAL, self._below(entry.path))  # never opened: a pipe would wait for ever
            return False
        elif is_readable(extension) or (not extension and is_readable(_sniffed(entry.path))):
            return True
        self.left_out.add(_reason(extension), self._below(entry.path))
        return False

    def _below(self, path: str) -> str:
        return path[len(self._prefix) :]

    def _refuse_twins(self, names: Sequence[str]) -> None:
        """Refuse class folders whose names look the same, or that are the same folder."""
        spellings: dict[str, str] = {}
        folders: dict[tuple[int, int], str] = {}
        for name in names:
            found = (self._root / name).stat()
            looks = spellings.setdefault(same_name(name), name)
            is_one = folders.setdefault((found.st_dev, found.st_ino), name)
            if looks != name:
                raise ConfigError(
                    f"{self._root} has two class folders whose names look the same, and differ in their bytes: "
                    f"{spelled(looks)} and {spelled(name)}. Move the images of one into the other."
                )
            if is_one != name:
                raise ConfigError(
                    f"the class folders {is_one} and {name} in {self._root} are the same folder: its images would have "
                    "two classes. Remove one of them."
                )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_reachable(entry: os.DirEntry[str]) -> bool:
    try:
        entry.stat()
    except OSError:
        return False
    return True


def _reason(extension: str) -> str:
    if extension in UNREAD_EXTENSIONS or (extension in ("avif", "jp2") and not is_readable(extension)):
        return f".{extension}, which is not read: convert them, for example to PNG"
    return f".{extension}" if extension else "no extension, and no image by their first bytes"


def _sniffed(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return sniff(file.read(SNIFFED_BYTES))
    except OSError as error:
        raise ConfigError(f"cannot read the file {path}: {error.strerror}. Check it.") from error


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError as error:
        raise ConfigError(f"cannot read the image {entry.path}: {error.strerror}. Check it.") from error
