"""A table of labels: rows of what names an image (its key, URL or path) and its class."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsb_cluster.data.scan import MAX_CLASS
from rsb_cluster.data.sources.parquet import read_table
from rsb_cluster.data.spelling import same_name
from rsb_cluster.errors import ConfigError, is_text

KEY_COLUMNS = (
    *(
        "key",
        "url",
        "path",
        "file",
        "file_name",
        "filename",
        "filepath",
        "image",
        "image_path",
        "image_id",
        "id",
        "name",
    ),
)
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "cls", "target", "category")

_SURPLUS = "values of no column"
_SHOWN = 80  # characters
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")  # a column of whole numbers with gaps has 3.0 for 3


@dataclass(frozen=True)
class LabelTable:
    """The labels of images.

    Attributes:
        file: The table.
        column: The column that names the images.
        labels: The class of each image, by its name as `plain` returns it.
        classes: Sorted names of the classes; empty if they are numbers.
        unlabelled: Number of rows without a label.
    """

    file: Path
    column: str
    labels: Mapping[str, int]
    classes: tuple[str, ...]
    unlabelled: int


def plain(name: str) -> str:
    """Return what is equal for all spellings of a path: with ``./`` or ``/``, of Windows, and accents of two kinds."""
    if "\\" in name and "/" not in name:
        name = name.replace("\\", "/")
    return same_name(name).removeprefix("./").lstrip("/")


def read_labels(file: Path, key_column: str = "", label_column: str = "") -> LabelTable:
    """Read a ``.csv``, ``.tsv`` or ``.parquet`` with a header.

    Args:
        file: The table.
        key_column: The column that names the images; empty if it has one of the usual names.
        label_column: The column of classes, likewise.

    Raises:
        ConfigError: It cannot be read; it is unclear which columns are meant; or an image has two classes.
    """
    if not file.is_file():
        raise ConfigError(f"--labels: there is no file {file}. Check the path.")
    header, rows = _rows(file)
    key = _column("key", key_column, KEY_COLUMNS, header, file)
    label = _column("label", label_column, LABEL_COLUMNS, header, file, key)
    found: dict[str, str] = {}
    unlabelled = 0
    for row in rows:
        if isinstance(row.get(label), list | dict):
            raise ConfigError(
                f"{file}: '{label}' holds {_shown(str(row[label]))}, which is neither a number nor a name."
            )
        name, value = _text(row.get(key)).strip(), _text(row.get(label)).strip()
        if any(row.get(_SURPLUS) or ()):
            raise ConfigError(
                f"{file}: the row of {_shown(name)} has more values than there are columns. Put quotes around names "
                "with a comma in them."
            )
        if "\n" in name or "\n" in value:
            raise ConfigError(f'{file}: a line break is in {_shown(name)} or its label. Is a quote (") not closed?')
        if not is_text(value):
            raise ConfigError(f"{file}: the label of '{_shown(name)}' is not UTF-8: {_shown(value)}. Save it as UTF-8.")
        if not name or not value:
            unlabelled += 1
        elif found.setdefault(plain(name), value) != value:
            raise ConfigError(f"{file}: '{name}' has two labels, '{found[plain(name)]}' and '{value}'. Correct one.")
    if not found:
        raise ConfigError(f"{file} has no row with '{key}' and '{label}'. Check the file.")
    if all(map(_NUMBER.fullmatch, found.values())):
        numbers = {name: float(value) for name, value in found.items()}
        wrong = (n for n, value in numbers.items() if not value.is_integer() or not 0 <= value <= MAX_CLASS)
        if bad := next(wrong, ""):
            raise ConfigError(
                f"{file}: '{bad}' has the label {found[bad]}; classes are numbered from 0 to {MAX_CLASS:,} at most. "
                "Correct it."
            )
        return LabelTable(file, key, {name: int(value) for name, value in numbers.items()}, (), unlabelled)
    classes = tuple(sorted(set(found.values())))
    number = {name: i for i, name in enumerate(classes)}
    return LabelTable(file, key, {name: number[value] for name, value in found.items()}, classes, unlabelled)


def _rows(file: Path) -> tuple[list[str], Iterator[Mapping[str, Any]]]:
    """Return the names of the columns, and the rows."""
    if file.suffix.lower() == ".parquet":
        return read_table(file)
    if file.suffix.lower() not in (".csv", ".tsv"):
        raise ConfigError(f"--labels: {file} is no .csv, .tsv or .parquet. Convert it.")
    content = file.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as Excel writes, too
    # A name on disk need not be UTF-8, and is then the same as here.
    text = content.decode("utf-16", "replace") if is_utf16 else content.decode("utf-8-sig", "surrogateescape")
    usual = "\t" if file.suffix.lower() == ".tsv" else ","
    header = text.partition("\n")[0]
    try:
        # Excel separates by semicolons where the comma is the decimal point.
        separator = next((mark for mark in (usual, ",", ";", "\t") if mark in header), usual)
        reader = csv.DictReader(io.StringIO(text, newline=None), delimiter=separator, restkey=_SURPLUS)
        return list(reader.fieldnames or ()), iter(list(reader))
    except csv.Error as error:
        raise ConfigError(f"{file} is not a table of comma-separated values: {error}. Check its quotes.") from error


def _column(kind: str, asked: str, usual: Sequence[str], header: Sequence[str], file: Path, other: str = "") -> str:
    """Return the column that was asked for, or the only one with a usual name that is not the other column."""
    if not header:
        raise ConfigError(f"{file} is empty. Its first line has the names of the columns.")
    there = ", ".join(header)
    if asked:
        if asked not in header:
            raise ConfigError(f"{file} has no column '{asked}'; its columns are {there}.")
        return asked
    found = [name for name in header if name != other and name.strip().lower() in usual]
    if len(found) != 1:
        what = f"several columns that may be the {kind}: {', '.join(found)}" if found else f"no column of a {kind}"
        first = "" if file.suffix.lower() == ".parquet" else " (its first line)"
        raise ConfigError(f"{file} has {what}; its columns are {there}{first}. Choose one with --{kind}-column NAME.")
    return found[0]


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN
        return ""
    return str(value)


def _shown(text: str) -> str:
    return ascii(text if len(text) < _SHOWN else f"{text[:_SHOWN]}...")[1:-1]
