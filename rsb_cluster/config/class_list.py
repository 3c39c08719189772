"""Lists of class names, as users give them."""

from __future__ import annotations

import json
from pathlib import Path

from rsb_cluster.errors import expand_home


def read_class_list(text: str) -> tuple[str, ...]:
    """Return the class names in a text: a file of names (one a line, or a JSON list), or names with commas between.

    Raises:
        ValueError: There is no such file, it cannot be read, or there is no name.
    """
    path = expand_home(text)
    if _is_file(path):
        names = _read(path)
    elif "/" in text or path.suffix in (".txt", ".json"):
        raise ValueError(f"there is no file {path}")
    else:
        names = [name.strip() for name in text.split(",")]
    found = tuple(name for name in names if name)
    if not found:
        raise ValueError(f"'{text}' names no class")
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # many names are longer than a path can be
        return False


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} is not a list of names")
    return names
