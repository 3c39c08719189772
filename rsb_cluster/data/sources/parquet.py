"""Image data sets of the Hugging Face Hub as parquet files on disk: the one place that uses pyarrow."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rsb_cluster.data.image_files import SNIFFED_BYTES, sniff
from rsb_cluster.data.scan import MAX_CLASS
from rsb_cluster.data.sources.parquet_files import ParquetFiles, abbreviate, parquet_files, visible_parquet
from rsb_cluster.data.sources.source import DataSource, Sample, extension_of, safe_keys
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import LFS_POINTER

_LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label", "class", "cls", "target")
_IMAGE_COLUMNS = ("image", "img")
# Of the paths that become keys. It never grows, whatever else is read: a set has the same keys, and so the same digest
# and the same runs, in all versions.
_KEY_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff", "gif"))
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp", b"GIF8": "gif"} | dict.fromkeys(
    (b"II*\0", b"MM\0*"), "tiff"
)


@dataclass(frozen=True)
class ParquetChoice:
    """What the user chooses where parquet files leave it open; empty fields are found out.

    Attributes:
        config: The configuration (see `rsb_cluster.data.sources.parquet_files.parquet_files`).
        image_column: Name of the column of images.
        label_column: Name of the column of classes.
    """

    config: str = ""
    image_column: str = ""
    label_column: str = ""

    def __bool__(self) -> bool:
        return bool(self.config or self.image_column or self.label_column)


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str
    has_path: bool
    names: tuple[str, ...]  # of the classes, empty if unknown
    notes: tuple[str, ...] = ()


def is_parquet(root: Path) -> bool:
    """Whether a folder is a data set of parquet files: one without images, or with images in the parquet files."""
    files, images = visible_parquet(root)
    if not files or not images:
        return bool(files)
    try:
        import pyarrow  # noqa: F401

        return bool(_image_columns(_schema(files[0])))
    except (ModuleNotFoundError, ConfigError):
        return True


def parquet_set(
    root: Path, split: str | None = None, choice: ParquetChoice | None = None, any_count: bool = False
) -> dict[str, DataSource]:
    """Open the splits of a parquet image data set, as ``datasets`` writes it: an image and a label column.

    The images are structs of ``bytes`` and ``path``, or bytes alone; labels are integers, names or truth values. Class
    names are read from the metadata of ``datasets`` in the files, if present. A key is the image's path if all paths
    are unique, else its position.

    Args:
        root: The folder.
        split: ``train`` or ``val`` for one of them; None for all that there are.
        choice: The configuration and the columns.
        any_count: Accept missing parts, and another number of rows than the data set's card has.

    Raises:
        ConfigError: pyarrow is missing, the split has no files, or they are not as described.
    """
    _require_pyarrow()
    choice = choice or ParquetChoice()
    found = parquet_files(root, choice.config, any_count)
    if split is None and "" in found.splits:
        raise ConfigError(f"the names of the .parquet files in {root} do not tell their split. Add --split.")
    if split is not None and not found.of(split):
        there = ", ".join(found.splits)
        raise ConfigError(f"no .parquet file in {root} is of {split}; there is {there}. Check --split.")
    return {name: _source(found, name, choice, any_count) for name in ([split] if split else found.splits)}


def read_table(file: Path) -> tuple[list[str], Iterator[Mapping[str, Any]]]:
    """Return the names of a file's columns, and its rows without columns of images.

    Raises:
        ConfigError: pyarrow is missing, or the file is damaged; also while the rows are read.
    """
    _require_pyarrow()
    import pyarrow.parquet as pq

    schema = _schema(file)
    names = [name for name in schema.names if name not in _image_columns(schema)]

    def rows() -> Iterator[Mapping[str, Any]]:
        with _file_errors(file):
            for batch in pq.ParquetFile(file).iter_batches(columns=names):
                yield from batch.to_pylist()

    return names, rows()


def _require_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError("reading parquet files needs pyarrow. Use pip install 'rsb-cluster[parquet]'.") from error


def _source(found: ParquetFiles, split: str, choice: ParquetChoice, any_count: bool) -> DataSource:
    root, files = found.root, found.of(split)
    columns = _same_columns(files, choice)
    rows: list[tuple[str, int, int]] = []
    labels: list[Any] = []
    paths: list[str | None] = []
    blocks: list[int] = []
    for file in files:
        name = file.relative_to(root).as_posix()
        for group, table in _label_groups(file, columns):
            labels += table[columns.label].to_pylist()
            paths += _paths(table, columns)
            rows += [(name, group, row) for row in range(len(table))]
            blocks.append(len(table))
    expected = found.samples.get(split, len(rows))
    if len(rows) != expected and not any_count:
        raise ConfigError(
            f"{root}: {split} has {len(rows):,} rows, and README.md says {expected:,}. Was a download interrupted? To "
            "use them anyway, pass --any-count."
        )
    names = columns.names
    if not names and any(isinstance(label, str) for label in labels):
        # Those of train: a class that val lacks must not shift the numbers of the others.
        names = _class_names(found.splits.get("train", files), choice)

    def where(i: int) -> str:
        name, group, row = rows[i]
        return f"row {row} of row group {group} in {root / name}"

    numbers, classes = _numbered(labels, names, columns.label, where)
    entries = [(key, n, *row) for key, n, row in zip(_keys(paths, split), numbers, rows, strict=True)]
    return DataSource(
        f"parquet files in {root}, {split}",
        classes,
        entries,
        _ReadRow(root, columns.image),
        tuple(blocks),
        packed={file.relative_to(root).as_posix(): file.stat().st_size for file in files},
        notes=(*found.notes, *columns.notes),
    )


@dataclass(frozen=True)
class _ReadRow:
    """Reads entries of (key, class, file, row group, row). Entries in their order read each row group once."""

    root: Path
    column: str

    def __call__(self, entry: tuple[str, int, str, int, int]) -> Sample:
        key, label, file, group, row = entry
        value = _row_group(self.root / file, group, self.column)[row].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        start = content[:SNIFFED_BYTES] if content else b""
        extension = next((e for magic, e in _MAGIC.items() if start.startswith(magic)), "") or sniff(start)
        if not extension:
            found = f"no image of a known format, but {start!r}" if start else "no bytes (only a path?)"
            raise ConfigError(
                f"{self.root / file}: row {row} of row group {group} has {found} in '{self.column}'. Correct or remove "
                "the row, or choose another column with --image-column NAME."
            )
        return key, content, extension, label


@lru_cache(maxsize=1)
def _row_group(file: Path, group: int, column: str) -> Any:
    import pyarrow.parquet as pq

    with _file_errors(file):
        return pq.ParquetFile(file).read_row_group(group, columns=[column])[column]


def _label_groups(file: Path, columns: _Columns) -> Iterator[tuple[int, Any]]:
    """Yield each row group of a file with its labels, and the paths of its images."""
    import pyarrow.parquet as pq

    wanted = [columns.label, f"{columns.image}.path"] if columns.has_path else [columns.label]
    with _file_errors(file):
        opened = pq.ParquetFile(file)
        for group in range(opened.num_row_groups):
            yield group, opened.read_row_group(group, columns=wanted)


def _paths(table: Any, columns: _Columns) -> list[str | None]:
    if not columns.has_path:
        return [None] * len(table)
    return [value["path"] if value else None for value in table[columns.image].to_pylist()]


def _class_names(files: Sequence[Path], choice: ParquetChoice) -> tuple[str, ...]:
    """Return the sorted names in the label column of some files."""
    columns = _same_columns(files, choice)
    names: set[str] = set()
    for file in files:
        for _, table in _label_groups(file, columns):
            names.update(label for label in table[columns.label].unique().to_pylist() if isinstance(label, str))
    return tuple(sorted(names))


# --- columns ---


def _same_columns(files: Sequence[Path], choice: ParquetChoice) -> _Columns:
    """Return the columns of the files; refuse files that differ in them."""
    first = _columns(_schema(files[0]), files[0], choice)
    for file in files[1:]:
        other = _columns(_schema(file), file, choice)
        if other != first:
            raise ConfigError(
                f"{file} has other columns or class names than {files[0]}: are they of one data set? Choose the files "
                "with --config 'PATTERN'."
            )
    return first


def _columns(schema: Any, file: Path, choice: ParquetChoice) -> _Columns:
    features = _features(schema)
    images = [name for name in _image_columns(schema) if features.get(name, {}).get("_type", "Image") == "Image"]
    labels = [name for name in _LABEL_COLUMNS if name in schema.names]
    labels += [n for n, f in features.items() if f.get("_type") == "ClassLabel" and n in schema.names]
    labels = list(dict.fromkeys(labels))
    image = _choose("image", images, _IMAGE_COLUMNS, choice.image_column, schema, file)
    label = _choose("label", labels, ("label",), choice.label_column, schema, file)
    names = features.get(label, {}).get("names") or ()
    notes = [f"columns that are not used: {', '.join(rest)}"] if (rest := _rest(images + labels, image, label)) else []
    has_path = any(field.name == "path" for field in _struct(schema.field(image).type))
    return _Columns(image, label, has_path, tuple(map(str, names)), tuple(notes))


def _rest(candidates: list[str], *used: str) -> list[str]:
    return [name for name in candidates if name not in used]


def _choose(kind: str, found: list[str], usual: Sequence[str], asked: str, schema: Any, file: Path) -> str:
    """Return the column of images or of classes."""
    if asked:
        if asked not in schema.names:
            raise ConfigError(f"{file} has no column '{asked}'; its columns are {', '.join(schema.names)}.")
        if kind == "image" and asked not in _image_columns(schema):
            raise ConfigError(
                f"the column '{asked}' of {file} has no bytes of images: it is {schema.field(asked).type}."
            )
        return asked
    if not found:
        raise ConfigError(
            f"{file} has no {kind} column; its columns are {', '.join(schema.names)}. Images are bytes, or structs "
            f"with bytes; a label column is called {' or '.join(_LABEL_COLUMNS)}, or named by --label-column."
        )
    preferred = [name for name in usual if name in found]
    if len(found) > 1 and len(preferred) != 1:
        raise ConfigError(
            f"{file} has several {kind} columns: {', '.join(found)}. Choose one with --{kind}-column NAME."
        )
    return preferred[0] if preferred else found[0]


def _features(schema: Any) -> Mapping[str, Mapping[str, Any]]:
    """Return the types of the columns that ``datasets`` keeps in the file."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        found = about.get("info", {}).get("features", {})
        return {name: value for name, value in found.items() if isinstance(value, dict)}
    except (ValueError, AttributeError):
        return {}


