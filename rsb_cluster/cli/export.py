"""The command that exports a run's weights."""

from __future__ import annotations

from typing import Literal

import click

from rsb_cluster.cli import complete
from rsb_cluster.cli.terminal import find_run, log, runs_option


@click.command()
@click.argument("run", shell_complete=complete.runs)
@click.argument("dest", shell_complete=complete.folders)
@click.option(
    "--to",
    type=click.Choice(["timm", "hf"]),
    required=True,
    help="timm: a folder that timm loads; hf: with a model card.",
)
@click.option("--checkpoint", default="last", show_default=True, metavar="last|best|STEP", help="Checkpoint to export.")
@click.option(
    "--ema/--no-ema", default=None, help="Export the moving average of the weights.  [default: if the run has one]"
)
@runs_option
def export(run: str, dest: str, to: Literal["timm", "hf"], checkpoint: str, ema: bool | None, runs: str) -> None:
    """Export a run's weights in timm's format. DEST is a new folder or s3:// URL.

    \b
    rsb-cluster export a1-resnet50-s0 --to timm ./resnet50-a1
    rsb-cluster export a1-resnet50-s0 --to hf s3://bucket/models/resnet50-a1 --checkpoint best
    python -c 'import timm; timm.create_model("local-dir:./resnet50-a1", pretrained=True)'
    """
    from rsb_cluster.weights.export import export as export_weights

    exported = export_weights(find_run(run, runs), to, dest, which=checkpoint, ema=ema)
    log(f"exported the {'EMA weights' if exported.is_ema else 'weights'} after step {exported.step:,}")
    click.echo(dest)
