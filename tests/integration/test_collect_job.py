"""The job that collects a sweep when its arrays have ended, on a real Slurm."""

import sys
from pathlib import Path

import pytest

from rsb_cluster.backends.slurm.backend import Slurm
from rsb_cluster.config.job import Job
from rsb_cluster.runs.run import Submission
from rsb_cluster.runs.sweep import Member, Sweep, write_sweep
from tests.command import ROOT
from tests.made_runs import make_runs
from tests.servers.slurm import SlurmCluster

pytestmark = pytest.mark.slurm


def test_results_are_written_when_all_jobs_have_ended_even_by_a_failure(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    (run,) = make_runs(tmp_path, 1, rows=5, endings=("finished",))
    member = Member(run_id=run.run_id, recipe="a1", model="resnet18", seed=0)
    write_sweep(str(tmp_path), Sweep(sweep_id="deep-1", file="", created=0.0, members=(member,)))
    gate = tmp_path / "gate"
    waiting = f"while [ ! -e {gate} ]; do sleep 0.2; done; exit 3"
    sbatch = ("sbatch", "--parsable", "--output=/dev/null", "--wrap")
    sent = [
        Submission(backend="slurm", job_id=f"{slurm.run(*sbatch, what).strip()}{task}", folder="", shape="", time=0.0)
        for what, task in (("exit 0", ""), (waiting, "_0"))
    ]
    job = Job(name="x", backend="slurm", slurm={"partition": "main"}, setup=(f"cd {ROOT}",))
    command = [sys.executable, "-m", "rsb_cluster", "collect", "deep-1", "--publish", "--runs", str(tmp_path)]
    job_id = Slurm().run_after(job, sent, command, tmp_path / "logs", "collect-deep-1")
    assert slurm.run("squeue", "-h", "-j", job_id, "-o", "%T").strip() == "PENDING"
    assert not (tmp_path / "sweeps" / "deep-1").exists()
    gate.touch()
    written = tmp_path / "sweeps" / "deep-1" / "report.html"
    slurm.wait_for("the report", written.exists)
    assert (tmp_path / "sweeps" / "deep-1" / "collect.json").exists()
