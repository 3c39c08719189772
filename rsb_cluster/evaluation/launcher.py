"""Evaluates weights on this machine: validates the request, starts the processes, and collects their results."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rsb_cluster.config.schema import read_record
from rsb_cluster.errors import ConfigError, RsbError
from rsb_cluster.evaluation.record import Evaluation, EvaluationRequest
from rsb_cluster.evaluation.target import open_target
from rsb_cluster.interpreter import interpreter

Progress = Callable[[int, int], None]  # (images done, images in all)


def evaluate(request: EvaluationRequest, *, procs: int = 0, gpus: int = 0, progress: Progress) -> Iterator[Evaluation]:
    """Yield the evaluation of each source, after its record was written.

    Args:
        request: The request; ``workers`` are per process.
        procs: Number of processes on the CPU. 0 without ``gpus``: one, on the GPU if there is one.
        gpus: Number of processes, each on its own GPU.
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
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if procs else {})
    with tempfile.TemporaryDirectory(prefix="rsb-evaluate-") as folder:
        task = {"request": request.model_dump(mode="json"), "folder": folder, "world_size": count, "threads": share}
        task["gpus"] = 0 if procs else gpus or None
        with _processes(task, count, environment) as messages:
            for message in messages:
                if "error" in message:
                    kind = ConfigError if message["exit_code"] == ConfigError.exit_code else RsbError
                    raise kind(message["error"])
                if "done" in message:
                    progress(message["done"], message["total"])
                else:
                    yield read_record(Evaluation, message["evaluation"], "the evaluation")


@contextmanager
def _processes(task: dict[str, Any], count: int, environment: dict[str, str]) -> Iterator[Iterator[dict[str, Any]]]:
    """Start the processes and yield their messages until all have exited; kill the rest at the end."""
    command = [*interpreter(), "-m", "rsb_cluster.train.validation.evaluator"]
    received: queue.Queue[dict[str, Any]] = queue.Queue()
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env=environment, **pipe) for _ in range(count)]  # type: ignore[call-overload]

    def listen(rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        with process.stdin:
            process.stdin.write(json.dumps(task | {"rank": rank}))
        for line in process.stdout:
            received.put(json.loads(line))
        received.put({"exited": rank, "code": process.wait()})

    def messages() -> Iterator[dict[str, Any]]:
        running = count
        while running:
            message = received.get()
            if "exited" not in message:
                yield message
            elif code := message["code"]:
                raise RsbError(f"process {message['exited']} of {count} exited with code {code}. See its output above.")
            else:
                running -= 1

    threads = [threading.Thread(target=listen, args=item, daemon=True) for item in enumerate(started)]
    for thread in threads:
        thread.start()
    try:
        yield messages()
    finally:
        for process in started:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join()
