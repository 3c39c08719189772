"""The command line: parse, one call, print. No logic, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rsb_cluster import __version__
from rsb_cluster.errors import ConfigError, RsbError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from rsb_cluster.catalog import Kind
    from rsb_cluster.data.index import ShardIndex
    from rsb_cluster.run import Run


class ErrorGroup(click.Group):
    """Shows our errors as one message and exit code; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RsbError as error:
            shown = click.ClickException(str(error))
            shown.exit_code = error.exit_code  # type: ignore[misc]  # Click's documented way to choose the code
            raise shown from error


@click.group(cls=ErrorGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="rsb-cluster")
def main() -> None:
    r"""Train the recipes of "ResNet strikes back" on a laptop, on Slurm or on preemptible machines.

    \b
    rsb-cluster submit --recipe digits --wait           a real run on this machine, in minutes
    rsb-cluster submit --recipe a1 --nodes 4 --dry-run  what would be sent to Slurm
    rsb-cluster collect                                 finished runs against the paper's numbers
    """


# --- recipes and jobs ---------------------------------------------------------------------------------------------


@main.group()
def recipes() -> None:
    """What to train: list, show, compare and copy recipes."""


@main.group()
def jobs() -> None:
    """Where to train: list, show and copy jobs."""


@recipes.command("list")
def recipes_list() -> None:
    """Name all recipes that can be used here, and their files."""
    _list("recipes")


@recipes.command("show")
@click.argument("name")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change a field, as in submit.")
@click.option("--model", default="", help="Any timm model, as in submit.")
@click.option("--json", "as_json", is_flag=True, help="The resolved recipe as JSON.")
def recipes_show(name: str, assignments: tuple[str, ...], model: str, as_json: bool) -> None:
    r"""Show a recipe's values with their sources; what the paper leaves open is marked.

    \b
    rsb-cluster recipes show a1
    rsb-cluster recipes show a1 --set optimizer.lr=4e-3 --json
    """
    from rich.text import Text

    from rsb_cluster import catalog
    from rsb_cluster.recipe import flatten

    resolved = catalog.load_recipe(name, model=model or None, assignments=assignments)
    if as_json:
        click.echo(resolved.recipe.model_dump_json(indent=2))
        return
    _say(f"{resolved.path}")
    notes = catalog.notes(resolved.path)
    written = flatten(catalog.load_recipe(name).recipe)
    table = _table("field", "value", "source")
    for key, value in flatten(resolved.recipe).items():
        note = Text(notes.get(key, ""))
        if written[key] != value:
            note = Text.assemble(("modified", "yellow"), f", in the file {written[key]!r}")
        elif is_open := re.search(r"\bopen\b", note.plain):
            before, after = note.plain[: is_open.start()], note.plain[is_open.end() :]
            note = Text.assemble(before, ("open in the paper", "magenta"), after)
        table.add_row(key, Text(json.dumps(value, ensure_ascii=False)), note)
    _console().print(table)


@recipes.command("diff")
@click.argument("one")
@click.argument("other")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def recipes_diff(one: str, other: str, as_json: bool) -> None:
    r"""Print the fields in which two recipes differ.

    \b
    rsb-cluster recipes diff a1 a2
    """
    from rich.text import Text

    from rsb_cluster import catalog
    from rsb_cluster.recipe import flatten

    left, right = (flatten(catalog.load_recipe(name).recipe) for name in (one, other))
    described = ("name", "description", "paper")
    rows = {key: (left[key], right[key]) for key in left if key not in described and left[key] != right[key]}
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = _table("field", Text(one), Text(other))
    for key, (a, b) in rows.items():
        table.add_row(key, Text(json.dumps(a)), Text(json.dumps(b)))
    _console().print(table)


@recipes.command("copy")
@click.argument("name")
@click.argument("dest", type=click.Path(path_type=Path))
def recipes_copy(name: str, dest: Path) -> None:
    """Copy a recipe to a file or folder, to change it there."""
    _copy("recipes", name, dest)


@jobs.command("list")
def jobs_list() -> None:
    """Name all jobs that can be used here, and their files."""
    _list("jobs")


@jobs.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="The resolved job as JSON.")
def jobs_show(name: str, as_json: bool) -> None:
    """Show a job's file, with its comments."""
    from rsb_cluster import catalog

    job, path = catalog.load_job(name)
    _say(str(path))
    click.echo(job.model_dump_json(indent=2) if as_json else path.read_text().rstrip())


