"""Commands that list, show, compare and copy recipes, jobs and sweep files."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsb_cluster.cli import complete
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
@click.argument("name", shell_complete=complete.recipes)
@set_option("KEY=VALUE", "Override a field, as in submit.")
@click.option(
    "--model",
    default="",
    shell_complete=complete.models,
    help="Name of a timm model, as in submit.  [default: the recipe's]",
)
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
    of_model = flatten(catalog.load_recipe(name, model=resolved.recipe.model.name).recipe)
    table = new_table("field", "value", "source")
    for key, value in flatten(resolved.recipe).items():
        note = Text(notes.get(key, ""))
        if written[key] != value == of_model[key] and key != "model.name":
            note = Text(f"Table 3, for {resolved.recipe.model.name}; in the file {written[key]!r}")
        elif written[key] != value:
            note = Text.assemble(("modified", "yellow"), f", in the file {written[key]!r}")
        elif is_open := re.search(r"\bopen\b", note.plain):
            before, after = note.plain[: is_open.start()], note.plain[is_open.end() :]
            note = Text.assemble(before, ("open in the paper", "magenta"), after)
        table.add_row(key, Text(json.dumps(value, ensure_ascii=False)), note)
    console().print(table)


@recipes.command("diff")
@click.argument("left", shell_complete=complete.recipes)
@click.argument("right", shell_complete=complete.recipes)
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
    if not rows:
        log("no field differs")
        return
    table = new_table("field", Text(left), Text(right))
    for key, values in rows.items():
        table.add_row(key, *(Text(json.dumps(value)) for value in values))
    console().print(table)


@recipes.command("copy")
@click.argument("name", shell_complete=complete.recipes)
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--data",
    default="",
    metavar="FOLDER",
    shell_complete=complete.folders,
    help="Fill in what these shards decide: classes, images, name.",
)
@click.option("--stats", is_flag=True, help="With --data: also the mean and std of the training images.")
def recipes_copy(name: str, dest: Path, data: str, stats: bool) -> None:
    """Copy a recipe to a file or folder, to edit it.

    With --data, the copy has the number of classes and of images of the shards in that folder, and a batch that they
    can fill; a comment at each says what it was.

    \b
    rsb-cluster recipes copy a3 mine.toml
    rsb-cluster recipes copy a3 photos.toml --data data/photos --stats
    """
    if not data:
        if stats:
            raise click.UsageError("--stats needs --data.")
        _copy("recipes", name, dest)
        return
    from rsb_cluster.config import catalog
    from rsb_cluster.submission.recipe_copy import recipe_for_data

    target = _new_file(catalog.find("recipes", name), dest)
    text, resolved, changes = recipe_for_data(name, data, target.stem, stats=stats)
    _write(target, text.encode())
    log(f"copied {resolved.path} to {target}, with")
    for key, value in changes.items():
        log(f"  {key} = {json.dumps(value)}")
    log(f"train on it: {shlex.join(['rsb-cluster', 'submit', '--recipe', _as_path(target), '--data', data])}")


@jobs.command("list")
def jobs_list() -> None:
    """List the available jobs and their files."""
    _list("jobs")


@jobs.command("show")
@click.argument("name", shell_complete=complete.jobs)
@set_option("KEY=VALUE", "Override a field; in 'submit' this is --set job.KEY=VALUE.")
@click.option("--file", "as_file", is_flag=True, help="Print the file with its comments instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the resolved job as JSON.")
def jobs_show(name: str, overrides: tuple[Override, ...], as_file: bool, as_json: bool) -> None:
    """Show every field of a job: its value, what sets it, and its meaning.

    \b
    rsb-cluster jobs show slurm
    rsb-cluster jobs show ./here.toml --set nodes=4 --json
    """
    from rich.text import Text

    from rsb_cluster.backends import at_site, backend_of
    from rsb_cluster.config import catalog
    from rsb_cluster.config.job import Job
    from rsb_cluster.config.schema import descriptions, flatten, parse_toml, read_text
    from rsb_cluster.config.sweep_file import leaves

    written, path = catalog.load_job(name, overrides=[(key.removeprefix("job."), value) for key, value in overrides])
    job = at_site(written)
    backend_of(job).check_job(job)
    log(str(path))
    if as_json or as_file:
        click.echo(job.model_dump_json(indent=2) if as_json else read_text(path).rstrip())
        return
    in_file, said = leaves(parse_toml(path)), descriptions(Job)
    given = {key.removeprefix("job.").partition(".")[0] for key, _ in overrides}
    table = new_table("field", "value", "from", "meaning")
    for key, value in flatten(job).items():
        is_in_file = any(k == key or k.startswith(f"{key}.") for k in in_file)
        default = Job.model_fields[key].get_default() if key in Job.model_fields else None
        source = "--set" if key.partition(".")[0] in given else "file" if is_in_file else "default"
        if source == "default" and key in Job.model_fields and value != default:
            source = "settings"  # 'config show' says which
        table.add_row(key, *map(Text, (json.dumps(value, ensure_ascii=False), source, said.get(key, ""))))
    console().print(table)


@jobs.command("copy")
@click.argument("name", shell_complete=complete.jobs)
@click.argument("dest", type=click.Path(path_type=Path))
def jobs_copy(name: str, dest: Path) -> None:
    """Copy a job file to a file or folder, to edit it."""
    _copy("jobs", name, dest)


@sweeps.command("list")
def sweeps_list() -> None:
    """List the available sweep files."""
    _list("sweeps")


@sweeps.command("show")
@click.argument("name", shell_complete=complete.sweeps)
def sweeps_show(name: str) -> None:
    """Show a sweep file with its comments. 'sweep NAME --dry-run' shows its runs."""
    from rsb_cluster.config import sweep_file
    from rsb_cluster.config.schema import read_text

    _, path = sweep_file.load_sweep(name)
    log(str(path))
    click.echo(read_text(path).rstrip())


@sweeps.command("copy")
@click.argument("name", shell_complete=complete.sweeps)
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
    from rsb_cluster.config import catalog

    path = catalog.find(kind, name)
    target = _new_file(path, dest)
    _write(target, path.read_bytes())
    log(f"copied {path} to {target}")


def _new_file(path: Path, dest: Path) -> Path:
    """Return where a copy of a file goes: a file, or a folder."""
    target = dest / path.name if dest.is_dir() else dest
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists already. Choose another destination.")
    return target


def _write(target: Path, content: bytes) -> None:
    try:
        target.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}.") from error


def _as_path(target: Path) -> str:
    """Return a file's path so that it is not taken for a name."""
    return str(target) if target.suffix == ".toml" or "/" in str(target) else f"./{target}"
