"""The command that evaluates weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from rsb_cluster.cli import complete
from rsb_cluster.cli.evaluation_jobs import job_options, submit_jobs
from rsb_cluster.cli.terminal import console, log, new_table, print_json, progress_bar, runs_option, runs_url

if TYPE_CHECKING:
    from rsb_cluster.evaluation.record import Evaluation
    from rsb_cluster.evaluation.suite import SuiteItem
    from rsb_cluster.submission.site import Site


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
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...", shell_complete=complete.weights)
@click.option(
    "--data",
    default="",
    help="Data set: a folder, an s3:// URL, or the name of a folder in data/.  [default: the run's own]",
)
@click.option("--suite", metavar="NAME", help="Evaluate on all data sets of a suite in the folder --data: imagenet.")
@click.option("--part", default="val", show_default=True, help="Part of the data set.")
@click.option("--labels", default="", help="Label set: real, vizwiz, a-classes, r-classes.  [default: the data set's]")
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
    "--ema/--no-ema",
    default=None,
    help="Evaluate the moving average of the weights.  [default: not of a run; of a file that has one]",
)
@click.option("--model", default="", help="timm model name of a weight file.")
@click.option("--procs", type=click.IntRange(1), help="Number of processes, on CPUs.")
@click.option("--gpus", type=click.IntRange(1), help="Number of GPUs, one process each.  [default: one process]")
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True, help="Batch size per process.")
@click.option("--workers", type=click.IntRange(1), help="Decoding threads per process.  [default: its share of cores]")
@click.option("--save-predictions", "predictions", default="", metavar="FILE", help="Write all predictions as CSV.")
@job_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@runs_option
def evaluate(
    sources: tuple[str, ...],
    runs: str,
    suite: str | None,
    procs: int | None,
    gpus: int | None,
    job: str,
    site: Site,
    wait: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Evaluate weights on shards. The results are stored beside the runs, and 'collect' shows them.

    SOURCE is a run (id, beginning of an id, folder or URL), a glob or a sweep for all of its runs, a checkpoint folder,
    a weight file (.safetensors, .pth, .ckpt), a model folder in timm's format (config.json, model.safetensors), or a
    timm model name, whose weights are downloaded. A run is evaluated on its own val images unless --data is given.

    With --job the evaluation is a job, on Slurm, in a cloud or in the background here: one node of the job file, with
    one GPU or --gpus. Several sources are one job array. 'status' shows the jobs, 'logs' and 'cancel' take their ids.

    \b
    rsb-cluster evaluate a1-resnet50-s0
    rsb-cluster evaluate resnet-depths --job slurm --partition gpu
    rsb-cluster evaluate a1-resnet50-s0 --data s3://bucket/imagenet-1k --labels real --gpus 8
    rsb-cluster evaluate resnet50.a1_in1k --data imagenet-v2 --resolution 224 --crop 0.95
    rsb-cluster evaluate best.pth --model resnet50 --data data/imagenet-1k --exact
    rsb-cluster evaluate a1-resnet50-s0 resnet50.a1_in1k --suite imagenet --data s3://bucket/data

    The suite imagenet is val, ReaL, the three variants of V2, Sketch, A and R, of which the last two are predicted
    among their 200 classes, and val with these classes only ("clean"). --data is the folder of these data sets; those
    that are missing are left out, with how to make them.

    Mean and standard deviation are those of the run's recipe, of the folder's config.json or of a known data set, in
    this order; else timm's for the model, with a warning. --mean and --std set others; the output says which were used.
    """
    from rsb_cluster.config.schema import validate
    from rsb_cluster.evaluation import launcher
    from rsb_cluster.evaluation.record import EvaluationRequest
    from rsb_cluster.evaluation.suite import find_suite
    from rsb_cluster.submission.evaluation import by_data, evaluation_job, expand_sources

    values = {key: value for key, value in options.items() if value is not None}
    values["runs"] = runs_url(runs)
    expanded, notes = expand_sources(sources, values["runs"])
    for note in notes:
        log(f"note: {note}")
    if suite is not None and (values["labels"] or values["metric"] or values["predictions"] or values["part"] != "val"):
        raise click.UsageError(
            "--suite sets data, labels and metrics: omit --labels, --metric, --part and predictions."
        )
    found = find_suite(suite, values["data"]) if suite is not None else None
    for missing in found.missing if found else ():
        log(missing)
    asked: list[tuple[SuiteItem | None, EvaluationRequest]] = []
    if found:
        for one, data in found.items:
            changes = {"sources": expanded, "data": data, "labels": one.labels}
            asked.append((one, validate(EvaluationRequest, values | changes, "evaluate")))
    else:
        for data, sources_of in by_data(expanded, values["data"], values["runs"]).items():
            changes = {"sources": sources_of, "data": data}
            asked.append((None, validate(EvaluationRequest, values | changes, "evaluate")))
    if job:
        where = evaluation_job(job, site, gpus=gpus or 0, procs=procs or 0)
        done = submit_jobs([request for _, request in asked], where, wait=wait, as_json=as_json)
        if done and not as_json:
            console().print(_table(done))
        return
    if given := [name for name, value in {**vars(site), "wait": wait}.items() if value]:
        raise click.UsageError(f"--{given[0].removesuffix('_min').replace('_', '-')} is for jobs: add --job.")
    evaluated: list[tuple[SuiteItem | None, Evaluation]] = []
    hold = partial(_hold_gpus, procs, gpus)
    for item, request in asked:
        with progress_bar(f"evaluating {item.title}" if item else "evaluating") as progress:
            for e in launcher.evaluate(request, procs=procs or 0, gpus=gpus or 0, hold=hold, progress=progress):
                evaluated.append((item, e))
                _say(e)
    if as_json:
        print_json([e.model_dump(mode="json") for _, e in evaluated])
    elif found:
        console().print(_suite_table([(item, e) for item, e in evaluated if item]))
    else:
        console().print(_table([e for _, e in evaluated]))


@contextmanager
def _hold_gpus(procs: int | None, gpus: int | None) -> Iterator[None]:
    """Hold the GPUs of an evaluation, as a training on this machine does: each waits for the other."""
    from rsb_cluster.node.gpu_locks import has_gpu, hold_gpus, visible_gpus

    count = gpus or (0 if procs else int(has_gpu()))
    devices = visible_gpus(count, f"--gpus {count}", "--gpus") if count else []
    with hold_gpus(devices, "an evaluation", lambda why: log(f"{why}; --procs evaluates on CPUs")):
        yield


def _say(e: Evaluation) -> None:
    log(f"{e.weights}: evaluated {e.scored:,} of {e.samples:,} images at {e.images_per_s:,.0f} images/s")
    if e.entry:
        log(f"  taken from the file: {e.entry}")
    log(f"  mean {_numbers(e.mean)}, std {_numbers(e.std)} ({e.normalization})")


def _suite_table(evaluated: list[tuple[SuiteItem, Evaluation]]) -> Any:
    from rsb_cluster.evaluation.suite import suite_rows

    titles = list(dict.fromkeys(item.title for item, _ in evaluated))
    table = new_table("weights", *titles)
    for name, values in suite_rows(evaluated).items():
        table.add_row(name, *("" if (value := values.get(title)) is None else f"{value:.2f}" for title in titles))
    return table


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
