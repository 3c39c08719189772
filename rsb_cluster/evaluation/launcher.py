"""Evaluating weights on this machine: check what can be checked, start the processes, and pass on what they say."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
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

Progress = Callable[[int, int], None]  # (images done, images in all)


def evaluate(request: EvaluationRequest, *, procs: int = 0, gpus: int = 0, progress: Progress) -> Iterator[Evaluation]:
    """Yield the evaluation of each source; the records are written by then.

    Args:
        request: What to do; its ``workers`` are shared by the processes.
        procs: Processes on the CPU. 0, with no ``gpus``: one, on the GPU where there is one.
        gpus: Processes, each on a GPU of its own.
        progress: Called now and then with what one process has done.

    Raises:
        ConfigError: Something that was asked for does not fit.
        RsbError: A process failed.
    """
    if procs and gpus:
        raise ConfigError("--procs is for the CPU and --gpus for GPUs; give one of them.")
    if request.predictions and len(request.sources) > 1:
        raise ConfigError("--save-predictions is for one SOURCE: each would write the same file.")
    if request.predictions:
        file = Path(request.predictions)
        if file.is_dir() or not file.parent.is_dir():
            why = "is a folder" if file.is_dir() else "lies in no folder that is there"
            raise ConfigError(f"--save-predictions: {file} {why}. Name a file.")
    open_target(request)  # refuses what is missing before torch is imported, which takes seconds
    count, cores = procs or gpus or 1, len(os.sched_getaffinity(0))
    share = max(1, cores // count)
    request = request.model_copy(update={"workers": request.workers or share})
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if procs else {})
    with tempfile.TemporaryDirectory(prefix="rsb-evaluate-") as folder:
        asked = {"request": request.model_dump(mode="json"), "folder": folder, "world_size": count, "threads": share}
        asked["gpus"] = 0 if procs else gpus or None
        with _processes(asked, count, environment) as lines:
            for line in lines:
                if "error" in line:
                    raise (ConfigError if line["exit_code"] == ConfigError.exit_code else RsbError)(line["error"])
                if "done" in line:
                    progress(line["done"], line["total"])
                else:
                    yield read_record(Evaluation, line["evaluation"], "the evaluation")


@contextmanager
def _processes(asked: dict[str, Any], count: int, environment: dict[str, str]) -> Iterator[Iterator[dict[str, Any]]]:
    """Run the processes, and give the lines that they say until all have ended well; the rest are ended with it."""
    command = [sys.executable, "-m", "rsb_cluster.train.validation.evaluator"]
    said: queue.Queue[dict[str, Any]] = queue.Queue()
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=environment, **pipe) for _ in range(count)]  # type: ignore[call-overload]

    def listen(rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        with process.stdin:
            process.stdin.write(json.dumps(asked | {"rank": rank}))
        for line in process.stdout:
            said.put(json.loads(line))
        said.put({"ended": process.wait(), "rank": rank})

    def lines() -> Iterator[dict[str, Any]]:
        left = count
        while left:
            line = said.get()
            if "ended" not in line:
                yield line
            elif line["ended"]:
                raise RsbError(f"process {line['rank']} of {count} ended with code {line['ended']}; see what it said.")
            else:
                left -= 1

    threads = [threading.Thread(target=listen, args=item, daemon=True) for item in enumerate(running)]
    for thread in threads:
        thread.start()
    try:
        yield lines()
    finally:
        for process in running:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join()
