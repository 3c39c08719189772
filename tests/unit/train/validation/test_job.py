"""An evaluation as a job, in this process: it goes on after a preemption, and a failed one says why."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from rsb_cluster.config.catalog import load_job
from rsb_cluster.data.make import make_set
from rsb_cluster.evaluation.jobs import read_result
from rsb_cluster.evaluation.record import EvaluationRequest, read_evaluations
from rsb_cluster.monitor.status import read_status
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.runs.run import Cause, Run
from rsb_cluster.storage.store import Store
from rsb_cluster.submission import evaluation
from rsb_cluster.train.logfile import logging_to
from rsb_cluster.train.validation.job import EvaluationAttempt
from tests.faults.lab import TINY, StopAfter, few_digits, new_run

JOB, _ = load_job("local")


@pytest.fixture
def planned(tmp_path: Path) -> evaluation.PlannedEvaluation:
    """A run with random weights that is to be evaluated on its own images, and on a copy of them with another crop."""
    make_set(few_digits(), Store(tmp_path / "data" / "digits"))
    shutil.copytree(tmp_path / "data" / "digits", tmp_path / "data" / "copy")
    run = new_run(tmp_path / "runs" / "digits-test_resnet-s0-12345678", tmp_path / "data" / "digits", *TINY)
    weights = safetensors.torch.save(timm.create_model("test_resnet", num_classes=10).state_dict())
    saved = run.store.child("checkpoints", "step-00000006-a0001")
    saved.write_bytes("model", weights)
    files = {
        "model.safetensors": {"file": "model", "sha256": hashlib.sha256(weights).hexdigest(), "size": len(weights)}
    }
    saved.write_json("manifest.json", {"files": files})
    runs = str(tmp_path / "runs")
    requests = [
        EvaluationRequest(
            sources=(run.run_id,), runs=runs, data=str(tmp_path / "data" / name), crop=crop, batch_size=16
        )
        for name, crop in (("digits", 1.0), ("copy", 0.9))
    ]
    (one,) = evaluation.plan(requests, JOB)
    one.run.store.make_folder(0o700)
    one.run.store.create_json("spec.json", one.spec.model_dump(mode="json"))
    return one


def start(run: Run, restart: int, flag: StopFlag | None = None) -> Cause:
    torch.set_num_threads(1)
    ranks = Ranks(0, 0, world_size=1, job_id="j", restart=restart, allocated=1)
    with logging_to(run.store, ranks) as log_file:
        return EvaluationAttempt(run, JOB, ranks, flag or StopFlag(), log_file).run()


def test_a_preempted_evaluation_goes_on_where_it_was_and_a_failed_one_says_why(
    planned: evaluation.PlannedEvaluation, tmp_path: Path
) -> None:
    run = planned.run
    assert run.is_evaluation and planned.spec.images == 64
    # Two batches a set: the flag is set in the second set.
    assert start(run, 0, StopAfter(3)) == "preempted"
    (first,) = run.attempts()
    assert (first.cause, first.start_step, first.end_step) == ("preempted", 0, 1)
    assert read_result(run) is None and read_status([run])[0].state == "preempted"

    index = tmp_path / "data" / "copy" / "val" / "index.npz"
    index.rename(index.with_suffix(".away"))
    assert start(run, 1) == "failed"
    (status,) = read_status([run])
    assert status.state == "failed" and "there are no shards with an index" in status.cause
    index.with_suffix(".away").rename(index)

    before = (run.store.locate("evaluated/0000.json"), run.store.read_json("evaluated/0000.json"))
    assert start(run, 0) == "finished"
    assert run.attempts()[-1].start_step == 1, "the first set is not evaluated again"
    assert run.store.read_json("evaluated/0000.json") == before[1]
    result = read_result(run)
    assert result is not None and result.attempts == 3
    records, problems = read_evaluations(str(tmp_path / "runs"))
    assert not problems and sorted(r.name for r in records) == sorted(e.name for e in result.evaluations)
    assert {e.run_id for e in result.evaluations} == {"digits-test_resnet-s0-12345678"}
    (status,) = read_status([run])
    assert (status.state, status.step, status.total_steps) == ("finished", 64, 64)
    assert status.top1 == result.evaluations[0].values["top1"]