def _image_columns(schema: Any) -> list[str]:
    import pyarrow as pa

    return [
        field.name
        for field in schema
        if any(part.name == "bytes" for part in _struct(field.type))
        or pa.types.is_binary(field.type)
        or pa.types.is_large_binary(field.type)
    ]


def _struct(kind: Any) -> Sequence[Any]:
    import pyarrow as pa

    return [kind.field(i) for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []


def _schema(file: Path) -> Any:
    import pyarrow.parquet as pq

    with _file_errors(file):
        return pq.read_schema(file)


@contextmanager
def _file_errors(file: Path) -> Iterator[None]:
    """Turn pyarrow's errors into ours."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of the file system, and not about the content
            raise ConfigError(f"cannot read {file}: {os.strerror(error.errno)}. Check it.") from error
        with file.open("rb") as opened:
            is_pointer = opened.read(len(LFS_POINTER)) == LFS_POINTER
        if is_pointer:
            raise ConfigError(f"{file} is a pointer of Git LFS and not the file. Run: git lfs pull") from error
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"{file} is no complete parquet file: {said}. Download it again.") from error


# --- labels ---


def _numbered(
    labels: list[Any], names: tuple[str, ...], column: str, where: Callable[[int], str]
) -> tuple[list[int], tuple[str, ...]]:
    """Return a class number for each label, and the names of the classes."""
    if labels and all(isinstance(label, bool) for label in labels):
        return [int(label) for label in labels], names or ("False", "True")
    if any(isinstance(label, str) for label in labels):
        number = {name: i for i, name in enumerate(names)}
        bad = [i for i, label in enumerate(labels) if label not in number]
        why = f"none of the {len(names):,} classes ({abbreviate(names)})"
    else:
        limit = len(names) or MAX_CLASS + 1
        number = {}
        bad = [i for i, label in enumerate(labels) if type(label) is not int or not 0 <= label < limit]
        why = f"not a class from 0 to {limit - 1:,}"
    if bad:
        raise ConfigError(
            f"{where(bad[0])} holds {labels[bad[0]]!r} in '{column}', which is {why}; so do {len(bad):,} of "
            f"{len(labels):,} rows. A split without labels cannot be used; --label-column chooses another column."
        )
    return [number.get(label, label) for label in labels], names


def _keys(paths: list[str | None], split: str) -> list[str]:
    named = [path.lstrip("/") for path in paths if path and extension_of(path) in _KEY_EXTENSIONS]
    if len(named) == len(paths) and max(Counter(named).values(), default=0) == 1:
        return safe_keys(named)
    return [f"{split}-{i:07d}" for i in range(len(paths))]
