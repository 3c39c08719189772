"""Evaluating weights on a part of a data set, as one of some processes; and the process that `evaluate` starts."""

from __future__ import annotations

import csv
import io
import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from rsb_cluster.config.recipe import Eval
from rsb_cluster.config.schema import validate
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.data.scoring import UNDECODABLE, Scores, score_classes, score_sets
from rsb_cluster.errors import RsbError
from rsb_cluster.evaluation import record
from rsb_cluster.evaluation.record import Evaluation, EvaluationRequest
from rsb_cluster.evaluation.target import Target, check_classes, open_target
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.runs.provenance import brief_code, describe_code, describe_packages
from rsb_cluster.runs.run import Cause
from rsb_cluster.storage.redact import redact
from rsb_cluster.storage.store import Store
from rsb_cluster.train.augment import Normalise
from rsb_cluster.train.conversion.state_dict import Weights, load_weights
from rsb_cluster.train.distributed import ProcessGroup, lost_peers_named
from rsb_cluster.train.input.loader import ThreadedBatches
from rsb_cluster.train.input.pixels.transforms import FastEval
from rsb_cluster.train.input.streams import EvalStream
from rsb_cluster.train.model import AMP_DTYPE
from rsb_cluster.train.validation.predictions import Predictions, gather
from rsb_cluster.train.validation.validate import logits_of

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (images done, images in all), of this process


def evaluate_sources(
    request: EvaluationRequest,
    group: ProcessGroup,
    *,
    progress: Progress = lambda done, total: None,
    agree: Callable[[], Cause | None] = lambda: None,
) -> Iterator[Evaluation]:
    """Evaluate each source on the data of a request, and write its record and predictions on rank 0.

    Args:
        request: What to do.
        group: The processes; each calls this.
        progress: Called after each batch.
        agree: Asked by all ranks after each batch; a cause ends the evaluation.

    Raises:
        Stopped: A cause was agreed.
        ConfigError: A source is not known, its classes are not those of the data, or it takes no such images.
    """
    target = open_target(request)
    for source in request.sources:
        weights = load_weights(source, runs=request.runs, model=request.model, ema=request.ema)
        check_classes(weights.name, weights.num_classes, weights.classes, target)
        spec, amp = _input(request, weights)
        started = time.monotonic()
        predictions = _predict(request, target, weights, spec, amp, group, progress, agree)
        seconds = time.monotonic() - started
        scores = _scores(target, predictions)
        found = Evaluation(
            weights=weights.name,
            weights_digest=weights.digest,
            weights_url=weights.url,
            model=weights.architecture,
            procedure=weights.found.procedure,
            run_id=weights.run.run_id if weights.run else "",
            step=weights.step,
            ema=request.ema,
            data=target.store.url,
            data_set=target.name,
            part=target.part,
            data_digest=target.index.digest,
            labels=target.labels,
            labels_digest=target.labels_digest,
            resolution=spec.resolution,
            crop=spec.crop,
            interpolation=spec.interpolation,
            exact=spec.exact,
            amp=amp,
            metric=target.metrics[0],
            values=dict(scores.values) if scores.scored else {},
            groups={name: record.ImageGroup(value=v, scored=n) for name, (v, n) in scores.groups.items()},
            loss=None if target.sets is not None else predictions.loss,
            samples=target.index.num_samples,
            scored=scores.scored,
            bad=predictions.bad,
            processes=group.world_size,
            images_per_s=target.index.num_samples / seconds,
            finished=time.time(),
            code=brief_code(describe_code()),
            packages=describe_packages(),
        )
        if group.rank == 0:
            if request.predictions:
                Path(request.predictions).write_text(_table(target, predictions), encoding="utf-8")
            if said := found.save(weights.run.runs_url if weights.run else request.runs):
                log.warning("%s", said)
        yield found


def _input(request: EvaluationRequest, weights: Weights) -> tuple[Eval, record.Amp]:
    """Return how images are prepared, and the precision: as the weights' run has it, where the request says nothing."""
    recipe = weights.recipe
    own = weights.eval.model_dump()
    if recipe is not None and recipe.data.pipeline == "timm":
        own["exact"] = True
    asked = {key: getattr(request, key) for key in ("resolution", "crop", "interpolation") if getattr(request, key)}
    if request.exact is not None:
        asked["exact"] = request.exact
    return validate(Eval, own | asked, "evaluate"), request.amp or (recipe.train.amp if recipe else "off")


