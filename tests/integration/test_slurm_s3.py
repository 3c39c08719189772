"""Training on a real Slurm, with data and runs on a real S3 server."""

from pathlib import Path

import pytest

from rsb_cluster.runs.metrics import read_rows
from rsb_cluster.runs.run import Run
from tests.command import RsbCluster
from tests.faults.victim import on_slurm
from tests.servers.s3 import S3Server
from tests.servers.slurm import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.s3]


@pytest.fixture
def on_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """This process may read the S3 server, too."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return s3


# Recipe, steps that it is held at before the preemption and in all, images that are evaluated, and the least top-1, %.
SIZES = {"digits": (30, 176, 359, 80.0), "fashion-mnist": (30, 468, 10_000, 85.0)}


@pytest.mark.parametrize("recipe", ["digits", pytest.param("fashion-mnist", marks=pytest.mark.long)])
def test_preempted_run_on_four_nodes_finishes_without_repeating_a_step(
    recipe: str, tmp_path: Path, slurm: SlurmCluster, on_s3: S3Server, s3_bucket: str, request: pytest.FixtureRequest
) -> None:
    """The digits; and all of FashionMNIST, some minutes long."""
    pause, total, images, least = SIZES[recipe]
    shards = request.getfixturevalue(recipe.replace("-", "_"))
    rsb = RsbCluster(tmp_path, slurm.env | on_s3.env)
    rsb.hold()
    data, runs = f"s3://{s3_bucket}/{recipe}", f"s3://{s3_bucket}/runs"
    on_s3.upload(shards, data)

    run_id = rsb(
        "submit", "--recipe", recipe, "--job", "slurm-cpu", "--nodes", "4", "--data", data, "--runs", runs,
        "--set", f"schedule.epochs={2 if recipe == 'fashion-mnist' else 8}", "--set", "job.slurm.partition=spot",
        "--set", "job.log_every_steps=5",
    ).strip()  # fmt: skip
    run = Run.at(runs, run_id)
    on_slurm(rsb, run, slurm).wait_for_steps(1, pause)
    urgent = slurm.run(
        "sbatch", "--parsable", "-N4", "--exclusive", "-p", "main", "--wrap", "srun sleep 2", "-o", "/dev/null"
    ).strip()
    slurm.wait_for_state(urgent, "COMPLETED")
    rsb.allow()
    slurm.wait_for("the run is finished", run.result)

    attempts, rows, result = run.attempts(), read_rows(run), run.result()
    assert [a.cause for a in attempts] == ["preempted", "finished"]
    assert pause <= attempts[0].end_step == attempts[1].start_step < total
    assert len(attempts[0].hosts) == 1 and attempts[0].world_size == 4  # four nodes on one machine
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == total
    assert {row["attempt"] for row in rows} == {1, 2}
    assert result is not None and result["preemptions"] == 1
    assert result["samples"] == images
    assert result["top1"] >= least
    secret = on_s3.env["AWS_SECRET_ACCESS_KEY"].encode()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("submitted.pkl" in path.name for path in written)
    assert not [path for path in written if secret in path.read_bytes()], "no credential in a script or a log"
    assert not [name for name in run.store.files() if secret in run.store.read_bytes(name)]

    rsb("shards", "verify", data)
    (again,) = rsb.json("evaluate", run_id, "--data", data, "--procs", "2", "--runs", runs, "--json")
    assert (again["samples"], again["scored"], again["bad"]) == (images, images, 0)
    assert again["values"]["top1"] == pytest.approx(result["top1"], abs=0.02)  # batches of another size
    (line,) = rsb.json("collect", "--runs", runs, "--format", "json")["evaluations"]
    assert [row["values"]["top1"] for row in line["evaluations"]] == [again["values"]["top1"]]
