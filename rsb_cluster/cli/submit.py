"""The commands that submit runs: one recipe, or a sweep of many."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rsb_cluster.cli.terminal import console, log, new_table, runs_url, set_option
from rsb_cluster.errors import ConfigError, RsbError
from rsb_cluster.subprocesses.interpreter import interpreter

if TYPE_CHECKING:
    from pathlib import Path

    from rsb_cluster.config.sweep_file import SweepFile
    from rsb_cluster.runs.run import Submission
    from rsb_cluster.submission.plan import Plan

F = TypeVar("F", bound=Callable[..., Any])


class _Nodes(click.ParamType):  # type: ignore[type-arg]  # generic in stubs only
    """A number of nodes: ``4``, or ``2-4``."""

    name = "N|MIN-MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return the minimum and the maximum."""
        low, _, high = str(value or "0").partition("-")
        if not low.isdigit() or not (high or low).isdigit() or int(low) > int(high or low):
            self.fail(f"{value!r} is neither a number of nodes nor a range such as 2-4", param, ctx)
        return int(low), int(high or low)


_SHARED = (
    click.option("--job", default="", help="Where to train: a name or a .toml file.  [default: slurm, else local]"),
    click.option(
        "--nodes",
        type=_Nodes(),
        default="",
        help="Number of nodes; 2-4: at least 2, and up to 4 if they are free.  [default: the job's]",
    ),
    click.option("--exclude-failed-hosts", is_flag=True, help="Exclude nodes on which ranks of these runs failed."),
    click.option("--gpus-per-node", type=click.IntRange(0), help="GPUs per node; 0: CPUs.  [default: the job's]"),
    click.option(
        "--parallel", default=0, type=click.IntRange(0), help="Concurrent tasks per job array, at most.  [default: 256]"
    ),
    click.option(
        "--max-gpu-hours",
        type=click.FloatRange(0, min_open=True),
        help="GPU-hour budget of each run over all attempts (process-hours on CPUs). A run that reaches it saves a "
        "checkpoint and stops.",
    ),
    click.option("--data", default="", help="Folder or s3:// URL with train/ and val/.  [default: data/<set>]"),
    click.option("--runs", default="", help="Folder or s3:// URL of the runs.  [default: runs]"),
    click.option(
        "--init", default="", metavar="SOURCE", help="Initial weights: a run, a weight file, or a timm model name."
    ),
    click.option(
        "--save-diff",
        is_flag=True,
        help="Save uncommitted changes of rsb-cluster's own checkout beside the runs (diffs/). Their SHA-256 is always "
        "recorded.",
    ),
    click.option("--cache-dir", default="", help="Cache shards in this folder on each node's local disk."),
    click.option(
        "--virtual-ranks",
        default=0,
        type=click.IntRange(0),
        help="Micro-batches per step, over all ranks.  [default: the recipe's, else the fewest that fit the job]",
    ),
    set_option("KEY=VALUE", "Override a field of the recipe, or with job.KEY of the job."),
    click.option("--dry-run", is_flag=True, help="Check and print everything, submit nothing."),
    click.option(
        "--wait",
        is_flag=True,
        help="Show progress until the runs have ended. Ctrl-C saves and stops runs on this machine; on Slurm and in a "
        "cloud they continue, and the exit code is 130.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON."),
)


def _shared_options(command: F) -> F:
    """Add the options that both commands share."""
    for option in reversed(_SHARED):
        command = option(command)
    return command


