"""Which parquet files of a folder are train, and which are val: the rules of the Hugging Face Hub, and its refusals.

The front matter of ``README.md`` decides (``configs``, with ``data_files`` of each split); without one the names do: a
file's own (``train-00000-of-00002.parquet``), or that of the innermost folder that has a split's word. (The Hub asks
folders first, by which ``test-set/train-0.parquet`` is test.) Of several
configurations the one that is the default is taken; else the user must choose. Hidden files and folders (``.cache``,
``._x.parquet``) and those like ``__MACOSX`` do not count. Source: Hub docs, "Manual configuration" and "File names and
splits"; ``datasets/data_files.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from rsb_cluster.data.image_files import IMAGE_EXTENSIONS
from rsb_cluster.data.sources.source import extension_of
from rsb_cluster.data.split_names import as_ours, split_of, splits_in
from rsb_cluster.errors import ConfigError

_PART = re.compile(r"(.*?)[-_.]?(\d+)-of-(\d+)(-[0-9a-f]+)?")  # of older uploads with a hash
_NUMBER = re.compile(r"(.*?)[-_.]?(\d+)")
_SHOWN = 3
_IMAGE_FOLDERS = 8  # so many folders of images without a parquet file between them are no parquet data set


@dataclass(frozen=True)
class ParquetFiles:
    """The files of a parquet data set.

    Attributes:
        root: The folder.
        splits: The files of ``train`` and ``val``, sorted; with an empty name those whose names tell no split.
        samples: Number of rows of a split according to the data set's card, as far as it says so.
        notes: What is left out, in sentences.
    """

    root: Path
    splits: Mapping[str, tuple[Path, ...]]
    samples: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, split: str) -> tuple[Path, ...]:
        """Return the files of a split: all, if no name tells a split and the user has named this one."""
        return self.splits.get(split) or self.splits.get("", ())


@dataclass
class _Chosen:
    """The files of one configuration, by split as `split_of` calls it."""

    splits: dict[str, list[Path]]
    notes: list[str]
    samples: dict[str, int] = field(default_factory=dict)
    by_pattern: bool = False  # the publisher or the user said which files belong together


def visible_parquet(root: Path) -> tuple[list[Path], list[str]]:
    """Return the parquet files below a folder, sorted, and the images beside them that were seen on the way."""
    files: list[Path] = []
    images: list[str] = []
    folders_of_images = 0
    for parent, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        shown = sorted(name for name in names if not name.startswith("."))
        files += (found := [Path(parent, name) for name in shown if extension_of(name) == "parquet"])
        if odd := next((file for file in found if not file.is_file()), None):  # never opened: a pipe would wait
            raise ConfigError(f"{odd} is no regular file, or a link to none. Restore it, or remove it.")
        seen = [os.path.relpath(Path(parent, name), root) for name in shown if extension_of(name) in IMAGE_EXTENSIONS]
        images += seen
        folders_of_images += bool(seen) and not found
        if not files and folders_of_images >= _IMAGE_FOLDERS:
            break
    return sorted(files), images


def _raise(error: OSError) -> None:
    """Refuse a folder that cannot be listed: it is not empty. One that is not there has a message of its own."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def parquet_files(root: Path, config: str = "", any_count: bool = False) -> ParquetFiles:
    """Return the files of each split of a folder.

    Args:
        root: The folder.
        config: The configuration to use: its name in ``README.md``, a folder, or a pattern of files with ``*``.
        any_count: Accept missing parts; they are in the notes.

    Raises:
        ConfigError: It is unclear which files belong together, or parts are missing.
    """
    files, images = visible_parquet(root)
    if not files:
        raise ConfigError(f"there is no .parquet file in {root}. Check the path.")
    card = _card(root)
    chosen = _by_pattern(root, files, config) or _by_card(root, files, card, config) or _by_name(root, files, config)
    notes = list(chosen.notes)
    if images:
        notes.append(f"images beside the parquet files are left out: {len(images):,} ({abbreviate(images)})")
    unnamed = chosen.splits.pop("", [])
    if not chosen.splits:
        notes += _check_parts(root, "", unnamed, any_count, chosen.by_pattern)
        return ParquetFiles(root, {"": tuple(unnamed)}, notes=tuple(notes))
    if unnamed:
        notes.append(f"files whose names tell no split are left out: {_shown(root, unnamed)}")
    ours, left_out = as_ours(chosen.splits)
    notes += [f"the split '{kind}' is left out: {_shown(root, chosen.splits[kind])}" for kind in left_out]
    for split, members in ours.items():
        notes += _check_parts(root, split, members, any_count, chosen.by_pattern)
    counts, _ = as_ours({kind: chosen.samples.get(kind, 0) for kind in chosen.splits})
    samples = {split: count for split, count in counts.items() if count}
    return ParquetFiles(root, {split: tuple(sorted(m)) for split, m in ours.items()}, samples, tuple(notes))


