"""The command that packages a recipe as a job."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from rsb_cluster.cli.terminal import console, say
from rsb_cluster.errors import RsbError

if TYPE_CHECKING:
    from rsb_cluster.run import Run


@click.command()
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
    say(f"recipe {resolved.path}")
    if resolved.recipe.data.make and not dry_run:
        verb.make_data(resolved.recipe, request.data)
    plan = verb.plan(request, dry_run=dry_run)
    say(f"job {plan.job_path}")
    if dry_run:
        shown = preview.as_dict(plan, images_per_s)
        click.echo(json.dumps(shown, indent=2) if as_json else preview.describe(plan, images_per_s))
        return
    for note in plan.notes:
        say(f"note: {note}")
    verb.submit(plan)
    if as_json:
        click.echo(json.dumps(preview.as_dict(plan, images_per_s), indent=2))
    for planned in plan.runs:
        done = {"new": "submitted", "unfinished": "submitted again, goes on where it was"}.get(
            planned.state, planned.state
        )
        say(f"{planned.run.run_id}: {done}")
    if not as_json and not wait:
        click.echo("\n".join(planned.run.run_id for planned in plan.runs))
    if wait:
        _wait([planned.run for planned in plan.runs])


def _wait(runs: list[Run]) -> None:
    from rsb_cluster.watch import follow

    unfinished = [s for s in follow(runs, console(stderr=True)) if s.state != "finished"]
    if unfinished and all(s.state == "stopped" for s in unfinished):
        raise RsbError("stopped by you, and saved. Submit again to go on.")
    if unfinished:
        reasons = "\n".join(f"{s.run_id}: {s.cause or s.state}" for s in unfinished)
        raise RsbError(f"{len(unfinished)} of {len(runs)} runs did not finish:\n{reasons}\nSee 'rsb-cluster logs RUN'.")
