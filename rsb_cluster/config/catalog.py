"""Finds recipes, jobs and sweeps by name, and applies the overrides of the command line.

Search order, first hit wins: a path; ``./recipes``, ``./jobs`` or ``./jobs/sweeps``; the same in each folder of
``$RSB_CLUSTER_PATH``; the bundled ones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import Override, flatten, override, parse_toml, validate
from rsb_cluster.errors import ConfigError, did_you_mean

Kind = Literal["recipes", "jobs", "sweeps"]

FOLDERS: dict[Kind, str] = {"recipes": "recipes", "jobs": "jobs", "sweeps": "jobs/sweeps"}


@dataclass(frozen=True)
class Resolved:
    """A recipe as it will run.

    Attributes:
        recipe: The recipe with the overrides of the command line.
        path: The recipe's file.
        modified: The fields that differ from the published procedure, as ``{field: (there, here)}``. The model is not
            part of a procedure: the paper itself trains many models with one recipe.
    """

    recipe: Recipe
    path: Path
    modified: dict[str, tuple[Any, Any]]


def bundled_dir(kind: Kind) -> Path:
    """Return the bundled folder: inside an installed wheel, else beside the package in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "_bundled" / FOLDERS[kind]
    # The installed one first: an installed package lies in site-packages, where 'recipes' may be any package's.
    return installed if installed.is_dir() else package.parent / FOLDERS[kind]


def search_path(kind: Kind) -> list[Path]:
    """Return the folders in which a name is looked up, in search order."""
    team = [Path(folder) for folder in os.environ.get("RSB_CLUSTER_PATH", "").split(os.pathsep) if folder]
    return [*(folder / FOLDERS[kind] for folder in (Path.cwd(), *team)), bundled_dir(kind)]


def available(kind: Kind) -> dict[str, Path]:
    """Return all known names with their files."""
    found: dict[str, Path] = {}
    for folder in search_path(kind):
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return found


def find(kind: Kind, name: str) -> Path:
    """Return the file of a recipe, job or sweep given by name or path."""
    if "/" in name or name.endswith(".toml"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(f"there is no file {path}. Check the path.")
        return path
    known = available(kind)
    if name not in known:
        raise ConfigError(
            f"there is no {kind.removesuffix('s')} '{name}'.{did_you_mean(name, known)} "
            f"Known: {', '.join(sorted(known))}. A path to a .toml file works too."
        )
    return known[name]


def load_recipe(name: str, *, model: str | None = None, overrides: Sequence[Override] = ()) -> Resolved:
    """Read a recipe, apply ``--model`` and ``--set``, validate it, and compare it with its procedure."""
    path = find("recipes", name)
    values = parse_toml(path)
    original = validate(Recipe, values, str(path))
    if model:
        values = {**values, "model": {**values["model"], "name": model}}
    where = f"{path} with --set" if overrides else str(path)
    recipe = validate(Recipe, override(values, overrides), where)
    if recipe.paper:
        bundled = bundled_dir("recipes") / f"{recipe.paper.lower()}.toml"
        original = validate(Recipe, parse_toml(bundled), str(bundled))
    modified = differences(original, recipe)
    if original.init.weights:  # a fine-tuning procedure is used with many weights, as any procedure with many models
        modified.pop("init.weights", None)
    return Resolved(recipe, path, modified)


def differences(original: Recipe, changed: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two recipes differ, apart from names, the model, and how a batch is computed."""
    before, after = flatten(original), flatten(changed)
    ignored = {"name", "description", "paper", "reconstruction", "model.name"}
    ignored |= {"train.virtual_ranks", "train.channels_last", "train.compile"}
    return {key: (before[key], after[key]) for key in before if key not in ignored and before[key] != after[key]}


def load_job(name: str, *, overrides: Sequence[Override] = ()) -> tuple[Job, Path]:
    """Read a job and replace fields, such as ``("nodes", 4)``."""
    path = find("jobs", name)
    return validate(Job, override(parse_toml(path), overrides), str(path)), path


def value_comments(path: Path) -> dict[str, str]:
    """Return the comment after each value of a TOML file, as ``{"optimizer.lr": "Table 2"}``."""
    import tomlkit
    from tomlkit.items import Item, Table

    found: dict[str, str] = {}

    def walk(table: Any, prefix: str) -> None:
        for key in table:
            item = table.item(key)  # items() would turn a boolean into Python's own, without its comment
            if isinstance(item, Table):
                walk(item.value, f"{prefix}{key}.")
            elif isinstance(item, Item):
                found[prefix + key] = item.trivia.comment.removeprefix("#").strip()

    walk(tomlkit.parse(path.read_text(encoding="utf-8")), "")
    return found