def abbreviate(names: Iterable[str]) -> str:
    """Return the first few names, and the number of the others."""
    listed = list(names)
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


# --- which files belong together ---


def _by_pattern(root: Path, files: list[Path], config: str) -> _Chosen | None:
    """Return the files that the user's pattern matches; None if it is no pattern."""
    if not any(character in config for character in "*?["):
        return None
    matching = [file for file in files if fnmatchcase(file.relative_to(root).as_posix(), config)]
    if not matching:
        raise ConfigError(f"no .parquet file in {root} matches --config '{config}'. It has {_shown(root, files)}.")
    left = len(files) - len(matching)
    notes = [f"files that '{config}' does not match are left out: {left:,}"] if left else []
    return _Chosen(_by_split(root, matching), notes, by_pattern=True)


def _by_name(root: Path, files: list[Path], config: str) -> _Chosen:
    """Return the files of one folder, where the names of files or folders tell the split."""
    folders: dict[str, list[Path]] = {}
    for file in files:
        folders.setdefault(_folder(root, file), []).append(file)
    if len({file.parent for file in files}) == 1:  # also where its name has the word of one of the splits in it
        folders = {files[0].parent.relative_to(root).as_posix(): files}
    chosen = [name for name in folders if not config or config == name or config in PurePosixPath(name).parts]
    if len(chosen) != 1:
        named = ", ".join(sorted(name or "." for name in chosen or folders))
        what = "several folders of parquet files, which would be merged" if chosen else f"no configuration '{config}'"
        raise ConfigError(f"{root} has {what}: {named}. Choose one with --config FOLDER.")
    left = [file for name, members in folders.items() if name != chosen[0] for file in members]
    notes = [f"other configurations are left out: {_shown(root, left)}"] if left else []
    return _Chosen(_by_split(root, folders[chosen[0]]), notes)


def _by_split(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split(root, file), []).append(file)
    return splits


def _split(root: Path, file: Path) -> str:
    """Return the split of a file: its own name tells it, else the innermost folder that has a split's word."""
    parts = file.relative_to(root).parts
    for name in (file.stem, *reversed(parts[:-1])):
        if split := split_of(name, str(file)):
            return split
    return ""


def _folder(root: Path, file: Path) -> str:
    """Return the folder of a file below the root, without those of its split: what the splits have in common."""
    split = _split(root, file)
    return "/".join(part for part in file.relative_to(root).parts[:-1] if not split or split not in splits_in(part))


# --- the card: README.md ---


def _card(root: Path) -> dict[str, Any]:
    """Return the front matter of ``README.md``; empty if there is none."""
    import yaml

    path = root / "README.md"
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.match(r"\A\ufeff?---\s*\n(.*?)\n---\s*(\n|\Z)", text, re.DOTALL)
    if found is None:
        return {}
    try:
        content = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())[:200]
        raise ConfigError(f"the front matter of {path} is not valid YAML: {where}. Correct it, or move it.") from error
    return content if isinstance(content, dict) else {}


def _by_card(root: Path, files: list[Path], card: Mapping[str, Any], config: str) -> _Chosen | None:
    """Return the files of a configuration of the card; None if it has none with files."""
    configs: dict[str, dict[str, list[Path]]] = {}
    default = ""
    for entry in _dicts(card.get("configs")):
        if not entry.get("data_files"):
            continue
        name = str(entry.get("config_name", "default"))
        splits = {split: _matching(root, files, entry, patterns) for split, patterns in _patterns(entry["data_files"])}
        if any(splits.values()):
            configs[name] = splits
            default = name if name == "default" or entry.get("default") is True else default
    if not configs:
        return None
    chosen = config or default or (next(iter(configs)) if len(configs) == 1 else "")
    if chosen not in configs:
        if config and any(config in (f := _folder(root, file)).split("/") or config == f for file in files):
            return None  # a folder
        what = f"has no configuration '{config}'" if config else "has several configurations"
        raise ConfigError(f"{root / 'README.md'} {what}: {', '.join(configs)}. Choose one with --config NAME.")
    others = [name for name in configs if name != chosen]
    notes = [f"other configurations are left out: {', '.join(others)}"] if others else []
    splits, left_out = _one_of_each(configs[chosen], root)
    notes += [f"the split '{name}' is left out" for name in left_out]
    used = {file for members in configs.values() for found in members.values() for file in found}
    if unlisted := [file for file in files if file not in used]:
        notes.append(f"files that README.md does not list are left out: {_shown(root, unlisted)}")
    return _Chosen(splits, notes, _samples(card, chosen), by_pattern=True)


