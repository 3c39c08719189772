"""The command that evaluates weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from rsb_cluster.cli.terminal import console, log, new_table, progress_bar, runs_option, runs_url

if TYPE_CHECKING:
    from rsb_cluster.evaluation.record import Evaluation


def _per_channel(context: click.Context, option: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(value) for value in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise click.BadParameter(f"{text!r} is not three numbers for red, green and blue, such as 0.485,0.456,0.406.")
    return values


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--data", required=True, help="Data set: a folder, an s3:// URL, or the name of a folder in data/.")
@click.option("--part", default="val", show_default=True, help="Part of the data set.")
@click.option("--labels", default="", help="Label set next to the index: real, vizwiz.  [default: the data set's]")
@click.option("--metric", default="", help="Metric, see 'shards list'.  [default: the data set's]")
@click.option("--resolution", type=click.IntRange(1), help="Side of the center crop, px.  [default: the weights']")
@click.option("--crop", type=click.FloatRange(0, 1, min_open=True), help="Crop ratio.  [default: the weights']")
@click.option(
    "--interpolation",
    type=click.Choice(["bicubic", "bilinear"]),
    help="Interpolation of the resize.  [default: the weights']",
)
@click.option(
    "--mean", callback=_per_channel, metavar="R,G,B", help="Mean of the images, from 0 to 1.  [default: the weights']"
)
@click.option("--std", callback=_per_channel, metavar="R,G,B", help="Standard deviation.  [default: the weights']")
@click.option(
    "--exact/--fast", default=None, help="Decode and resize with PIL, bit-identical to timm.  [default: fast]"
)
@click.option("--amp", type=click.Choice(["off", "fp16", "bf16"]), help="Precision.  [default: the run's, else off]")
@click.option(
    "--ema/--no-ema", default=None, help="Evaluate the EMA weights.  [default: not of a run; of a file that has them]"
)
@click.option("--model", default="", help="timm model name of a weight file.")
@click.option("--procs", type=click.IntRange(1), help="Number of processes, on CPUs.")
@click.option("--gpus", type=click.IntRange(1), help="Number of GPUs, one process each.  [default: one process]")
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True, help="Batch size per process.")
@click.option("--workers", type=click.IntRange(1), help="Decoding threads per process.  [default: its share of cores]")
@click.option("--save-predictions", "predictions", default="", metavar="FILE", help="Write all predictions as CSV.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@runs_option
def evaluate(
    sources: tuple[str, ...], runs: str, procs: int | None, gpus: int | None, as_json: bool, **options: Any
) -> None:
    """Evaluate weights on shards. The results are stored beside the runs, and 'collect' shows them.

    SOURCE is a run (id, beginning of an id, folder or URL), a checkpoint folder, a weight file (.safetensors, .pth,
    .ckpt), a model folder in timm's format (config.json, model.safetensors), or a timm model name, whose weights are
    downloaded.

    \b
    rsb-cluster evaluate a1-resnet50-s0 --data s3://bucket/imagenet-1k --labels real --gpus 8
    rsb-cluster evaluate resnet50.a1_in1k --data imagenet-v2 --resolution 224 --crop 0.95
    rsb-cluster evaluate best.pth --model resnet50 --data data/imagenet-1k --exact

    Mean and standard deviation are those of the run's recipe, of the folder's config.json or of a known data set, in
    this order; else timm's for the model, with a warning. --mean and --std set others; the output says which were used.
    """
    from rsb_cluster.config.schema import validate
    from rsb_cluster.evaluation import launcher
    from rsb_cluster.evaluation.record import EvaluationRequest

    values = {key: value for key, value in options.items() if value is not None}
    request = validate(EvaluationRequest, {"sources": sources, "runs": runs_url(runs), **values}, "evaluate")
    evaluations = []
    with progress_bar("evaluating") as progress:
        for e in launcher.evaluate(request, procs=procs or 0, gpus=gpus or 0, progress=progress):
            evaluations.append(e)
            log(f"{e.weights}: evaluated {e.scored:,} of {e.samples:,} images at {e.images_per_s:,.0f} images/s")
            if e.entry:
                log(f"  taken from the file: {e.entry}")
            log(f"  mean {_numbers(e.mean)}, std {_numbers(e.std)} ({e.normalization})")
    if as_json:
        click.echo(json.dumps([e.model_dump(mode="json") for e in evaluations], indent=2))
    else:
        console().print(_table(evaluations))


def _numbers(values: tuple[float, ...] | None) -> str:
    return ",".join(f"{value:.4g}" for value in values or ())


def _table(evaluations: list[Evaluation]) -> Any:
    from rsb_cluster.evaluation.record import plain_values

    table = new_table("weights", "data", "labels", "px", "crop", "metric", "%", "images")
    for e in evaluations:
        setting = (e.weights, f"{e.data_set}/{e.part}", e.labels, str(e.resolution), f"{e.crop:.4g}")
        for number, (metric, value) in enumerate(plain_values(e).items()):
            cells = setting if number == 0 else ("",) * len(setting)
            images = e.groups[metric.partition(" ")[2]].scored if " " in metric else e.scored
            table.add_row(*cells, metric.replace("_", " "), f"{value:.3f}", f"{images:,}")
    return table
