"""The command that submits a sweep of many runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from rsb_cluster.cli import complete
from rsb_cluster.cli.parameters import Seeds
from rsb_cluster.cli.submit_options import submit_options
from rsb_cluster.cli.submit_plan import end_dry_run, make_plan, submit_plan, wait_for
from rsb_cluster.cli.terminal import console, log, new_table
from rsb_cluster.errors import ConfigError
from rsb_cluster.subprocesses.interpreter import interpreter

if TYPE_CHECKING:
    from rsb_cluster.submission.plan import Plan


@click.command()
@click.argument("name", required=False, shell_complete=complete.sweeps)
@click.option(
    "--recipe",
    "recipes",
    default="",
    metavar="NAME,...",
    shell_complete=complete.recipe_list,
    help="Without a sweep file: the recipes.",
)
@click.option(
    "--model",
    "models",
    default="",
    metavar="NAME,...",
    shell_complete=complete.model_list,
    help="Without a sweep file: the models.",
)
@click.option(
    "--vary", multiple=True, metavar="KEY=VALUE,...", help="Without a sweep file: a field of the recipe and its values."
)
@click.option(
    "--name", "sweep_name", default="sweep", show_default=True, help="Without a sweep file: the name of the sweep."
)
@click.option("--seeds", type=Seeds(), help="Seeds of each combination: 3 (which is 0,1,2), 1,5,7 or 0-4.")
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
@submit_options
def sweep(
    name: str | None,
    recipes: str,
    models: str,
    vary: tuple[str, ...],
    sweep_name: str,
    seeds: tuple[int, ...] | None,
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
    from rsb_cluster.submission.request import Request, check_seeds

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
    request = Request(seeds=check_seeds(seeds or ()), **options)
    plan = make_plan(file, path, request, is_sweep=True, dry_run=dry_run)
    if collect and not all(backend_of(planned.point.job).can_run_after for planned in plan.runs):
        raise ConfigError("--collect needs Slurm. Use --wait instead, then 'rsb-cluster collect SWEEP --publish'.")
    if not dry_run:
        submit_plan(plan, save_diff)
        if collect:
            _collect_after(plan)
    if as_json:
        click.echo(json.dumps(preview.sweep_as_dict(plan, known_rates), indent=2))
    elif dry_run:
        _show_table(preview.sweep_rows(plan, known_rates))
        click.echo(preview.sweep_summary(plan, known_rates))
    else:
        log(preview.sweep_summary(plan, known_rates))
        assert plan.sweep is not None
        click.echo(plan.sweep.sweep_id)
    if dry_run:
        end_dry_run(plan, as_json)
    elif wait:
        wait_for(plan)


def _collect_after(plan: Plan) -> None:
    """Submit the job that collects the sweep when all jobs of its runs have ended, those of earlier submits, too."""
    from rsb_cluster.backends import backend_of
    from rsb_cluster.monitor.actions import active_submissions
    from rsb_cluster.submission.job_arrays import submissions_folder

    assert plan.sweep is not None
    sweep_id = plan.sweep.sweep_id
    command = [*interpreter(), "-m", "rsb_cluster", "collect", sweep_id, "--publish", "--runs", plan.runs_url]
    job = plan.runs[0].point.job
    waits_for = active_submissions([planned.run for planned in plan.runs])
    folder = submissions_folder(job, plan.runs_url) / "collect"
    job_id = backend_of(job).run_after(job, waits_for, command, folder, f"collect-{sweep_id}")
    log(
        f"job {job_id} will write collect.json and report.html to {plan.runs_url}/sweeps/{sweep_id} when all runs "
        f"have ended; {len(waits_for)} are queued or running"
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
