"""Evaluates weights on a part of a data set, on one of several processes; also the program of each such process."""

from __future__ import annotations

import csv
import io
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from rsb_cluster.config.recipe import Data, Eval
from rsb_cluster.config.schema import validate
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.data.scoring import UNDECODABLE, Scores, score_classes, score_sets
from rsb_cluster.errors import RsbError
from rsb_cluster.evaluation import record
from rsb_cluster.evaluation.record import Evaluation, EvaluationRequest
from rsb_cluster.evaluation.target import Target, check_classes, choose_target_classes, open_target
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.runs.provenance import brief_code, describe_code, describe_packages
from rsb_cluster.runs.run import Cause
from rsb_cluster.storage.store import Store
from rsb_cluster.subprocesses.helper import Send, serve
from rsb_cluster.train.augment import Normalise
from rsb_cluster.train.conversion.hub import fetch
from rsb_cluster.train.conversion.state_dict import Weights, read_weights
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.input.loader import ThreadedBatches
from rsb_cluster.train.input.pixels.transforms import FastEval
from rsb_cluster.train.input.streams import EvalStream
from rsb_cluster.train.lost_peer import lost_peer_errors
from rsb_cluster.train.model import AMP_DTYPE
from rsb_cluster.train.validation.predictions import Predictions, gather_predictions
from rsb_cluster.train.validation.validate import predict_logits
from rsb_cluster.weights.resolve import find_weights

log = logging.getLogger(__name__)

_CHANNELS = ("mean", "std")

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
        request: The request.
        group: The processes; each calls this.
        progress: Called after each batch.
        agree: Called by all ranks after each batch; a cause ends the evaluation.

    Raises:
        EvaluationStopped: The ranks agreed on a cause.
        ConfigError: A source is unknown, its classes differ from those of the data, or it does not accept such images.
    """
    whole = open_target(request)
    for source in request.sources:
        found = find_weights(source, request.runs, ema=bool(request.ema), fetch=fetch)
        weights = read_weights(found, request.model, request.ema)
        target = choose_target_classes(whole, weights.recipe.data.classes if weights.recipe else (), request.metric)
        check_classes(weights.name, weights.num_classes, weights.classes, target)
        spec, amp = _input(request, weights)
        if group.rank == 0 and len(weights.entries) > 1 and request.ema is None:
            log.warning(
                "%s holds %s: %s is evaluated. --ema and --no-ema choose.",
                weights.name,
                " and ".join(weights.entries),
                weights.entry,
            )
        own, weights = weights, _with_normalization(request, weights, target, warn=group.rank == 0)
        overrides: dict[str, Any] = {
            name: getattr(weights, name) for name in _CHANNELS if getattr(weights, name) != getattr(own, name)
        }
        if weights.entries and weights.entry != weights.entries[0]:
            overrides["entry"] = weights.entry
        started = time.monotonic()
        predictions = _predict(request, target, weights, spec, amp, group, progress, agree)
        seconds = time.monotonic() - started
        if not math.isfinite(predictions.loss):
            raise RsbError(
                f"the outputs of {weights.name} are not finite, so its predictions mean nothing: its weights overflow, "
                + ("in this precision. Use --amp off or bf16." if amp == "fp16" else "as of a training that diverged.")
            )
        scores = _scores(target, predictions)
        evaluation = Evaluation(
            weights=weights.name,
            weights_digest=weights.digest,
            weights_url=weights.url,
            model=weights.architecture,
            procedure=weights.found.procedure,
            run_id=weights.run.run_id if weights.run else "",
            step=weights.step,
            ema=weights.is_ema,
            entry=weights.entry,
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
            mean=weights.mean,
            std=weights.std,
            normalization=", ".join(f"{name}: {weights.said_by[name]}" for name in _CHANNELS),
            overrides=overrides,
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
            if problem := evaluation.save(weights.run.runs_url if weights.run else request.runs):
                log.warning("%s", problem)
        yield evaluation


def _input(request: EvaluationRequest, weights: Weights) -> tuple[Eval, record.Amp]:
    """Return how images are prepared, and the precision: from the request, or else from the weights' run."""
    recipe = weights.recipe
    default = weights.eval.model_dump()
    if recipe is not None and recipe.data.pipeline == "timm":
        default["exact"] = True
    changes = {key: getattr(request, key) for key in ("resolution", "crop", "interpolation") if getattr(request, key)}
    if request.exact is not None:
        changes["exact"] = request.exact
    return validate(Eval, default | changes, "evaluate"), request.amp or (recipe.train.amp if recipe else "off")


