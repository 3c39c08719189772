"""One run or more of every kind that a table can show."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rsb_cluster.runs.run import Run, Submission
from tests.unit.results.collect.made import a1, a_recipe, attempt, finish, finished, make_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """One run or more of every kind."""
    folder = tmp_path / "runs"
    ema = {"top1": 77.98, "top5": 93.75, "loss": 0.0024}
    code = {"code": {"version": "0.1.0", "commit": "0123456789abcdef", "uncommitted": "diff"}}
    lr = {"modified": {"optimizer.lr": (8e-3, 4e-3)}}
    found = [
        finish(make_run(folder, spec=code), 78.06, ema=ema),
        finish(
            make_run(folder, seed=1, spec=code),
            77.91,
            attempts=3,
            preemptions=2,
            goodput=0.9,
            gpu_hours=64.0,
            steps_repeated=1375,
        ),
        finish(make_run(folder, seed=2, spec=code), 78.13),
        finish(make_run(folder, a_recipe("optimizer.lr=4e-3"), tag="-lr", spec=lr), 77.5),
        finished(folder, 71.9, a1("resnet18")),
        finished(folder, 79.6, a1("resnet50"), gpu_hours=1440.5),
        finished(folder, 0.1, a1("resnet101"), loss=math.nan),
        finished(folder, 73.1, a_recipe("model.name=resnet34"), samples=49984),
        finished(folder, 97.0, a_recipe("name=mine", "paper=")),
        make_run(folder, seed=3),
        make_run(folder, seed=4),
        make_run(folder, seed=5),
        Run.at(folder, "a3-resnet50-s6"),
        make_run(folder, a1("resnet152")),
        finished(folder, 78.0, seed=7),
    ]
    attempt(found[9], cause="failed", message='loss is NaN, "twice"\n[red] | in a row', end_step=1250)
    attempt(found[10])
    found[11].add_submission(Submission(backend="slurm", job_id="4711", folder="f", shape="1x4", time=1e9))
    attempt(found[13], gpus=8, end_step=0)
    found[13].store.write_json("attempts/0001-alive.json", {"step": 700, "time": 1e9 + 3600, "beats": 360})
    found[14].store.write_bytes("result.json", b'{"top1": 78')
    return found
