"""Commands that list, show, compare and copy recipes, jobs and sweep files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsb_cluster.cli.terminal import console, log, new_table, set_option
from rsb_cluster.errors import ConfigError

if TYPE_CHECKING:
    from rsb_cluster.config.catalog import Kind
    from rsb_cluster.config.schema import Override


@click.group()
def recipes() -> None:
    """List, show, compare and copy recipes: what to train."""


@click.group()
def jobs() -> None:
    """List, show and copy job files: where to train."""


@click.group()
def sweeps() -> None:
    """List, show and copy sweep files: many runs in one submit."""


@recipes.command("list")
def recipes_list() -> None:
    """List the available recipes and their files."""
    _list("recipes")


@recipes.command("show")
@click.argument("name")
@set_option("KEY=VALUE", "Override a field, as in submit.")
@click.option("--model", default="", help="Name of a timm model, as in submit.  [default: the recipe's]")
@click.option("--json", "as_json", is_flag=True, help="Print the resolved recipe as JSON.")
def recipes_show(name: str, overrides: tuple[Override, ...], model: str, as_json: bool) -> None:
    """Show a recipe's values with their sources. Values that the paper leaves open are marked.

    \b
    rsb-cluster recipes show a1
    rsb-cluster recipes show a1 --set optimizer.lr=4e-3 --json
    """
    from rich.text import Text

    from rsb_cluster.config import catalog
    from rsb_cluster.config.schema import flatten

    resolved = catalog.load_recipe(name, model=model or None, overrides=overrides)
    if as_json:
        click.echo(resolved.recipe.model_dump_json(indent=2))
        return
    log(f"{resolved.path}")
    notes = catalog.value_comments(resolved.path)
    written = flatten(catalog.load_recipe(name).recipe)
    table = new_table("field", "value", "source")
    for key, value in flatten(resolved.recipe).items():
        note = Text(notes.get(key, ""))
        if written[key] != value:
            note = Text.assemble(("modified", "yellow"), f", in the file {written[key]!r}")
        elif is_open := re.search(r"\bopen\b", note.plain):
            before, after = note.plain[: is_open.start()], note.plain[is_open.end() :]
            note = Text.assemble(before, ("open in the paper", "magenta"), after)
        table.add_row(key, Text(json.dumps(value, ensure_ascii=False)), note)
    console().print(table)


@recipes.command("diff")
@click.argument("left")
@click.argument("right")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def recipes_diff(left: str, right: str, as_json: bool) -> None:
    """Print the fields in which two recipes differ.

    \b
    rsb-cluster recipes diff a1 a2
    """
    from rich.text import Text

    from rsb_cluster.config import catalog
    from rsb_cluster.config.schema import flatten

    a, b = (flatten(catalog.load_recipe(name).recipe) for name in (left, right))
    ignored = ("name", "description", "paper", "reconstruction")
    rows = {key: (a[key], b[key]) for key in a if key not in ignored and a[key] != b[key]}
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = new_table("field", Text(left), Text(right))
    for key, values in rows.items():
        table.add_row(key, *(Text(json.dumps(value)) for value in values))
    console().print(table)


@recipes.command("copy")
@click.argument("name")
@click.argument("dest", type=click.Path(path_type=Path))
def recipes_copy(name: str, dest: Path) -> None:
    """Copy a recipe to a file or folder, to edit it."""
    _copy("recipes", name, dest)


@jobs.command("list")
def jobs_list() -> None:
    """List the available jobs and their files."""
    _list("jobs")


@jobs.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the resolved job as JSON.")
def jobs_show(name: str, as_json: bool) -> None:
    """Show a job file with its comments."""
    from rsb_cluster.backends import backend_of
    from rsb_cluster.config import catalog

    job, path = catalog.load_job(name)
    backend_of(job).check_job(job)
    log(str(path))
    click.echo(job.model_dump_json(indent=2) if as_json else path.read_text().rstrip())


@jobs.command("copy")
@click.argument("name")
@click.argument("dest", type=click.Path(path_type=Path))
def jobs_copy(name: str, dest: Path) -> None:
    """Copy a job file to a file or folder, to edit it."""
    _copy("jobs", name, dest)


@sweeps.command("list")
def sweeps_list() -> None:
    """List the available sweep files."""
    _list("sweeps")


@sweeps.command("show")
@click.argument("name")
def sweeps_show(name: str) -> None:
    """Show a sweep file with its comments. 'sweep NAME --dry-run' shows its runs."""
    from rsb_cluster.config import sweep_file

    _, path = sweep_file.load_sweep(name)
    log(str(path))
    click.echo(path.read_text().rstrip())


@sweeps.command("copy")
@click.argument("name")
@click.argument("dest", type=click.Path(path_type=Path))
def sweeps_copy(name: str, dest: Path) -> None:
    """Copy a sweep file to a file or folder, to edit it."""
    _copy("sweeps", name, dest)


def _list(kind: Kind) -> None:
    from rich.text import Text

    from rsb_cluster.config import catalog
    from rsb_cluster.config.schema import parse_toml

    table = new_table("name", "description", "file")
    for name, path in catalog.available(kind).items():
        try:
            description = str(parse_toml(path).get("description", ""))
        except ConfigError as error:  # one broken file must not hide the others
            description = str(error)
        table.add_row(Text(name), Text(description), Text(str(path)))
    console().print(table)


def _copy(kind: Kind, name: str, dest: Path) -> None:
    import shutil

    from rsb_cluster.config import catalog

    path = catalog.find(kind, name)
    target = dest / path.name if dest.is_dir() else dest
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists already. Choose another destination.")
    try:
        shutil.copyfile(path, target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}.") from error
    log(f"copied {path} to {target}")
