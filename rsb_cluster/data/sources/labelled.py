"""Images whose classes are in a table: files in any folders, or tars without classes, as img2dataset writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from rsb_cluster.data.image_files import IMAGE_EXTENSIONS, SNIFFED_BYTES, sniff, stored_extension
from rsb_cluster.data.indexing import is_like_shard
from rsb_cluster.data.left_out import LeftOut, is_debris_member
from rsb_cluster.data.scan import ShardScan, leave_out, members_of, refuse_sparse, split_name, url_in_json
from rsb_cluster.data.sources.label_table import LabelTable, plain
from rsb_cluster.data.sources.layout import split_folders
from rsb_cluster.data.sources.parquet_files import abbreviate
from rsb_cluster.data.sources.source import SPLITS, DataSource, Sample, extension_of, safe_keys
from rsb_cluster.data.sources.tree import ImageTree
from rsb_cluster.errors import ConfigError


@dataclass(frozen=True)
class _Image:
    """An image that may have a label.

    Attributes:
        split: The split in whose folder it lies.
        file: Its file below that folder, or the tar.
        path: What it is called: its path below the split's folder, or in the tar.
        url: Where it was downloaded from, in img2dataset's JSON; empty if unknown.
        offset: Its first byte in the tar; -1 if it is a file.
        size: Bytes.
    """

    split: str
    file: str
    path: str
    size: int
    url: str = ""
    offset: int = -1


_BESIDE_TARS = "beside the tars, which are read"
_NO_TAR = "compressed, or no file called *.tar"
_DOTS = "an image whose key would end at the first of several dots"

# How a table may name an image, the most exact first.
_Name = Callable[[_Image], str]
_NAMES: Sequence[_Name] = (
    lambda image: f"{image.split}/{image.path}",
    lambda image: image.path,
    lambda image: image.url,
    lambda image: image.path.rpartition(".")[0],
    lambda image: PurePosixPath(image.path).name,
    lambda image: PurePosixPath(image.path).name.partition(".")[0],
)


@dataclass(frozen=True)
class _ReadImage:
    """Reads entries of (key, extension, class, file, first byte, size)."""

    folder: Path

    def __call__(self, entry: tuple[str, str, int, str, int, int]) -> Sample:
        key, extension, label, file, offset, size = entry
        with (self.folder / file).open("rb") as opened:
            opened.seek(max(0, offset))
            content = opened.read(size if offset >= 0 else -1)
        if len(content) != size:
            raise ConfigError(f"{self.folder / file} has changed, or ends inside of '{key}'. Copy it again.")
        return key, content, stored_extension(extension or sniff(content[:SNIFFED_BYTES])), label


def labelled_set(path: Path, split: str | None, table: LabelTable) -> dict[str, DataSource]:
    """Open images whose classes are in a table.

    Images that the table does not name are left out; their number, and that of rows without an image, are in the notes.

    Args:
        path: A folder with one for each split, called as data sets call them; or that of the split that is named.
        split: ``train`` or ``val``; None for both.
        table: The labels.

    Raises:
        ConfigError: No image has a label, or it is unclear which image a row names.
    """
    folders = dict(split_folders(path))
    if len(folders) < len(SPLITS) and split not in folders:
        if split is None:
            raise ConfigError(f"{path} has no train/ and val/, so it is a single split. Add --split train or val.")
        folders = {split: path}
    left_out = {name: LeftOut() for name in folders}
    found = [image for name, folder in folders.items() for image in _images(name, folder, left_out[name])]
    # Paths may also begin at the folder above, or at the root.
    above: tuple[_Name, ...] = (
        lambda image: f"{folders[image.split].absolute()}/{image.path}",
        lambda image: f"{folders[image.split].absolute().name}/{image.path}",
    )
    name_of = max((*_NAMES, *above), key=lambda name: sum(_known(table, name(image)) for image in found))
    labelled = [image for image in found if _known(table, name_of(image))]
    if not labelled:
        what = (
            f"whose column '{table.column}' begins with '{next(iter(table.labels))}'; the first image is "
            f"'{found[0].path}'. Write such paths into the table, or choose another column with --key-column NAME."
            if found
            else f"as there is no image. Check {path}."
        )
        more = (note for counted in left_out.values() for note in counted.notes())
        raise ConfigError("\n".join((f"no image in {path} has a label in {table.file}, {what}", *more)))
    _refuse_same_names(labelled, name_of, table)
    named = {plain(name_of(image)) for image in labelled}
    surplus = [name for name in table.labels if name not in named]
    notes = [f"rows of {table.file.name} without an image: {len(surplus):,} ({abbreviate(surplus)})"] if surplus else []
    if table.unlabelled:
        notes.append(f"rows of {table.file.name} without a name or a label: {table.unlabelled:,}")
    sources = {}
    for name, folder in folders.items():
        if split in (None, name):
            chosen = [(image, table.labels[plain(name_of(image))]) for image in labelled if image.split == name]
            missing = [image.path for image in found if image.split == name and not _known(table, name_of(image))]
            lacks = (
                [f"images without a label are left out: {len(missing):,} ({abbreviate(missing)})"] if missing else []
            )
            if not chosen and split is None:
                (alone,) = set(folders) - {name}
                raise ConfigError(
                    f"no image in {folder} has a label in {table.file}. To make {alone} alone, add --split {alone}."
                )
            read = [f"read from {folder}"] if folder not in (path, path / name) else []
            source = _source(name, folder, table, chosen)
            sources[name] = replace(source, notes=(*read, *left_out[name].notes(), *lacks, *notes))
    return sources


def label_scans(
    table: LabelTable, part: str, shards: Iterable[str], scans: Sequence[ShardScan]
) -> tuple[list[ShardScan], list[str]]:
    """Give scanned shards the classes of a table.

    Args:
        table: The labels.
        part: Name of the split; empty if it is unknown.
        shards: The file names of the shards.
        scans: The scan of each, without classes.

    Returns:
        The scans, and notes.

    Raises:
        ConfigError: An image has no label, as an index has all images of a shard; or it is unclear which image a row
            names.
    """
    found = [
        _Image(part, s, path, 0, url, 0) for s, scan in zip(shards, scans, strict=True) for path, url in scan.images
    ]
    name_of = max(_NAMES, key=lambda name: sum(_known(table, name(image)) for image in found))
    missing = [image.path for image in found if not _known(table, name_of(image))]
    if missing:
        raise ConfigError(
            f"{len(missing):,} of {len(found):,} images have no label in {table.file}, whose column '{table.column}' "
            f"begins with '{next(iter(table.labels))}': {abbreviate(missing)}. An index has all images of a shard. Add "
            "them to the table, choose another column with --key-column NAME, or make shards of the others: "
            "'shards make --labels'."
        )
    _refuse_same_names(found, name_of, table)
    labels = iter([table.labels[plain(name_of(image))] for image in found])
    labelled = [
        replace(scan, labels=np.array([next(labels) for _ in scan.keys], dtype=np.int32), images=()) for scan in scans
    ]
    rows = len(table.labels)
    return labelled, [f"the classes are those of {table.file.name}: {len(found):,} of its {rows:,} rows"]


def _source(split: str, folder: Path, table: LabelTable, chosen: list[tuple[_Image, int]]) -> DataSource:
    if empty := [image.path for image, _ in chosen if not image.size]:
        raise ConfigError(f"{folder}: {len(empty):,} images are empty: {abbreviate(empty)}. Restore or remove them.")
    paths = [image.path for image, _ in chosen]
    if len(set(paths)) < len(paths):  # each tar counts from 0
        paths = [f"{image.file.rpartition('.')[0]}/{image.path}" for image, _ in chosen]
    entries = [
        (key, extension_of(image.path), label, image.file, image.offset, image.size)
        for key, (image, label) in zip(safe_keys(paths), chosen, strict=True)
    ]
    return DataSource(
        f"images in {folder} with the labels of {table.file.name}, {split}",
        table.classes,
        entries,
        _ReadImage(folder),
        sizes=[image.size for image, _ in chosen],
        folder=folder,
        show=lambda entry: str(entry[3] if entry[4] < 0 else entry[0]),
    )


def _known(table: LabelTable, name: str) -> bool:
    return bool(name) and plain(name) in table.labels


def _refuse_same_names(labelled: Sequence[_Image], name_of: _Name, table: LabelTable) -> None:
    first: dict[str, _Image] = {}
    for image in labelled:
        other = first.setdefault(plain(name_of(image)), image)
        if other is not image:
            where = [
                f"{one.split}/{one.path}" if one.offset < 0 else f"{one.file}: {one.path}" for one in (other, image)
            ]
            raise ConfigError(
                f"'{name_of(image)}' in {table.file} names several images: {' and '.join(where)}. Write their paths "
                "into the table."
            )


def _images(split: str, folder: Path, left_out: LeftOut) -> list[_Image]:
    """Return the images of a split: those in tars, if there are tars, else files."""
    tree = ImageTree(folder)
    files = [_Image(split, file, file, size) for file, size in tree.images()]
    tars = sorted(path.name for path in folder.glob("*.tar") if not path.name.startswith(".") and path.is_file())
    if not tars:
        left_out.merge(tree.left_out)
        return files
    for file in files:
        left_out.add(_BESIDE_TARS, file.path)
    for other in sorted({path.name for path in folder.iterdir() if is_like_shard(path.name)}.difference(tars)):
        left_out.add(_NO_TAR, other)
    return [image for name in tars for image in _tar_images(split, folder, name, left_out)]


def _tar_images(split: str, folder: Path, name: str, left_out: LeftOut) -> list[_Image]:
    found: list[_Image] = []
    urls: dict[str, str] = {}
    url = str(folder / name)
    seen = LeftOut()
    with closing(members_of((folder / name).open("rb"), url)) as members:
        for member, content in members:
            parts = split_name(member.name) if member.isreg() else None
            if parts is None or is_debris_member(member.name):
                leave_out(member, url, (), seen)
                continue
            key, extension = parts
            if extension in IMAGE_EXTENSIONS:
                refuse_sparse(member, url)
                found.append(_Image(split, name, member.name, member.size, key, member.offset_data))
            elif extension == "json":
                urls[key] = url_in_json(content())
            elif extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                seen.add(_DOTS, member.name)
    left_out.merge(seen, f"{name}: ")
    return [replace(image, url=urls.get(image.url, "")) for image in found]
