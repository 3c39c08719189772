"""Data, runs and a queued Slurm job of the version before the package had folders.

It was made by that version (commit 5f7d32d) from scikit-learn's digits with a network of 2,000 weights: a run that was
preempted after step 7 and is queued, and one that has finished and was evaluated.
"""

import sys
import tarfile
from pathlib import Path

import pytest

from rsb_cluster.runs.metrics import read_rows
from rsb_cluster.runs.run import Run
from tests.command import RsbCluster
from tests.integration.test_slurm import wait
from tests.servers.slurm import SlurmCluster

pytestmark = pytest.mark.slurm

HERE = Path(__file__).parent
WAITING, FINISHED = "digits-test_resnet-s0-1d412940", "digits-test_resnet-s1-ad5864dd"
STOOD_IN = "/" + "x" * 119  # for the folder of all, in every file


def unpack(folder: Path, python: str) -> None:
    """Unpack the archive as if all had been made in a folder; lengths stay, as there is a pickle among the files."""
    where = str(folder)
    where += "/." * ((len(STOOD_IN) - len(where)) // 2)
    where = where.replace("/", "//", len(STOOD_IN) - len(where))
    assert len(where) == len(STOOD_IN)
    with tarfile.open(HERE / "earlier_version.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes().replace(STOOD_IN.encode(), where.encode())
            file.write_bytes(content.replace(b"PYTHON", python.encode()))


def test_a_queued_job_is_resumed_and_all_is_collected(tmp_path: Path, slurm: SlurmCluster) -> None:
    rsb = RsbCluster(tmp_path, slurm.env)
    unpack(tmp_path, sys.executable)
    states = {s["run_id"]: s["state"] for s in rsb.json("status", "--json")}
    # What this Slurm's accounting says of a job of that number is of another test's.
    assert states.pop(WAITING) in ("gone", "preempted", "cancelled") and states == {FINISHED: "finished"}

    (folder,) = (tmp_path / "runs" / "submissions").iterdir()
    assert b"rsb_cluster.task" in (folder / "7_submitted.pkl").read_bytes()
    # The job was number 7 of its Slurm, which would start it.
    job = slurm.run("sbatch", "--parsable", "--hold", str(folder / "7_submission.sh")).strip()
    (folder / "7_submitted.pkl").rename(folder / f"{job}_submitted.pkl")
    slurm.run("scontrol", "release", job)
    run = Run.at(tmp_path / "runs", WAITING)
    wait(rsb, run, "finished")
    first, second = run.attempts()
    assert (first.end_step, second.start_step, second.job_id) == (7, 7, job)
    assert [row["step"] for row in read_rows(run) if row["kind"] == "train"] == list(range(1, 19))

    table = rsb.json("collect", "--format", "json")
    assert [(r["run_id"], r["counted"]) for group in table["groups"] for r in group["runs"]] == [
        (WAITING, True), (FINISHED, True),
    ]  # fmt: skip
    assert [row["name"] for row in table["evaluations"]] == [table["groups"][0]["recipe"] + " with 10 changes"]
