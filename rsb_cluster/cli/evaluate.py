"""The command that evaluates weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from rsb_cluster.cli.terminal import console, new_table, progress_bar, runs_option, runs_url, say

if TYPE_CHECKING:
    from rsb_cluster.evaluation.record import Evaluation


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--data", required=True, help="Folder or s3:// URL of a set or a part, or a set's name below data/.")
@click.option("--part", default="val", show_default=True, help="Which part of the set.")
@click.option("--labels", default="", help="Label sets beside the index: real, vizwiz.  [default: the set's own]")
@click.option("--metric", default="", help="What counts.  [default: the set's own; 'shards list']")
@click.option("--resolution", type=click.IntRange(1), help="Side of the crop, px.  [default: the weights']")
@click.option("--crop", type=click.FloatRange(0, 1, min_open=True), help="Crop ratio.  [default: the weights']")
@click.option("--interpolation", type=click.Choice(["bicubic", "bilinear"]), help="[default: the weights']")
@click.option("--exact/--fast", default=None, help="Decode and resize with PIL, bit for bit as timm.  [default: fast]")
@click.option("--amp", type=click.Choice(["off", "fp16", "bf16"]), help="Precision.  [default: the run's, else off]")
@click.option("--ema", is_flag=True, help="The moving average of a run's weights.")
@click.option("--model", default="", help="timm's name of the network of a weight file.")
@click.option("--procs", type=click.IntRange(1), help="Processes on the CPU.")
@click.option("--gpus", type=click.IntRange(1), help="Processes, one per GPU.  [default: one process]")
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True, help="Of a process.")
@click.option("--workers", type=click.IntRange(1), help="Decoding threads of a process.  [default: its share of cores]")
@click.option("--save-predictions", "predictions", default="", metavar="FILE", help="Write each image's as CSV.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@runs_option
def evaluate(
    sources: tuple[str, ...], runs: str, procs: int | None, gpus: int | None, as_json: bool, **options: Any
) -> None:
    """Score weights on shards: what is printed is also kept, and shown by 'collect'.

    SOURCE is a run (id, its beginning, folder or URL), a checkpoint's folder, a weight file (.safetensors, .pth), a
    folder of timm's (config.json, model.safetensors), or a timm name, whose weights are downloaded.

    \b
    rsb-cluster evaluate a1-resnet50-s0 --data s3://bucket/imagenet-1k --labels real --gpus 8
    rsb-cluster evaluate resnet50.a1_in1k --data imagenet-v2 --resolution 224 --crop 0.95
    rsb-cluster evaluate best.pth --model resnet50 --data data/imagenet-1k --exact
    """
    from rsb_cluster.config.schema import validate
    from rsb_cluster.evaluation.launcher import evaluate as verb
    from rsb_cluster.evaluation.record import EvaluationRequest

    given = {key: value for key, value in options.items() if value is not None}
    request = validate(EvaluationRequest, {"sources": sources, "runs": runs_url(runs), **given}, "evaluate")
    found = []
    with progress_bar("evaluating") as progress:
        for one in verb(request, procs=procs or 0, gpus=gpus or 0, progress=progress):
            found.append(one)
            say(f"{one.weights}: {one.scored:,} of {one.samples:,} images scored at {one.images_per_s:,.0f} a second")
    if as_json:
        click.echo(json.dumps([one.model_dump(mode="json") for one in found], indent=2))
    else:
        console().print(_table(found))


def _table(found: list[Evaluation]) -> Any:
    from rsb_cluster.evaluation.record import plain_values

    table = new_table("weights", "data", "labels", "px", "crop", "metric", "%", "images")
    for one in found:
        where = (one.weights, f"{one.data_set}/{one.part}", one.labels, str(one.resolution), f"{one.crop:.4g}")
        for number, (metric, value) in enumerate(plain_values(one).items()):
            shown = where if number == 0 else ("",) * len(where)
            images = one.groups[metric.partition(" ")[2]].scored if " " in metric else one.scored
            table.add_row(*shown, metric.replace("_", " "), f"{value:.3f}", f"{images:,}")
    return table
