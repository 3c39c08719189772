"""Image data sets of the Hugging Face Hub as parquet files on disk: the one place that uses pyarrow."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rsb_cluster.data.scan import IMAGE_EXTENSIONS
from rsb_cluster.data.sources.source import DataSource, Sample, extension_of, safe_keys
from rsb_cluster.errors import ConfigError

# Names of a file, or of a folder above it, for each of our splits; the first that exists is used.
_SPLIT_NAMES = {"train": ("train", "training"), "val": ("validation", "valid", "val", "dev", "test")}
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "target")
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp", b"GIF8": "gif"} | dict.fromkeys(
    (b"II*\0", b"MM\0*"), "tiff"
)


def is_parquet(root: Path) -> bool:
    """Whether a folder holds parquet files, and not images: the first file found decides."""
    files = (file for _, _, names in os.walk(root) for file in names)
    first = next((file for file in files if extension_of(file) in (*IMAGE_EXTENSIONS, "parquet")), "")
    return extension_of(first) == "parquet"


def parquet_splits(root: Path) -> list[str]:
    """Return those of our splits that occur in the names of the files."""
    return [split for split in _SPLIT_NAMES if _files(root, split)]


def parquet(root: Path, split: str) -> DataSource:
    """Open a split of a parquet image data set, as ``datasets`` writes it: an image and a label column.

    The images are structs of ``bytes`` and ``path``, or bytes alone; labels are integers or names. Class names are read
    from the metadata of ``datasets`` in the files, if present. A key is the image's path if all paths are unique, else
    its position.

    Raises:
        ConfigError: pyarrow is missing, the split has no files, or they are not as described.
    """
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ConfigError("reading parquet files needs pyarrow. Use pip install 'rsb-cluster[parquet]'.") from error

    files = _files(root, split) or (sorted(root.rglob("*.parquet")) if not parquet_splits(root) else [])
    if not files:
        raise ConfigError(f"no .parquet file in {root} is named {' or '.join(_SPLIT_NAMES[split])}. Check --split.")
    schema = pq.read_schema(files[0])
    image, label, names = _columns(schema, files[0])
    has_path = any(field.name == "path" for field in _struct(schema.field(image).type))
    rows: list[tuple[str, int, int]] = []
    labels: list[Any] = []
    paths: list[str | None] = []
    blocks: list[int] = []
    for file in files:
        opened = pq.ParquetFile(file)
        name = file.relative_to(root).as_posix()
        for group in range(opened.num_row_groups):
            table = opened.read_row_group(group, columns=[label, f"{image}.path"] if has_path else [label])
            labels += table[label].to_pylist()
            paths += [value["path"] for value in table[image].to_pylist()] if has_path else [None] * len(table)
            rows += [(name, group, row) for row in range(len(table))]
            blocks.append(len(table))
    numbers, classes = _numbered(labels, names, f"the column '{label}' of {root}")
    keys = _keys(paths, split)
    entries = [(key, number, *row) for key, number, row in zip(keys, numbers, rows, strict=True)]
    packed = {file.relative_to(root).as_posix(): file.stat().st_size for file in files}
    read = _ReadRow(root, image)
    return DataSource(f"parquet files in {root}, {split}", classes, entries, read, tuple(blocks), packed=packed)


@dataclass(frozen=True)
class _ReadRow:
    """Reads entries of (key, class, file, row group, row). Entries in their order read each row group once."""

    root: Path
    column: str

    def __call__(self, entry: tuple[str, int, str, int, int]) -> Sample:
        key, label, file, group, row = entry
        value = _row_group(self.root / file, group, self.column)[row].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        extension = next((e for magic, e in _MAGIC.items() if content and content.startswith(magic)), "")
        if not extension:
            found = "no bytes (only a path?)" if not content else "no image of a known format"
            raise ConfigError(f"{self.root / file}: row {row} of row group {group} has {found} in '{self.column}'.")
        return key, content, extension, label


@lru_cache(maxsize=1)
def _row_group(file: Path, group: int, column: str) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file).read_row_group(group, columns=[column])[column]


def _files(root: Path, split: str) -> list[Path]:
    found = sorted(root.rglob("*.parquet"))
    for name in _SPLIT_NAMES[split]:
        word = re.compile(rf"(^|[^a-z]){name}([^a-z]|$)", re.IGNORECASE)
        chosen = [file for file in found if word.search(file.relative_to(root).as_posix())]
        if chosen:
            return chosen
    return []


def _columns(schema: Any, file: Path) -> tuple[str, str, tuple[str, ...]]:
    """Return the image column, the label column, and the class names, empty if unknown."""
    import pyarrow as pa

    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    images = [
        field.name
        for field in schema
        if any(part.name == "bytes" for part in _struct(field.type))
        or pa.types.is_binary(field.type)
        or pa.types.is_large_binary(field.type)
    ]
    labels = [name for name in _LABEL_COLUMNS if name in schema.names]
    labels += [n for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"]
    if not images or not labels:
        raise ConfigError(
            f"{file} has no {'image' if not images else 'label'} column; its columns are {', '.join(schema.names)}. "
            f"Images are bytes, or structs with bytes; a label column has one of the names {', '.join(_LABEL_COLUMNS)}."
        )
    image = "image" if "image" in images else "img" if "img" in images else images[0]
    names = features.get(labels[0], {}).get("names", ())
    return image, labels[0], tuple(map(str, names))


def _struct(kind: Any) -> Sequence[Any]:
    import pyarrow as pa

    return [kind.field(i) for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []


def _numbered(labels: list[Any], names: tuple[str, ...], where: str) -> tuple[list[int], tuple[str, ...]]:
    """Return a class number for each label, and the names of the classes."""
    if labels and all(isinstance(label, str) for label in labels):
        classes = names or tuple(sorted(set(labels)))
        number = {name: i for i, name in enumerate(classes)}
        return [number[label] for label in labels], classes
    bad = [label for label in labels if not isinstance(label, int) or label < 0]
    if bad:
        raise ConfigError(f"{where} holds {bad[0]!r}, which is not a class. A split without labels cannot be used.")
    return labels, names


def _keys(paths: list[str | None], split: str) -> list[str]:
    named = [path.lstrip("/") for path in paths if path and extension_of(path) in IMAGE_EXTENSIONS]
    if len(named) == len(paths) and max(Counter(named).values(), default=0) == 1:
        return safe_keys(named)
    return [f"{split}-{i:07d}" for i in range(len(paths))]