def _predict(
    request: EvaluationRequest,
    target: Target,
    weights: Weights,
    spec: Eval,
    amp: record.Amp,
    group: ProcessGroup,
    progress: Progress,
    agree: Callable[[], Cause | None],
) -> Predictions:
    device, index = group.device, target.index
    channels_last = weights.recipe.train.channels_last if weights.recipe else device.type == "cuda"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = _for_resolution(weights, spec.resolution).build().to(device, memory_format=layout)  # type: ignore[call-overload]
    reader = ShardReader(target.store, index)
    stream = EvalStream(reader, index, rank=group.rank, world_size=group.world_size, batch=request.batch_size)
    answers = logits_of(
        model,
        ThreadedBatches(
            stream, FastEval(spec), side=spec.resolution, threads=request.workers, pin=device.type == "cuda"
        ),
        stream,
        device=device,
        normalise=Normalise(weights.mean, weights.std, device, channels_last=channels_last),
        autocast=lambda: torch.autocast(device.type, dtype=AMP_DTYPE[amp], enabled=amp != "off"),
        agree=agree,
    )
    mine = stream.stop - stream.first
    try:
        with lost_peers_named():
            return gather(
                answers,
                total=index.num_samples,
                among=target.sets.among if target.sets is not None else None,
                group=group,
                progress=lambda done: progress(done, mine),
            )
    except torch.OutOfMemoryError as error:
        raise RsbError(f"out of memory with {request.batch_size} images: use a smaller --batch-size.") from error


def _for_resolution(weights: Weights, resolution: int) -> Weights:
    """Return weights for a network that takes images of a resolution: a vision transformer is built for one."""
    known = timm.get_pretrained_cfg(weights.architecture)
    fixed = known is not None and known.fixed_input_size and "dynamic_img_size" not in weights.kwargs
    if not fixed or resolution == weights.eval.resolution:
        return weights
    return replace(weights, kwargs={**weights.kwargs, "img_size": resolution})


def _scores(target: Target, predictions: Predictions) -> Scores:
    if target.sets is not None:
        return score_sets(predictions.best, target.sets)
    labels = target.index.labels.astype(np.int64)
    return score_classes(predictions.best, labels, target.metrics, target.index.num_classes)


def _table(target: Target, predictions: Predictions) -> str:
    """Return a line of CSV for each image: its key, the right classes, and the predicted ones, best first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", "labels", "predictions"])
    for i, best in enumerate(predictions.best.tolist()):
        right = target.sets.of(i).tolist() if target.sets is not None else [int(target.index.labels[i])]
        predicted = [number for number in best if number != UNDECODABLE]
        writer.writerow([target.index.key(i), " ".join(map(str, right)), " ".join(map(str, predicted))])
    return text.getvalue()


# --- a process of its own -----------------------------------------------------------------------------------------


def main() -> None:
    """Be one of the processes that `rsb_cluster.evaluation.launcher` starts.

    What to do comes as JSON on standard input. On standard output go lines of JSON: rank 0's progress and records, and
    the error of any rank.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes; one of them says what happened
    warnings.simplefilter("ignore")
    logging.basicConfig(format="%(message)s")
    asked = json.load(sys.stdin)
    rank, world_size = int(asked["rank"]), int(asked["world_size"])
    torch.set_num_threads(int(asked["threads"]))
    ranks = Ranks(rank, rank, world_size, "evaluate", 0, world_size)

    def say(**line: Any) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    def progress(done: int, total: int) -> None:
        if rank == 0:
            say(done=done, total=total)

    try:
        request = validate(EvaluationRequest, asked["request"], "the request")
        group = ProcessGroup(ranks, Store(asked["folder"]), wait_s=300, collective_s=600, gpus=asked["gpus"])
        for found in evaluate_sources(request, group, progress=progress):
            if rank == 0:
                say(evaluation=found.model_dump(mode="json"))
        group.leave_together()
        group.close()
    except RsbError as error:
        say(error=redact(str(error)), exit_code=error.exit_code)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
