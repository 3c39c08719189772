"""Finds recipes, jobs and sweeps by name, and applies the overrides of the command line.

Search order, first hit wins: a path; ``./recipes``, ``./jobs`` or ``./jobs/sweeps``; the same in each folder of
``$RSB_CLUSTER_PATH``; the bundled ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rsb_cluster.config import paper
from rsb_cluster.config.class_list import read_class_list
from rsb_cluster.config.job import Job
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import Override, flatten, override, parse_toml, read_text, validate
from rsb_cluster.config.settings import settings
from rsb_cluster.errors import ConfigError, did_you_mean, expand_home

Kind = Literal["recipes", "jobs", "sweeps"]

FOLDERS: dict[Kind, str] = {"recipes": "recipes", "jobs": "jobs", "sweeps": "jobs/sweeps"}


@dataclass(frozen=True)
class Resolved:
    """A recipe as it will run.

    Attributes:
        recipe: The recipe with the overrides of the command line.
        path: The recipe's file.
        original: What it is compared with: the published procedure, or the recipe of the file.
        given: The fields that the command line or a sweep sets.
    """

    recipe: Recipe
    path: Path
    original: Recipe
    given: frozenset[str] = frozenset()

    @property
    def modified(self) -> dict[str, tuple[Any, Any]]:
        """The fields that differ from the published procedure, as ``{field: (there, here)}``.

        The model is not part of a procedure: the paper itself trains many models with one recipe.
        """
        found = differences(self.original, self.recipe)
        if self.original.init.weights:  # a fine-tuning procedure is used with many weights, as any with many models
            found.pop("init.weights", None)
        return found

    def replace(self, values: Mapping[str, Any]) -> Resolved:
        """Return the recipe with some fields replaced, by their paths."""
        plain = override(self.recipe.model_dump(mode="json"), list(values.items()))
        return replace(self, recipe=validate(Recipe, plain, str(self.path)).with_virtual_ranks())


def bundled_dir(kind: Kind) -> Path:
    """Return the bundled folder: inside an installed wheel, else beside the package in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "_bundled" / FOLDERS[kind]
    # The installed one first: an installed package lies in site-packages, where 'recipes' may be any package's.
    return installed if installed.is_dir() else package.parent / FOLDERS[kind]


def search_path(kind: Kind) -> list[Path]:
    """Return the folders in which a name is looked up, in search order."""
    team = [expand_home(folder) for folder in os.environ.get("RSB_CLUSTER_PATH", "").split(os.pathsep) if folder]
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
        path = expand_home(name)
        if not path.is_file():
            raise ConfigError(f"there is no file {path}. Check the path.{_who_says(kind, name)}")
        return path
    known = available(kind)
    if name not in known:
        raise ConfigError(
            f"there is no {kind.removesuffix('s')} '{name}'.{did_you_mean(name, known)} "
            f"Known: {', '.join(sorted(known))}. A path to a .toml file works too.{_who_says(kind, name)}"
        )
    return known[name]


def _who_says(kind: Kind, name: str) -> str:
    """Return which setting names a job, for a user who has not typed it; else an empty string."""
    job = settings()["job"]
    return f" {job.source} names it." if kind == "jobs" and name == job.value else ""


def load_recipe(name: str, *, model: str | None = None, overrides: Sequence[Override] = ()) -> Resolved:
    """Read a recipe, apply ``--model`` and ``--set``, validate it, and compare it with its procedure.

    With another model, a1, a2 and a3 take its resolutions from the paper's Table 3, unless the file or ``--set`` has
    others than the table gives for the file's own model.
    """
    path = find("recipes", name)
    values = parse_toml(path)
    validate(Recipe, values, str(path))
    model = next((str(value) for key, value in reversed(overrides) if key == "model.name"), model)
    original = validate(Recipe, with_model(values, model), str(path))
    where = f"{path} with --set" if overrides else str(path)
    given = frozenset(field for field, _ in overrides)
    values = override(with_model(values, model), [*_counted_classes(overrides), *overrides])
    recipe = validate(Recipe, values, where).with_virtual_ranks()
    if recipe.paper:
        bundled = bundled_dir("recipes") / f"{recipe.paper.lower()}.toml"
        original = validate(Recipe, with_model(parse_toml(bundled), recipe.model.name), str(bundled))
    return Resolved(recipe, path, original.with_virtual_ranks(), given)


def _counted_classes(overrides: Sequence[Override]) -> list[Override]:
    """Return the number of the classes that are chosen, which the user need not give, too."""
    chosen = dict(overrides).get("data.classes")
    try:
        names = read_class_list(chosen) if isinstance(chosen, str) and chosen else chosen
    except ValueError:  # the check of the recipe says what is wrong
        return []
    return [("data.num_classes", len(names))] if isinstance(names, list | tuple) and names else []


def recipe_for_set(name: str) -> str:
    """Return the bundled recipe that a data set is usually tried with first: its own, or A3, the cheapest."""
    data_sets = {path.stem: parse_toml(path)["data"]["set"] for path in bundled_dir("recipes").glob("*.toml")}
    own = sorted(recipe for recipe, data_set in data_sets.items() if data_set == name)
    return "a3" if not own or "a3" in own else own[0]


def with_model(values: dict[str, Any], model: str | None) -> dict[str, Any]:
    """Return a recipe's plain values with another model, and with that model's resolutions of Table 3."""
    if not model:
        return values
    before, after = (paper.setup_of(values.get("paper", ""), name) for name in (values["model"]["name"], model))
    changed = {**values, "model": {**values["model"], "name": model}}
    if before and after:
        for section, old, new in (
            ("augment", before.train_px, after.train_px),
            ("eval", before.test_px, after.test_px),
        ):
            if values[section]["resolution"] == old:
                changed[section] = {**values[section], "resolution": new}
    return changed


def differences(original: Recipe, changed: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two recipes differ, apart from names, the model, and what only changes the speed."""
    before, after = flatten(original), flatten(changed)
    ignored = {"name", "description", "paper", "reconstruction", "model.name"}
    ignored |= {"train.channels_last", "train.compile", "train.deterministic"}
    if not (original.train.virtual_ranks and changed.train.virtual_ranks):  # of earlier versions: the spec has it
        ignored.add("train.virtual_ranks")
    return {key: (before[key], after[key]) for key in before if key not in ignored and before[key] != after[key]}


def load_job(name: str, *, overrides: Sequence[Override] = ()) -> tuple[Job, Path]:
    """Read a job and replace fields, such as ``("nodes", 4)``."""
    path = find("jobs", name)
    values = {**_settings_of_jobs(), **parse_toml(path)}
    return validate(Job, override(values, overrides), str(path)), path


def _settings_of_jobs() -> dict[str, str]:
    """Return the user's settings that are fields of any job; a job file's own values come before them."""
    found = settings()
    fields = {"share": found["share"].value, "notify_command": found["notify"].value}
    return {name: value for name, value in fields.items() if value and name in Job.model_fields}


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

    walk(tomlkit.parse(read_text(path)), "")
    return found