def _with_normalization(request: EvaluationRequest, weights: Weights, target: Target, *, warn: bool) -> Weights:
    """Return weights with the mean and standard deviation to use, each with what says it.

    In this order: the option, the weights' run or config.json, the data set's entry, timm's default for the
    architecture. The last is a guess, with a warning. Where timm trains an architecture with other values than
    ImageNet's (many transformers), an entry with ImageNet's says nothing about it.
    """
    used, said_by, guessed = {}, {}, []
    for name in _CHANNELS:
        asked, own, of_set = getattr(request, name), getattr(weights, name), getattr(target.known, name, None)
        imagenets = Data.model_fields[name].default
        if asked is not None:
            used[name], said_by[name] = asked, f"--{name}"
        elif name in weights.said_by:
            used[name], said_by[name] = own, weights.said_by[name]
        elif of_set is not None and (own == imagenets or of_set != imagenets):
            used[name], said_by[name] = of_set, f"the data set {target.name}"
        else:
            used[name] = own
            said_by[name] = "ImageNet's" if own == imagenets else f"timm's default for {weights.architecture}"
            guessed.append(name)
    if guessed and warn:
        log.warning(
            "%s: nothing says with which %s it was trained. Assumed: %s. If that is wrong, so is the result: use %s.",
            weights.name,
            " and ".join(guessed),
            ", ".join(
                f"{name} {','.join(f'{value:.4g}' for value in used[name])} ({said_by[name]})" for name in guessed
            ),
            " and ".join(f"--{name} R,G,B" for name in guessed),
        )
    return replace(weights, **used, said_by=said_by)


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
    outputs = predict_logits(
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
    local_total = stream.stop - stream.first
    try:
        with lost_peer_errors():
            return gather_predictions(
                outputs,
                total=index.num_samples,
                allowed=target.sets.among if target.sets is not None else None,
                group=group,
                progress=lambda done: progress(done, local_total),
            )
    except torch.OutOfMemoryError as error:
        raise RsbError(f"out of memory with {request.batch_size} images: use a smaller --batch-size.") from error


def _for_resolution(weights: Weights, resolution: int) -> Weights:
    """Return weights for a network with an input resolution, as a vision transformer is built for one resolution."""
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
    """Return a CSV table of the images: the key, the correct classes, and the predicted classes, best first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["key", "labels", "predictions"])
    for i, best in enumerate(predictions.best.tolist()):
        correct = target.sets.of(i).tolist() if target.sets is not None else [int(target.index.labels[i])]
        predicted = [number for number in best if number != UNDECODABLE]
        writer.writerow([target.index.key(i), " ".join(map(str, correct)), " ".join(map(str, predicted))])
    return text.getvalue()


# --- the program of a process -------------------------------------------------------------------------------------


def main() -> None:
    """Run one of the processes that `rsb_cluster.evaluation.launcher` starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes; the launcher reports it
    logging.basicConfig(format="%(message)s")
    serve(_work)


def _work(task: Mapping[str, Any], send: Send) -> None:
    """Evaluate as one of several processes; rank 0 sends its progress and the records."""
    rank, world_size = int(task["rank"]), int(task["world_size"])
    torch.set_num_threads(int(task["threads"]))
    ranks = Ranks(rank, rank, world_size, "evaluate", 0, world_size)

    def progress(done: int, total: int) -> None:
        if rank == 0:
            send(done=done, total=total)

    request = validate(EvaluationRequest, task["request"], "the request")
    group = ProcessGroup(ranks, Store(task["folder"]), wait_s=300, collective_s=600, gpus=task["gpus"])
    for evaluation in evaluate_sources(request, group, progress=progress):
        if rank == 0:
            send(evaluation=evaluation.model_dump(mode="json"))
    group.exit_together()
    group.close()


if __name__ == "__main__":
    main()
