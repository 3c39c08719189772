"""Evaluates weights on this machine: validates the request, starts the processes, and collects their results."""

from __future__ import annotations

import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rsb_cluster.config.schema import read_record
from rsb_cluster.errors import ConfigError
from rsb_cluster.evaluation.record import Evaluation, EvaluationRequest
from rsb_cluster.evaluation.target import open_target
from rsb_cluster.subprocesses.helper import Helper, Message

Progress = Callable[[int, int], None]  # (images done, images in all)

_MODULE = "rsb_cluster.train.validation.evaluator"


def evaluate(
    request: EvaluationRequest,
    *,
    procs: int = 0,
    gpus: int = 0,
    hold: Callable[[], AbstractContextManager[None]] = nullcontext,
    progress: Progress,
) -> Iterator[Evaluation]:
    """Yield the evaluation of each source, after its record was written.

    Args:
        request: The request; ``workers`` are per process.
        procs: Number of processes on the CPU. 0 without ``gpus``: one, on the GPU if there is one.
        gpus: Number of processes, each on its own GPU.
        hold: Returns the context in which the processes run: it holds the GPUs that they use.
        progress: Called regularly with the progress of one process.

    Raises:
        ConfigError: The request is invalid.
        RsbError: A process failed.
    """
    if procs and gpus:
        raise ConfigError("--procs is for the CPU and --gpus for GPUs. Use one of them.")
    if request.predictions and len(request.sources) > 1:
        raise ConfigError("--save-predictions is for one SOURCE: each would write the same file.")
    if request.predictions:
        file = Path(request.predictions)
        if file.is_dir() or not file.parent.is_dir():
            why = "is a folder" if file.is_dir() else "is in a folder that does not exist"
            raise ConfigError(f"--save-predictions: {file} {why}. Name a file.")
    open_target(request)  # fails before torch is imported, which takes seconds
    count, cores = procs or gpus or 1, len(os.sched_getaffinity(0))
    share = max(1, cores // count)
    request = request.model_copy(update={"workers": request.workers or share})
    # GPUs are locked by their numbers in the order of the PCI bus.
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"} | os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if procs else {})
    with hold(), tempfile.TemporaryDirectory(prefix="rsb-evaluate-") as folder:
        task = {"request": request.model_dump(mode="json"), "folder": folder, "world_size": count, "threads": share}
        task["gpus"] = 0 if procs else gpus or None
        with _processes(task, count, environment) as messages:
            for message in messages:
                if "done" in message:
                    progress(message["done"], message["total"])
                else:
                    yield read_record(Evaluation, message["evaluation"], "the evaluation")


@contextmanager
def _processes(task: dict[str, Any], count: int, environment: dict[str, str]) -> Iterator[Iterator[Message]]:
    """Start the processes and yield their messages until all have ended or one has failed; kill the rest."""
    received: queue.Queue[Message | Exception | None] = queue.Queue()

    def listen(helper: Helper) -> None:
        try:
            for message in helper.messages():
                received.put(message)
            received.put(None)
        except Exception as error:  # of any kind: who waits for the queue must hear of it
            received.put(error)

    def messages() -> Iterator[Message]:
        running = count
        while running:
            message = received.get()
            if isinstance(message, Exception):
                raise message
            if message is None:
                running -= 1
            else:
                yield message

    helpers: list[Helper] = []
    threads: list[threading.Thread] = []
    try:
        for rank in range(count):
            doing = "the evaluation" if count == 1 else f"process {rank} of {count} of the evaluation"
            helpers.append(Helper(_MODULE, task | {"rank": rank}, doing=doing, env=environment, show=True))
        threads = [threading.Thread(target=listen, args=(helper,), daemon=True) for helper in helpers]
        for thread in threads:
            thread.start()
        yield messages()
    finally:
        for helper in helpers:
            helper.kill()
        for thread in threads:
            thread.join()
        for helper in helpers:
            helper.close()
