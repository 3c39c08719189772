"""On which data runs are evaluated, and the jobs that do it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from rsb_cluster.config.catalog import load_job
from rsb_cluster.data.make import make_set
from rsb_cluster.errors import CheckpointError, ConfigError, DataError, RefusedError
from rsb_cluster.evaluation.record import EvaluationRequest
from rsb_cluster.monitor.status import find_status
from rsb_cluster.runs.run import Run, Submission
from rsb_cluster.runs.sweep import Member, Sweep, write_sweep
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.evaluation import by_data, evaluation_job, expand_sources, own_data, plan, submit
from rsb_cluster.submission.site import Site
from tests.faults.lab import TINY, few_digits, new_run

LOCAL, _ = load_job("local")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_set(few_digits(), Store(tmp_path / "data"))
    return tmp_path / "data"


def saved_run(tmp_path: Path, data: Path, name: str) -> Run:
    """A run with a checkpoint, as far as it is looked at before a submit."""
    run = new_run(tmp_path / "runs" / name, data, *TINY)
    folder = run.store.child("checkpoints", "step-00000006-a0001")
    folder.write_bytes("model", name.encode())
    files = {"model.safetensors": {"file": "model", "sha256": hashlib.sha256(name.encode()).hexdigest(), "size": 1}}
    folder.write_json("manifest.json", {"files": files})
    return run


def test_a_run_knows_its_data_and_says_when_they_are_gone_or_others(tmp_path: Path, data: Path) -> None:
    run, runs = saved_run(tmp_path, data, "digits-test_resnet-s0-00000001"), str(tmp_path / "runs")
    assert own_data("digits", runs) == str(data)
    moved = data.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=rf"were in {data} .*index.npz is not there now.*--data"):
        own_data("digits", runs)
    run.add_submission(Submission(backend="local", job_id="1", folder="", shape="", time=1.0, data=str(moved)))
    assert own_data("digits", runs) == str(moved)
    assert by_data(["digits", run.url], "", runs) == {str(moved): ["digits", run.url]}
    shutil.copy(moved / "train" / "index.npz", moved / "val" / "index.npz")
    with pytest.raises(DataError, match=f"val has changed since .*--data {moved}"):
        own_data("digits", runs)
    assert by_data(["digits"], "elsewhere", runs) == {"elsewhere": ["digits"]}
    with pytest.raises(ConfigError, match="only a run knows its data"):
        own_data("resnet50.a1_in1k", runs)


def test_a_sweep_and_a_glob_stand_for_their_runs(tmp_path: Path, data: Path) -> None:
    runs = [saved_run(tmp_path, data, f"digits-test_resnet-s{seed}-0000000{seed}") for seed in range(2)]
    ids = [run.run_id for run in runs] + ["digits-test_resnet-s2-00000002"]
    members = tuple(Member(run_id=one, recipe="digits", model="test_resnet", seed=i) for i, one in enumerate(ids))
    url = str(tmp_path / "runs")
    write_sweep(url, Sweep(sweep_id="trial-0abc", file="", created=0.0, members=members))
    for name in ("trial", "trial-0abc"):
        found, notes = expand_sources([name, "resnet50.a1_in1k"], url)
        assert found == [runs[0].url, runs[1].url, "resnet50.a1_in1k"]
        assert notes == [f"{ids[2]} is left out: it has no checkpoint yet"]
    assert expand_sources(["*-s1-*", "digits-test_resnet-s0"], url)[0] == [runs[1].url, "digits-test_resnet-s0"]
    shutil.rmtree(runs[1].url + "/checkpoints")
    with pytest.raises(CheckpointError, match="s1-00000001 is left out"):
        expand_sources(["*-s1-*"], url)


def test_the_job_is_one_node_with_the_gpus_that_were_asked_for(tmp_path: Path) -> None:
    one = evaluation_job("slurm", Site(partition="gpu", qos="short", time_min=30, gpu_type="a100"))
    assert (one.nodes, one.gpus_per_node, one.ranks_per_node, one.time_min, one.gpu_type) == (1, 1, 1, 30, "a100")
    assert one.slurm == {"partition": "gpu", "qos": "short"}
    assert evaluation_job("slurm", Site(), gpus=4).ranks_per_node == 4
    assert evaluation_job("cloud-spot", Site(), gpus=2).cloud.accelerators == "H100:2"
    (tmp_path / "mine.toml").write_text(
        (load_job("slurm")[1].read_text()).replace("gpus_per_node = 8", "gpus_per_node = 8\nmem_gb = 400.0")
    )
    assert evaluation_job(str(tmp_path / "mine.toml"), Site(), gpus=2).mem_gb == 100
    on_cpus = evaluation_job("slurm-cpu", Site(), procs=3)
    assert (on_cpus.gpus_per_node, on_cpus.ranks_per_node) == (0, 3)
    with pytest.raises(ConfigError, match="--partition is for Slurm, and job 'local'"):
        evaluation_job("local", Site(partition="gpu"))
    with pytest.raises(ConfigError, match="--procs is for the CPU"):
        evaluation_job("local", Site(), procs=1, gpus=1)


def test_the_job_is_for_the_account_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RSB_ACCOUNT", "vision")
    monkeypatch.setenv("RSB_PARTITION", "gpu")
    assert evaluation_job("slurm", Site(partition="long")).slurm == {"account": "vision", "partition": "long"}
    assert evaluation_job("local", Site()).slurm == {}


def test_the_same_evaluation_is_one_job_and_other_weights_another(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, runs = saved_run(tmp_path, data, "digits-test_resnet-s0-00000001"), str(tmp_path / "runs")
    asked = EvaluationRequest(sources=(run.run_id,), runs=runs, data=str(data))
    (one,) = plan([asked], LOCAL)
    assert one.state == "new" and one.should_submit
    assert one.run.run_id.startswith(f"eval-{run.run_id}-digits-") and one.spec.images == 32
    (again,) = plan([asked.model_copy(update={"batch_size": 7})], LOCAL)
    assert again.run.url == one.run.url, "the batch size changes no result"
    assert plan([asked.model_copy(update={"crop": 0.9})], LOCAL)[0].run.url != one.run.url
    (request,) = one.spec.requests
    assert (request.sources, request.data) == ((run.url,), f"{data}/val"), "a node has another working folder"

    def refuse(*_: object) -> None:
        raise RefusedError("no such partition")

    monkeypatch.setattr("rsb_cluster.backends.local.Local.submit", refuse)
    with pytest.raises(RefusedError):
        submit([one], LOCAL)
    assert not one.run.store.exists(), "nothing is left of it"
    # Nothing is to start: what the scheduler says is not this test's matter.
    sent = Submission(backend="local", job_id="7", folder=str(tmp_path), shape="", time=1.0)
    monkeypatch.setattr("rsb_cluster.backends.local.Local.submit", lambda self, job, tasks, *_: [sent for _ in tasks])
    submit([one], LOCAL)
    assert [status.run_id for status in find_status(runs, ())[1]] == [run.run_id, one.run.run_id]
    assert [status.run_id for status in find_status(runs, ("eval-digits*",))[1]] == [one.run.run_id]
    assert [status.run_id for status in find_status(runs, ("digits",))[1]] == [run.run_id]
    assert plan([asked], LOCAL)[0].state == "unfinished"
    monkeypatch.setattr("rsb_cluster.backends.states", lambda submissions: ["queued" for _ in submissions])
    (queued,) = plan([asked], LOCAL)
    assert queued.state == "already submitted" and submit([queued], LOCAL) == []


def test_what_a_cloud_cannot_read_is_refused_before_anything_is_made(tmp_path: Path, data: Path) -> None:
    run = saved_run(tmp_path, data, "digits-test_resnet-s0-00000001")
    asked = EvaluationRequest(sources=(run.run_id,), runs=str(tmp_path / "runs"), data=str(data))
    job = evaluation_job("cloud-spot", Site())
    with pytest.raises(ConfigError, match=f"cloud machines cannot read {data}/val"):
        plan([asked], job)
    with pytest.raises(ConfigError, match="--save-predictions is for one SOURCE"):
        plan([asked.model_copy(update={"predictions": "p.csv"})], job)
