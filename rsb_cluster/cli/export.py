"""The command that gives a run away."""

from __future__ import annotations

from typing import Literal

import click

from rsb_cluster.cli.terminal import find_one, runs_option, say


@click.command()
@click.argument("run")
@click.argument("dest")
@click.option("--to", type=click.Choice(["timm", "hf"]), required=True, help="For timm, or the hub with a model card.")
@click.option(
    "--checkpoint", default="last", show_default=True, metavar="last|best|STEP", help="Which of its checkpoints."
)
@click.option("--ema/--no-ema", default=None, help="The moving average of the weights.  [default: if it has one]")
@runs_option
def export(run: str, dest: str, to: Literal["timm", "hf"], checkpoint: str, ema: bool | None, runs: str) -> None:
    """Write a run's weights to DEST, a new folder or s3:// URL, as timm loads them.

    \b
    rsb-cluster export a1-resnet50-s0 --to timm ./resnet50-a1
    rsb-cluster export a1-resnet50-s0 --to hf s3://bucket/models/resnet50-a1 --checkpoint best
    python -c 'import timm; timm.create_model("local-dir:./resnet50-a1", pretrained=True)'
    """
    from rsb_cluster.weights.export import export as verb

    found = verb(find_one(run, runs), to, dest, which=checkpoint, ema=ema)
    what = "the moving average (EMA) of the weights" if found.is_ema else "the weights"
    say(f"{what} after step {found.step:,}")
    click.echo(dest)