def _patterns(data_files: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield each split of ``data_files`` with its patterns; all that has no split is train."""
    listed = data_files if isinstance(data_files, list) else [data_files]
    for entry in listed:
        if isinstance(entry, dict) and "path" in entry:
            paths = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
            yield str(entry.get("split", "train")), [str(path) for path in paths]
        elif isinstance(entry, dict):
            for split, paths in entry.items():
                yield str(split), [str(path) for path in (paths if isinstance(paths, list) else [paths])]
        else:
            yield "train", [str(entry)]


def _matching(root: Path, files: list[Path], entry: Mapping[str, Any], patterns: list[str]) -> list[Path]:
    below = str(entry.get("data_dir", "")).strip("/.")
    found = [re.compile(_as_regex("/".join(filter(None, (below, pattern.removeprefix("./")))))) for pattern in patterns]
    return [file for file in files if any(one.fullmatch(file.relative_to(root).as_posix()) for one in found)]


def _as_regex(pattern: str) -> str:
    """Return a glob as a regular expression: ``*`` stays in a folder, ``**`` does not, a folder is all below it."""
    out = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^]]*\]|.", pattern):
        special = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        is_set = token.startswith("[") and len(token) > 1
        out += special.get(token, token.replace("[!", "[^") if is_set else re.escape(token))
    return f"{out.removesuffix('/')}(/.*)?"


def _one_of_each(named: Mapping[str, list[Path]], root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the files by split, and the names of the splits that are left out."""
    kinds: dict[str, list[str]] = {}
    for name, members in named.items():
        if members:
            kinds.setdefault(split_of(name, f"the split '{name}' in {root / 'README.md'}"), []).append(name)
    left_out = kinds.pop("", [])
    splits = {}
    for kind, names in kinds.items():
        exact = [name for name in names if name == kind] or names
        if len(exact) > 1:
            raise ConfigError(
                f"{root / 'README.md'} has several splits for '{kind}': {', '.join(names)}. Choose files with --config "
                "'PATTERN', such as 'data/train-*'."
            )
        splits[kind] = named[exact[0]]
        left_out += [name for name in names if name != exact[0]]
    return splits, left_out


def _samples(card: Mapping[str, Any], config: str) -> dict[str, int]:
    """Return the numbers of rows in the card's ``dataset_info``, by split."""
    for info in _dicts(card.get("dataset_info")):
        if str(info.get("config_name", config)) == config:
            counts = {str(split.get("name")): split.get("num_examples") for split in _dicts(info.get("splits"))}
            return {name: count for name, count in counts.items() if isinstance(count, int)}
    return {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    """Return the tables in a value of the card, be it one or a list: people write these by hand."""
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, dict)]


# --- parts ---


def _check_parts(root: Path, split: str, files: Iterable[Path], any_count: bool, by_pattern: bool) -> list[str]:
    """Refuse parts of different sets, and sets with missing parts; return remarks."""
    families: dict[str, list[_Part]] = {}
    for file in files:
        part = _Part.of(file)
        families.setdefault(f"{file.parent}/{part.family}" if by_pattern else part.family, []).append(part)
    unclear = [part.file for parts in families.values() for part in parts]
    if not by_pattern and (len(families) > 1 or any(_is_scattered(parts) for parts in families.values())):
        what = f"files of {split} that may not belong together" if split else "files that may not belong together"
        raise ConfigError(
            f"{root} has {what}: {_shown(root, unclear)}. Choose with --config 'PATTERN', such as "
            f"'*{unclear[0].name}', or --config '*' for all of them."
        )
    return [note for parts in families.values() for note in _missing_parts(root, parts, any_count)]


@dataclass(frozen=True)
class _Part:
    """A file with its number among those of the same name; the total is 0 where the name does not tell it."""

    file: Path
    family: str
    number: int
    total: int

    @classmethod
    def of(cls, file: Path) -> _Part:
        if found := _PART.fullmatch(file.stem):
            return cls(file, found[1], int(found[2]), int(found[3]))
        if found := _NUMBER.fullmatch(file.stem):
            return cls(file, found[1], int(found[2]), 0)
        return cls(file, file.stem, 0, 0)


def _is_scattered(parts: list[_Part]) -> bool:
    """Whether the numbers look like resolutions or years, and not like those of parts."""
    numbers = [part.number for part in parts]
    return not parts[0].total and max(numbers) - min(numbers) >= 2 * len(numbers)


def _missing_parts(root: Path, parts: list[_Part], any_count: bool) -> list[str]:
    numbers, total = {part.number for part in parts}, parts[0].total
    if any(part.total != total for part in parts) or (total and len(numbers) < len(parts)):
        files = _shown(root, [part.file for part in parts])
        raise ConfigError(f"{root} has parts of several uploads: {files}. Keep those of one.")
    start = min(numbers) if not total else 1 if total in numbers else 0
    missing = sorted(set(range(start, start + total if total else max(numbers))) - numbers)
    if not missing:
        return []
    what = f"{len(missing):,} parts like {_shown(root, [parts[0].file])} are missing: {abbreviate(map(str, missing))}"
    if total and not any_count:
        raise ConfigError(f"{root}: {what}. Was a download interrupted? To use the others anyway, pass --any-count.")
    return [what]


def _shown(root: Path, files: Iterable[Path]) -> str:
    return abbreviate(file.relative_to(root).as_posix() for file in files)