@jobs.command("copy")
@click.argument("name")
@click.argument("dest", type=click.Path(path_type=Path))
def jobs_copy(name: str, dest: Path) -> None:
    """Copy a job to a file or folder, to change it there."""
    _copy("jobs", name, dest)


# --- shards -------------------------------------------------------------------------------------------------------


@main.group()
def shards() -> None:
    """WebDataset shards: make, index, verify, stats."""


@shards.command("make")
@click.argument("source")
@click.argument("dest")
@click.option("--root", type=click.Path(path_type=Path), help="Where a torchvision data set lies.")
@click.option("--split", type=click.Choice(["train", "val"]), help="Make this part only.")
@click.option("--shard-samples", default=1000, show_default=True, help="Samples in a shard.")
@click.option("--overwrite", is_flag=True, help="Replace shards that are there.")
def shards_make(
    source: str, dest: str, root: Path | None, split: str | None, shard_samples: int, overwrite: bool
) -> None:
    r"""Make shards and their index from SOURCE in the folder or s3:// URL DEST.

    SOURCE is an image folder (a folder per class, in train/ and val/), the name of a torchvision data set that is on
    disk, or 'digits'. DEST will hold train/ and val/. Samples are shuffled.

    \b
    rsb-cluster shards make ./my-images s3://bucket/my-images
    rsb-cluster shards make FashionMNIST data/fashion-mnist --root /usr/share/datasets/fashion-mnist
    """
    from rsb_cluster.data.make import make_set
    from rsb_cluster.data.sources import open_set
    from rsb_cluster.storage import Store

    with _progress("making shards") as progress:
        made = make_set(
            open_set(source, root=root, split=split),
            Store(dest),
            shard_samples=shard_samples,
            overwrite=overwrite,
            progress=progress,
        )
    for name, index in made.items():
        click.echo(
            f"{name}: {index.num_samples:,} samples of {index.num_classes} classes in {len(index.shards)} shards"
        )


@shards.command("index")
@click.argument("folder")
@click.option("--workers", default=0, help="Processes that read shards; 0: one per core.")
def shards_index(folder: str, workers: int) -> None:
    """Index the .tar files of FOLDER (a part: …/train or …/val), whoever wrote them."""
    from rsb_cluster.data.index import build_index
    from rsb_cluster.storage import Store

    with _progress("indexing") as progress:
        index = build_index(Store(folder), workers=workers, progress=progress)
    _say_samples("", index)


@shards.command("verify")
@click.argument("folder")
@click.option("--decode", is_flag=True, help="Decode every image, too.")
def shards_verify(folder: str, decode: bool) -> None:
    """Compare the shards of FOLDER with their index: sizes, checksums, keys."""
    from rsb_cluster.data.verify import verify
    from rsb_cluster.storage import Store

    problems = 0
    for part in _parts(folder):
        with _progress(f"verifying {part}") as progress:
            report = verify(Store(part), decode=decode, progress=progress)
        for problem in report.problems:
            click.echo(problem)
        click.echo(f"{part}: {report.samples:,} samples in {report.shards} shards, {len(report.problems)} problems")
        problems += len(report.problems)
    if problems:
        raise RsbError("the shards are not as they were when they were indexed. Copy them again, or index them anew.")


@shards.command("stats")
@click.argument("folder")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def shards_stats(folder: str, as_json: bool) -> None:
    """Say what FOLDER holds, from its index alone."""
    from rsb_cluster.data.verify import stats
    from rsb_cluster.storage import Store

    found = {part: vars(stats(Store(part))) for part in _parts(folder)}
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    table = _table("", *found)
    for key in next(iter(found.values())):
        table.add_row(key.replace("_", " "), *(f"{values[key]:,.10g}" for values in found.values()))
    _console().print(table)


