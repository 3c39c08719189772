"""The command that submits runs of one recipe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from rsb_cluster.cli import complete
from rsb_cluster.cli.parameters import Seeds
from rsb_cluster.cli.submit_options import submit_options
from rsb_cluster.cli.submit_plan import end_dry_run, make_plan, submit_plan, wait_for
from rsb_cluster.cli.terminal import log, where_it_starts
from rsb_cluster.errors import ConfigError

if TYPE_CHECKING:
    from rsb_cluster.submission.planned_run import PlannedRun


@click.command()
@click.option("--recipe", required=True, shell_complete=complete.recipes, help="What to train: a name or a .toml file.")
@click.option(
    "--model", default="", shell_complete=complete.models, help="Name of a timm model.  [default: the recipe's]"
)
@click.option("--seed", type=click.IntRange(0), help="Seed of the run, below 2^32.  [default: 0]")
@click.option("--seeds", type=Seeds(), help="A run for each seed: 3 (which is 0,1,2), 1,5,7 or 0-4.")
@click.option(
    "--images-per-s",
    type=click.FloatRange(0, min_open=True),
    help="Training images/s of one GPU, for the cost estimate.",
)
@submit_options
def submit(
    recipe: str,
    model: str,
    seed: int | None,
    seeds: tuple[int, ...] | None,
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
    from rsb_cluster.submission.request import Request, check_seeds

    if seed is not None and seeds is not None:
        raise ConfigError("--seed is one seed, --seeds are several: use one of them.")
    grid = Grid(recipes=(recipe,), models=(model,) if model else (), seeds=check_seeds(seeds or (seed or 0,)))
    log(f"recipe {catalog.find('recipes', recipe)}")
    plan = make_plan(SweepFile(name="submit", grid=(grid,)), None, Request(**options), is_sweep=False, dry_run=dry_run)
    rates = {"*": images_per_s} if images_per_s else {}
    if dry_run:
        click.echo(json.dumps(preview.as_dict(plan, rates), indent=2) if as_json else preview.describe(plan, rates))
        end_dry_run(plan, as_json)
        return
    submit_plan(plan, save_diff)
    if as_json:
        click.echo(json.dumps(preview.as_dict(plan, rates), indent=2))
    for planned in plan.runs:
        replaced = "".join(f"cancelled job {s.job_id}; " for s in planned.replaces)
        log(f"{planned.run.run_id}: {replaced}{_what_was_done(planned)}")
    if not as_json:
        click.echo("\n".join(planned.run.run_id for planned in plan.runs))
    if wait:
        wait_for(plan)


def _what_was_done(planned: PlannedRun) -> str:
    """Return what a submit did with a run."""
    if not planned.should_submit:
        return planned.state
    if planned.state == "new":
        return "submitted"
    if planned.state == "queued anew":
        return "submitted anew"
    return f"resubmitted, {where_it_starts(planned.run)}"