@click.command()
@click.option("--recipe", required=True, help="What to train: a name or a .toml file.")
@click.option("--model", default="", help="Name of a timm model.  [default: the recipe's]")
@click.option("--seed", type=click.IntRange(0), help="Seed of the run, below 2^32.  [default: 0]")
@click.option("--seeds", type=click.IntRange(1), help="Number of runs, with seeds 0, 1, 2, ...")
@click.option(
    "--images-per-s",
    type=click.FloatRange(0, min_open=True),
    help="Training images/s of one GPU, for the cost estimate.",
)
@_shared_options
def submit(
    recipe: str,
    model: str,
    seed: int | None,
    seeds: int | None,
    images_per_s: float | None,
    save_diff: bool,
    dry_run: bool,
    wait: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a recipe. It is submitted as a job to this machine, Slurm or a cloud.

    Submit the same run again to resume it from its last checkpoint; a finished run is left alone.

    \b
    rsb-cluster submit --recipe digits --wait
    rsb-cluster submit --recipe a1 --nodes 4 --data s3://bucket/imagenet-1k --runs s3://bucket/runs
    rsb-cluster submit --recipe a3 --model resnet18 --seeds 3 --set optimizer.lr=4e-3 --dry-run
    rsb-cluster submit --recipe ft-cars --init a1-resnet50-s0-2df9ebd6
    """
    from rsb_cluster.config import catalog
    from rsb_cluster.config.sweep_file import Grid, SweepFile
    from rsb_cluster.submission import preview
    from rsb_cluster.submission.plan import Request, parse_seeds

    grid = Grid(recipes=(recipe,), models=(model,) if model else (), seeds=parse_seeds(seed, seeds))
    log(f"recipe {catalog.find('recipes', recipe)}")
    plan = _plan(SweepFile(name="submit", grid=(grid,)), None, Request(**options), is_sweep=False, dry_run=dry_run)
    rates = {"*": images_per_s} if images_per_s else {}
    if dry_run:
        click.echo(json.dumps(preview.as_dict(plan, rates), indent=2) if as_json else preview.describe(plan, rates))
        return
    _submit(plan, save_diff)
    if as_json:
        click.echo(json.dumps(preview.as_dict(plan, rates), indent=2))
    actions = {"new": "submitted", "unfinished": "resubmitted, resumes from the last checkpoint"}
    for planned in plan.runs:
        log(f"{planned.run.run_id}: {actions.get(planned.state, planned.state)}")
    if not as_json:
        click.echo("\n".join(planned.run.run_id for planned in plan.runs))
    if wait:
        _wait(plan)


@click.command()
@click.argument("name", required=False)
@click.option("--recipe", "recipes", default="", metavar="NAME,...", help="Without a sweep file: the recipes.")
@click.option("--model", "models", default="", metavar="NAME,...", help="Without a sweep file: the models.")
@click.option(
    "--vary", multiple=True, metavar="KEY=VALUE,...", help="Without a sweep file: a field of the recipe and its values."
)
@click.option(
    "--name", "sweep_name", default="sweep", show_default=True, help="Without a sweep file: the name of the sweep."
)
@click.option("--seeds", type=click.IntRange(1), help="Number of runs per combination, with seeds 0, 1, 2, ...")
@click.option(
    "--images-per-s",
    "rates",
    multiple=True,
    metavar="[MODEL=]N",
    help="Training images/s of one GPU, for the cost estimate; MODEL may be a glob.",
)
@click.option(
    "--collect", is_flag=True, help="Add a Slurm job that writes the table and the report when all runs have ended."
)
@_shared_options
def sweep(
    name: str | None,
    recipes: str,
    models: str,
    vary: tuple[str, ...],
    sweep_name: str,
    seeds: int | None,
    rates: tuple[str, ...],
    collect: bool,
    save_diff: bool,
    dry_run: bool,
    wait: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Submit a sweep of many runs.

    NAME is the name or path of a sweep file. Without it, the sweep is recipes × models × values × seeds. Runs that need
    the same resources go into one job array. Submit a sweep again to submit only the runs that are neither finished nor
    queued. In status, cancel, retry, preempt and collect, a sweep's id selects all its runs.

    \b
    rsb-cluster sweep resnet-depths --dry-run --images-per-s resnet18=4000 --images-per-s 1000
    rsb-cluster sweep --recipe a1,a2,a3 --model resnet18,resnet50 --seeds 3 --nodes 2 --parallel 4
    rsb-cluster sweep --recipe a3 --vary optimizer.lr=4e-3,8e-3 --name lr
    """
    from rsb_cluster.backends import backend_of
    from rsb_cluster.config import sweep_file
    from rsb_cluster.config.schema import validate
    from rsb_cluster.submission import estimate, preview
    from rsb_cluster.submission.plan import Request, parse_seeds

    known_rates = estimate.parse_rates(rates)
    if name and (recipes or models or vary):
        raise ConfigError(
            f"'{name}' is a sweep file, which sets recipes, models and values itself. Use either the file, "
            "or --recipe, --model and --vary."
        )
    if name:
        file, path = sweep_file.load_sweep(name)
        log(f"sweep {path}")
    elif recipes:
        grid = {"recipes": _split(recipes), "models": _split(models), "vary": sweep_file.parse_vary(vary)}
        file, path = validate(sweep_file.SweepFile, {"name": sweep_name, "grid": [grid]}, "the command line"), None
    else:
        raise ConfigError("name a sweep file ('rsb-cluster sweeps list'), or use --recipe.")
    request = Request(seeds=parse_seeds(None, seeds) if seeds else (), **options)
    plan = _plan(file, path, request, is_sweep=True, dry_run=dry_run)
    if collect and not all(backend_of(planned.point.job).can_run_after for planned in plan.runs):
        raise ConfigError("--collect needs Slurm. Use --wait instead, then 'rsb-cluster collect SWEEP --publish'.")
    if not dry_run:
        submissions = _submit(plan, save_diff)
        if collect and submissions:
            _collect_after(plan, submissions)
    if as_json:
        click.echo(json.dumps(preview.sweep_as_dict(plan, known_rates), indent=2))
    elif dry_run:
        _show_table(preview.sweep_rows(plan, known_rates))
        click.echo(preview.sweep_summary(plan, known_rates))
    else:
        log(preview.sweep_summary(plan, known_rates))
        assert plan.sweep is not None
        click.echo(plan.sweep.sweep_id)
    if wait and not dry_run:
        _wait(plan)


def _plan(file: SweepFile, path: Path | None, request: Any, *, is_sweep: bool, dry_run: bool) -> Plan:
    from rsb_cluster.submission.plan import plan as make_plan

    plan = make_plan(file, path, request, is_sweep=is_sweep, dry_run=dry_run)
    log(f"job {plan.runs[0].point.job_path}")
    return plan


def _submit(plan: Plan, save_diff: bool) -> list[Submission]:
    from rsb_cluster.submission.data_location import make_missing_shards
    from rsb_cluster.submission.submit import submit as submit_plan

    for url in make_missing_shards(planned.data for planned in plan.runs if planned.should_submit):
        log(f"made the shards in {url}")
    for note in plan.notes:
        log(f"note: {note}")
    return submit_plan(plan, with_diff=save_diff)


def _collect_after(plan: Plan, submissions: list[Submission]) -> None:
    from rsb_cluster.backends import backend_of

    assert plan.sweep is not None
    sweep_id = plan.sweep.sweep_id
    command = [*interpreter(), "-m", "rsb_cluster", "collect", sweep_id, "--publish", "--runs", plan.runs_url]
    array = plan.arrays[0]
    folder = array.folder.parent / "collect"
    job_id = backend_of(array.job).run_after(array.job, submissions, command, folder, f"collect-{sweep_id}")
    log(
        f"job {job_id} will write collect.json and report.html to {plan.runs_url}/sweeps/{sweep_id} when all runs "
        "have ended"
    )


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _show_table(rows: Sequence[dict[str, str]]) -> None:
    from rich.text import Text

    numbers = ("runs", "batch", "steps", "GPU-hours")
    table = new_table(*rows[0])
    for column in table.columns:
        column.justify = "right" if column.header in numbers else "left"
    for row in rows:
        table.add_row(*map(Text, row.values()), end_section=row is rows[-2])
    console().print(table)


def _wait(plan: Plan) -> None:
    from rsb_cluster.monitor.watch import follow

    statuses = follow([planned.run for planned in plan.runs], console(stderr=True))
    if statuses is None:
        log(_detached_message(plan))
        raise click.exceptions.Exit(128 + signal.SIGINT)  # the shell's code for Ctrl-C
    unfinished = [s for s in statuses if s.state != "finished"]
    if unfinished and all(s.cause == "stopped" for s in unfinished):
        raise RsbError("stopped by you; a checkpoint was saved. Submit again to resume.")
    if unfinished:
        reasons = "\n".join(f"{s.run_id}: {s.cause or s.state}" for s in unfinished)
        raise RsbError(
            f"{len(unfinished)} of {len(statuses)} runs did not finish:\n{reasons}\nSee 'rsb-cluster logs RUN'."
        )


def _detached_message(plan: Plan) -> str:
    """Return what a user can do who no longer waits for jobs that continue."""
    ids = [planned.run.run_id for planned in plan.runs]
    runs_flag = "" if plan.runs_url == runs_url("") else f" --runs {shlex.quote(plan.runs_url)}"
    names = (plan.sweep.sweep_id if plan.sweep else " ".join(ids)) + runs_flag
    return (
        "No longer waiting; queued and running jobs continue.\n"
        f"watch them  rsb-cluster status --watch {names}\n"
        f"see a log   rsb-cluster logs -f {ids[0]}{runs_flag}\n"
        f"cancel all  rsb-cluster cancel {names}"
    )