# --- submit -------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--recipe", required=True, help="What to train: a name or a .toml file.")
@click.option("--model", default="", help="Any timm model instead of the recipe's.")
@click.option("--job", default="", help="Where to train: a name or a .toml file.  [default: slurm, else local]")
@click.option("--nodes", default=0, type=click.IntRange(0), help="Nodes instead of the job's.")
@click.option("--gpus-per-node", type=click.IntRange(0), help="GPUs of a node instead of the job's; 0: CPU.")
@click.option("--data", default="", help="Folder or s3:// URL with train/ and val/.  [default: data/<set>]")
@click.option("--runs", default="", help="Folder or s3:// URL of the runs.  [default: runs]")
@click.option("--seed", type=click.IntRange(0), help="Seed.  [default: 0]")
@click.option("--seeds", type=click.IntRange(1), help="So many runs, with seeds from 0.")
@click.option("--cache-dir", default="", help="Keep shards in this folder on each node's own disk.")
@click.option("--virtual-ranks", default=0, type=click.IntRange(0), help="Parts of the global batch.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change a field; job.KEY for the job's.")
@click.option(
    "--images-per-s",
    type=click.FloatRange(0, min_open=True),
    help="Training images/s of one GPU, for the dry run's estimate.",
)
@click.option("--dry-run", is_flag=True, help="Check and print all, submit nothing.")
@click.option("--wait", is_flag=True, help="Show progress until the runs have ended.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def submit(
    dry_run: bool,
    wait: bool,
    as_json: bool,
    images_per_s: float | None,
    seed: int | None,
    seeds: int | None,
    **options: Any,
) -> None:
    r"""Package a recipe as a job and hand it to the back end.

    Submitted again, a finished run is left alone, and an unfinished one goes on where it was.

    \b
    rsb-cluster submit --recipe digits --wait
    rsb-cluster submit --recipe a1 --nodes 4 --data s3://bucket/imagenet-1k --runs s3://bucket/runs
    rsb-cluster submit --recipe a3 --model resnet18 --seeds 3 --set optimizer.lr=4e-3 --dry-run
    """
    from rsb_cluster import catalog, preview
    from rsb_cluster import submit as verb

    request = verb.Request(seeds=verb.parse_seeds(seed, seeds), **options)
    resolved = catalog.load_recipe(request.recipe, model=request.model or None)
    _say(f"recipe {resolved.path}")
    if resolved.recipe.data.make and not dry_run:
        verb.make_data(resolved.recipe, request.data)
    plan = verb.plan(request, dry_run=dry_run)
    _say(f"job {plan.job_path}")
    if dry_run:
        shown = preview.as_dict(plan, images_per_s)
        click.echo(json.dumps(shown, indent=2) if as_json else preview.describe(plan, images_per_s))
        return
    for note in plan.notes:
        _say(f"note: {note}")
    verb.submit(plan)
    if as_json:
        click.echo(json.dumps(preview.as_dict(plan, images_per_s), indent=2))
    for planned in plan.runs:
        done = {"new": "submitted", "unfinished": "submitted again, goes on where it was"}.get(
            planned.state, planned.state
        )
        _say(f"{planned.run.run_id}: {done}")
    if not as_json and not wait:
        click.echo("\n".join(planned.run.run_id for planned in plan.runs))
    if wait:
        _wait([planned.run for planned in plan.runs])


# --- looking after runs -------------------------------------------------------------------------------------------

_runs_option = click.option("--runs", default="", help="Folder or s3:// URL of the runs.  [default: runs]")
_run_arguments = click.argument("names", nargs=-1, metavar="[RUN]...")


@main.command()
@_run_arguments
@_runs_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(names: tuple[str, ...], runs: str, as_json: bool) -> None:
    """Show how runs are, one line each; RUN is an id, its beginning, a glob or a path. All without one."""
    from rsb_cluster.status import read_status

    found = read_status(_find(names, runs))
    if as_json:
        click.echo(json.dumps([vars(s) for s in found], indent=2))
    elif found:
        from rsb_cluster.watch import table

        _console().print(table(found))
    else:
        _say("there are no runs yet")


@main.command()
@click.argument("name", metavar="RUN")
@_runs_option
@click.option("--rank", default=0, type=click.IntRange(0), show_default=True, help="Whose log.")
@click.option("--attempt", default=0, type=click.IntRange(0), help="Which attempt's, from 1.  [default: the last]")
@click.option("-f", "--follow", is_flag=True, help="Go on as it grows.")
def logs(name: str, runs: str, rank: int, attempt: int, follow: bool) -> None:
    """Print the log of a rank of a run."""
    from rsb_cluster.logs import read_log

    (run,) = _one(name, runs)
    for text in read_log(run, rank=rank, attempt=attempt, follow=follow):
        click.echo(text, nl=False)


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@_runs_option
def cancel(names: tuple[str, ...], runs: str) -> None:
    """End runs: a running one saves first, a queued one leaves the queue. Submit again to go on."""
    from rsb_cluster import control

    for run in _find(names, runs):
        _say(f"{run.run_id}: told job {control.cancel(run)} to end")


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="RUN...")
@_runs_option
def preempt(names: tuple[str, ...], runs: str) -> None:
    """Make runs save and go back to the queue, as a preemption does; to see that they come back."""
    from rsb_cluster import control

    for run in _find(names, runs):
        _say(f"{run.run_id}: told job {control.preempt(run)} to save and queue again")


