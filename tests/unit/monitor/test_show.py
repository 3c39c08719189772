"""The page on one run."""

import json

import pytest

from rsb_cluster.errors import MissingError
from rsb_cluster.monitor.show import read_page
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.checkpoint import CheckpointId
from rsb_cluster.runs.run import Attempt, Submission
from tests.unit.new_runs import make_run
from tests.unit.sweeps import finish


def test_it_has_what_is_trained_by_which_jobs_and_how_each_attempt_ended(tmp_path):
    run = make_run(tmp_path / "runs")
    spec = run.spec().model_copy(update={"modified": {"optimizer.lr": (0.005, 0.004)}, "packages": {"torch": "2.8.0"}})
    run.store.write_json("spec.json", spec.model_dump(mode="json"))
    job = {"name": "gpu", "time_min": 90}
    run.add_submission(
        Submission(backend="local", job_id="h-12-3-0123abcd", folder="/logs/x", shape="1 node × 4 GPUs", time=1e9,
                   job=job, user="ann", data="s3://b/digits")
    )  # fmt: skip
    for number, (start, end, cause, message) in enumerate(((0, 20, "preempted", ""), (20, 30, "failed", "bad [1]")), 1):
        run.write_attempt(
            Attempt(number=number, job_id="h-12-3-0123abcd", world_size=4, hosts=("n1", "n2"), gpus=4,
                    started=1e9 + number * 3600, ended=1e9 + number * 3600 + 1800, start_step=start, end_step=end,
                    cause=cause, message=message)  # type: ignore[arg-type]
        )  # fmt: skip
    rows = [{"kind": "eval", "step": 20, "epoch": 0.9, "top1": 50.0, "top5": 90.0, "loss": 2.0}]
    run.store.write_bytes("metrics/0001-000000.jsonl", (json.dumps(rows[0]) + "\n").encode())
    saved = {"m": b"1" * 2000}
    checkpoint.write(run.store.child("checkpoints"), CheckpointId(20, 1), saved, before_manifest=lambda: None)
    page = read_page(run)
    assert page.facts["state"].startswith("failed: bad [1]\nstep 20 of 550")
    assert page.facts["modified"] == "optimizer.lr: 0.005 → 0.004" and page.facts["data"] == "s3://b/digits"
    assert page.facts["job"] == (
        "job h-12-3-0123abcd on local (gpu): 1 node × 4 GPUs, time limit 1:30:00, "
        "submitted 2001-09-09 01:46:40 by ann\n  scripts and logs: /logs/x"
    )
    assert page.facts["cost"] == "4.0 GPU-hours, 1:00:00 h in 2 attempts, 1 preempted"
    assert page.facts["checkpoints"] == "step-00000020-a0001" and page.facts["code"] == "torch 2.8.0"
    assert page.attempts[1] == {
        "#": "2", "job": "pid 12", "hosts": "n1 +1", "ranks": "4", "started (UTC)": "09-09 03:46",
        "duration": "0:30:00", "steps": "20-30", "end": "failed: bad [1]",
    }  # fmt: skip
    assert page.evaluations == ({"step": "20", "epoch": "0.9", "top-1": "50.00", "top-5": "90.00", "loss": "2.0000"},)
    assert {row["files"] for row in page.files} >= {"attempts/", "checkpoints/", "metrics/", "spec.json", "total"}
    assert json.loads(json.dumps(page.values))["attempts"][0]["cause"] == "preempted"
    assert "score" not in page.facts
    finish(run)
    assert read_page(run).facts["state"].startswith("finished\nstep 550 of 550")


def test_of_a_run_that_is_not_there_the_path_is_named(tmp_path):
    run = make_run(tmp_path / "runs")
    (tmp_path / "runs" / run.run_id / "spec.json").unlink()
    with pytest.raises(MissingError, match=r"spec\.json"):
        read_page(run)
