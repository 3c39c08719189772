"""The test servers do what the other tests rely on."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import s3fs

from tests.servers.daemons import ServerError
from tests.servers.s3 import S3Server
from tests.servers.slurm import SlurmCluster

# Its tasks record each SIGTERM and continue, so the job uses up its grace time; the first start runs until preempted.
STUBBORN = """\
echo "start ${SLURM_RESTART_COUNT:-0}"
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
srun bash -c 'trap "echo TERM" TERM; echo up; while :; do sleep 0.2; done'
"""


def sbatch(slurm: SlurmCluster, script: str, out: Path, *options: str) -> str:
    """Submit a script and return its job id."""
    path = out.with_suffix(".sh")
    path.write_text(f"#!/bin/bash\n{script}")
    return slurm.run("sbatch", "--parsable", "--open-mode=append", f"--output={out}", *options, str(path)).strip()


@pytest.mark.slurm
def test_srun_reaches_all_nodes(slurm: SlurmCluster) -> None:
    nodes = slurm.run("srun", "-N4", "--ntasks-per-node=1", "printenv", "SLURMD_NODENAME").split()
    assert sorted(nodes) == slurm.nodes == ["n1", "n2", "n3", "n4"]


@pytest.mark.slurm
def test_array_runs_every_task(slurm: SlurmCluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = sbatch(slurm, "echo task $SLURM_ARRAY_TASK_ID", out, "--array=0-5%4", "--time=1")
    assert slurm.wait_for_state(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert sorted(out.read_text().splitlines()) == [f"task {index}" for index in range(6)]
    assert slurm.job_state(f"{job}_3") == "COMPLETED"


@pytest.mark.slurm
@pytest.mark.long
def test_spot_job_is_preempted_and_runs_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spot = sbatch(slurm, STUBBORN, out, "-p", "spot", "-N4", "--ntasks-per-node=1", "--requeue")
    slurm.wait_for("four tasks", lambda: out.exists() and out.read_text().count("up") == 4)
    main = sbatch(slurm, "sleep 1", tmp_path / "main", "-p", "main", "-N4", "--exclusive")
    slurm.wait_for("SIGTERM in all tasks", lambda: out.read_text().count("TERM") >= 4)
    assert slurm.job_state(spot) == "RUNNING", "grace time has hardly begun"
    slurm.wait_for_state(main, "COMPLETED")
    slurm.wait_for_state(spot, "COMPLETED")
    assert [line for line in out.read_text().splitlines() if line.startswith("start")] == ["start 0", "start 1"]

    def history() -> list[str]:
        return slurm.run("sacct", "-X", "-D", "-n", "-P", "-o", "State", "-j", spot).split()

    # accounting is written behind the scheduler's back, a moment later
    slurm.wait_for("both lives in sacct", lambda: history() == ["PREEMPTED", "COMPLETED"])


@pytest.mark.slurm
@pytest.mark.long
def test_job_of_a_lost_node_is_requeued(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = "srun sleep $((SLURM_RESTART_COUNT ? 0 : 100))"
    job = sbatch(slurm, script, tmp_path / "out", "-N2", "--ntasks-per-node=1", "--requeue", "-w", "n3,n4")
    slurm.wait_for_state(job, "RUNNING")
    slurm.kill_node("n4")
    slurm.wait_for("n4 down", lambda: slurm.run("sinfo", "-h", "-N", "-n", "n4", "-o", "%T").startswith("down"), 90)
    slurm.start_node("n4")
    assert slurm.wait_for_state(job, "COMPLETED", "FAILED") == "COMPLETED"


@pytest.mark.slurm
def test_cancel_all_ends_stubborn_jobs(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = sbatch(slurm, STUBBORN, tmp_path / "out", "-N4", "--ntasks-per-node=1")
    slurm.wait_for_state(job, "RUNNING")
    slurm.cancel_all()
    assert slurm.job_state(job) == "CANCELLED"
    with pytest.raises(ServerError, match="Invalid"):
        slurm.run("scontrol", "show", "job", "999999")


@pytest.mark.slurm
def test_two_clusters_beside_each_other(slurm: SlurmCluster) -> None:
    with SlurmCluster(nodes=1) as other:
        assert other.run("sinfo", "-h", "-p", "main", "-o", "%D").strip() == "1"
        assert slurm.run("sinfo", "-h", "-p", "main", "-o", "%D").strip() == "4"
        argv = ["sbatch", "--wait", "--wrap=sleep 99", "--output=/dev/null"]
        client = subprocess.Popen(argv, env=os.environ | other.env)
        other.wait_for("the job of sbatch --wait", lambda: other.run("squeue", "-h", "-t", "R"))
    assert client.wait(5) == -signal.SIGKILL, "stop() also ends clients"
    assert not other.root.exists()
    slurm.run("srun", "-N4", "true")


@pytest.fixture
def client(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 client that is configured only by its environment."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")  # as the server demands by https
    client = botocore.session.Session().create_client("s3")
    yield client
    client.close()


@pytest.mark.s3
def test_objects_with_botocore(client: Any, s3_bucket: str) -> None:
    client.put_object(Bucket=s3_bucket, Key="dir/a", Body=b"0123456789")
    client.put_object(Bucket=s3_bucket, Key="dir/b", Body=b"b")
    part = client.get_object(Bucket=s3_bucket, Key="dir/a", Range="bytes=2-4")
    assert part["Body"].read() == b"234"
    listing = client.list_objects_v2(Bucket=s3_bucket, Prefix="dir/")
    assert [entry["Key"] for entry in listing["Contents"]] == ["dir/a", "dir/b"]
    client.delete_objects(Bucket=s3_bucket, Delete={"Objects": [{"Key": "dir/a"}, {"Key": "dir/b"}]})
    assert client.list_objects_v2(Bucket=s3_bucket)["KeyCount"] == 0


@pytest.mark.s3
def test_objects_with_s3fs(client: Any, s3_bucket: str) -> None:
    fs = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    large = bytes(range(256)) * 40_000  # 10 MB: two parts of an upload in parts
    with fs.open(f"{s3_bucket}/dir/large", "wb", block_size=5 << 20) as file:
        file.write(large)
    fs.pipe(f"{s3_bucket}/dir/small", b"small")
    assert fs.cat_file(f"{s3_bucket}/dir/large", start=1000, end=1010) == large[1000:1010]
    assert fs.cat_file(f"{s3_bucket}/dir/large") == large
    assert fs.ls(f"{s3_bucket}/dir", detail=False) == [f"{s3_bucket}/dir/large", f"{s3_bucket}/dir/small"]
    fs.rm(f"{s3_bucket}/dir", recursive=True)
    assert fs.find(s3_bucket) == []
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{s3_bucket}/dir/small")