@main.command()
@_run_arguments
@_runs_option
@click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "csv", "json", "md"]),
    default="table",
    show_default=True,
    help="How to print it.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write to a file.")
def collect(names: tuple[str, ...], runs: str, format_: Any, output: Path | None) -> None:
    """Make a table of runs: final top-1, mean ± std over seeds, against the paper's number."""
    from rsb_cluster.collect import collect as verb
    from rsb_cluster.collect import render

    collected = verb(_find(names, runs))
    if output is None:
        click.echo(render(collected, format_), nl=False)
    else:
        output.write_text(render(collected, format_, terminal=False), encoding="utf-8")
        _say(f"wrote {output}")


# --- helpers ------------------------------------------------------------------------------------------------------


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal:
        console = Console(stderr=stderr, width=10_000)  # a file has no width to respect
    return console


def _say(text: str) -> None:
    """Talk goes to standard error; standard output is for data."""
    click.echo(text, err=True)


def _table(*columns: str | Text) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _list(kind: Kind) -> None:
    from rich.text import Text

    from rsb_cluster import catalog
    from rsb_cluster.recipe import parse_toml

    table = _table("name", "description", "file")
    for name, path in catalog.available(kind).items():
        try:
            description = str(parse_toml(path).get("description", ""))
        except ConfigError as error:  # one broken file is no reason to hide all others
            description = str(error)
        table.add_row(Text(name), Text(description), Text(str(path)))
    _console().print(table)


def _copy(kind: Kind, name: str, dest: Path) -> None:
    import shutil

    from rsb_cluster import catalog

    path = catalog.find(kind, name)
    target = dest / path.name if dest.is_dir() else dest
    if target.exists():
        raise ConfigError(f"{target} exists already. Give another name.")
    try:
        shutil.copyfile(path, target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}.") from error
    _say(f"copied {path} to {target}")


def _say_samples(prefix: str, index: ShardIndex) -> None:
    shards = f"{len(index.shards)} shards"
    click.echo(f"{prefix}{index.num_samples:,} samples of {index.num_classes} classes in {shards}")


def _parts(folder: str) -> list[str]:
    from rsb_cluster.data.index import INDEX_NAME
    from rsb_cluster.storage import Store

    store = Store(folder)
    parts = [f"{folder.rstrip('/')}/{name}" for name in ("train", "val") if store.exists(f"{name}/{INDEX_NAME}")]
    return parts or [folder]


def _progress(what: str) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def shown() -> Any:
        from rich.progress import Progress

        console = _console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(what, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return shown()


def _runs_url(runs: str) -> str:
    import os

    from rsb_cluster.run import default_runs

    return runs or os.environ.get("RSB_RUNS") or default_runs()


def _find(names: tuple[str, ...], runs: str) -> list[Run]:
    from rsb_cluster.run import find_runs

    return find_runs(_runs_url(runs), names)


def _one(name: str, runs: str) -> list[Run]:
    found = _find((name,), runs)
    if len(found) > 1:
        raise ConfigError(f"'{name}' matches {len(found)} runs: {', '.join(r.run_id for r in found)}. Name one.")
    return found


def _wait(runs: list[Run]) -> None:
    from rsb_cluster.watch import follow

    unfinished = [s for s in follow(runs, _console(stderr=True)) if s.state != "finished"]
    if unfinished and all(s.state == "stopped" for s in unfinished):
        raise RsbError("stopped by you, and saved. Submit again to go on.")
    if unfinished:
        reasons = "\n".join(f"{s.run_id}: {s.cause or s.state}" for s in unfinished)
        raise RsbError(f"{len(unfinished)} of {len(runs)} runs did not finish:\n{reasons}\nSee 'rsb-cluster logs RUN'.")
