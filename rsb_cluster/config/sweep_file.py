"""Sweep files: many runs as grids of recipes, models, seeds and values, and the resources of each.

A sweep file is a TOML file in ``jobs/sweeps/``. Each ``[[grid]]`` is a product; a sweep is the union of its grids.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from rsb_cluster.config.catalog import Resolved, find, load_job, load_recipe
from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import SEEDS, Override, Section, Seed, parse_toml, validate
from rsb_cluster.errors import ConfigError


class Grid(Section):
    """All combinations of some recipes, models, seeds and values of fields."""

    recipes: tuple[str, ...] = Field(min_length=1, description="names or .toml files")
    models: tuple[str, ...] = Field((), description="timm names; empty: each recipe's own")
    seeds: tuple[Seed, ...] = Field((0,), min_length=1, description="a list, or how many from 0")
    vary: dict[str, Any] = Field({}, description="lists of values, by recipe field")

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if not 1 <= value <= SEEDS:
            raise ValueError(f"seeds = {value}: give a list of seeds, or how many")
        return tuple(range(value))

    @field_validator("vary")
    @classmethod
    def _lists(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, values in leaves(value).items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"vary.{key} = {values!r}: give a list of values, for example [1e-3, 2e-3]")
        return value

    def combinations(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield recipe, model (empty: the recipe's own) and values of each point, without the seeds."""
        varied = leaves(self.vary)
        for recipe, model, *values in itertools.product(self.recipes, self.models or ("",), *varied.values()):
            yield recipe, model, dict(zip(varied, values, strict=True))


class Resources(Section):
    """Job fields of some of the runs. The first entry that matches a run applies; without one the job is unchanged."""

    recipes: tuple[str, ...] = Field(("*",), description="names or globs")
    models: tuple[str, ...] = Field(("*",), description="names or globs")
    set: dict[str, Any] = Field(description="fields of the job, for example { nodes = 4 }")

    def matches(self, recipe: str, model: str) -> bool:
        """Whether this entry is for runs of a recipe and model."""
        return any(fnmatchcase(recipe, r) for r in self.recipes) and any(fnmatchcase(model, m) for m in self.models)


class SweepFile(Section):
    """The runs of a sweep, and the job that trains them."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    description: str = ""
    job: str = Field("", description="the job, unless --job names another")
    grid: tuple[Grid, ...] = Field(min_length=1)
    resources: tuple[Resources, ...] = ()


@dataclass(frozen=True)
class Point:
    """A recipe as it will run, its seeds, and its job.

    Attributes:
        resolved: The recipe, with model and values.
        varied: The values from the grid, by field.
        seeds: The seeds; one run each.
        job: The job, with its resources.
        job_path: The job's file.
    """

    resolved: Resolved
    varied: dict[str, Any]
    seeds: tuple[int, ...]
    job: Job
    job_path: Path


def load_sweep(name: str) -> tuple[SweepFile, Path]:
    """Read a sweep file given by name or path."""
    path = find("sweeps", name)
    return validate(SweepFile, parse_toml(path), str(path)), path


def expand(
    file: SweepFile, *, job: str, recipe_overrides: Sequence[Override] = (), job_overrides: Sequence[Override] = ()
) -> list[Point]:
    """Return the distinct points of a sweep, with their jobs.

    Args:
        file: The sweep.
        job: Name of the job.
        recipe_overrides: Overrides of all recipes, such as ``("optimizer.lr", 4e-3)``; they win over those of the grid.
        job_overrides: Overrides of all jobs, such as ``("nodes", 4)``; they win over those of the resources.
    """
    jobs: dict[str, tuple[Job, Path]] = {}
    points: dict[str, Point] = {}
    for grid in file.grid:
        for name, model, varied in grid.combinations():
            resolved = load_recipe(name, model=model or None, overrides=[*varied.items(), *recipe_overrides])
            recipe = resolved.recipe
            matching = (r.set for r in file.resources if r.matches(recipe.name, recipe.model.name))
            resources = [*leaves(next(matching, {})).items(), *job_overrides]
            if (text := repr(resources)) not in jobs:
                jobs[text] = load_job(job, overrides=resources)
            # Two grids may contain the same point, which then gets the seeds of both.
            key = f"{recipe.name} {recipe.digest(0, '', recipe.init.weights)}"
            seeds = (*points[key].seeds, *grid.seeds) if key in points else grid.seeds
            points[key] = Point(resolved, varied, tuple(dict.fromkeys(seeds)), *jobs[text])
    return list(points.values())


def parse_vary(texts: Sequence[str]) -> dict[str, Any]:
    """Return ``["optimizer.lr=1e-3,2e-3"]`` as ``{"optimizer.lr": [1e-3, 2e-3]}``."""
    import tomllib

    found: dict[str, Any] = {}
    for text in texts:
        key, separator, values = text.partition("=")
        if not separator or not key.strip() or not values.strip():
            raise ConfigError(
                f"--vary {text!r} is not of the form key=value,value, for example optimizer.lr=4e-3,5e-3."
            )
        try:
            found[key.strip()] = tomllib.loads(f"x = [{values}]")["x"]
        except tomllib.TOMLDecodeError:
            found[key.strip()] = [value.strip() for value in values.split(",")]
    return found


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as ``{"optimizer.lr": value}``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
