"""The dry run shows the plan, as text and as JSON, and writes nothing."""

import json
import re

import pytest

from rsb_cluster.runs.sweep import Member, Sweep
from rsb_cluster.submission.estimate import parse_rates
from rsb_cluster.submission.job_arrays import ToSubmit, make_arrays
from rsb_cluster.submission.plan import Plan
from rsb_cluster.submission.preview import sweep_as_dict, sweep_rows, sweep_summary
from tests.unit.sweeps import finish, make, planned

pytestmark = pytest.mark.usefixtures("here")


def test_the_table_of_a_sweep_adds_up(tmp_path, digits):
    finish(make(planned(tmp_path, digits)[0]))
    runs = tuple(planned(tmp_path, digits))
    arrays = make_arrays(
        str(tmp_path), [ToSubmit(p.run, p.point.job, p.data.url) for p in runs if p.should_submit], name="x"
    )
    members = tuple(Member(run_id=p.run.run_id, recipe="digits", model="", seed=0) for p in runs)
    plan = Plan(str(tmp_path), runs, arrays, Sweep(sweep_id="x-1", file="", created=0, members=members))
    rates = parse_rates(["resnet10t=100", "test_resnet=400"])
    hours = 550 * 64 / 3600 / 100
    one, other, total = sweep_rows(plan, rates)
    assert [row["state"] for row in (one, other, total)] == ["1 finished, 1 new", "2 new", "1 finished, 3 new"]
    assert [row["runs"] for row in (one, other, total)] == ["2", "2", "4"]
    assert [row["GPU-hours"] for row in (one, other, total)] == [
        f"{h:,.1f}" for h in (2 * hours, hours / 2, 2.5 * hours)
    ]
    assert one["batch"] == "4 × 16" and other["batch"] == "4 × 16" and one["steps"] == "550"
    assert "values" not in one
    said = sweep_as_dict(plan, rates)
    assert said["gpu_hours"] == pytest.approx(2.5 * hours)
    assert said["gpu_hours_to_submit"] == pytest.approx(1.5 * hours)
    assert [len(array["runs"]) for array in said["arrays"]] == [3]
    assert json.loads(json.dumps(said)) == said or said["runs"][0]["modified"] == {}
    assert "sweep x-1: 3 of 4 runs to submit, in 1 job, 0.1 GPU-hours" in sweep_summary(plan, rates)
    assert sweep_as_dict(plan, {})["gpu_hours"] is None
    assert {row["GPU-hours"] for row in sweep_rows(plan, parse_rates(["resnet10t=100"]))} == {
        f"{2 * hours:,.1f}",
        "unknown",
    }


def test_the_dry_run_of_a1_on_four_nodes_shows_the_plan(rsb):
    done = rsb.run("submit", "--recipe", "a1", "--nodes", "4", "--dry-run", "--images-per-s", "1000", code=1)
    lines = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in done.stdout.split("\n\n")[0].splitlines()}
    assert lines["resources"] == "4 nodes × 8 GPUs = 32 ranks, back end slurm"
    assert lines["steps"] == "375,000 (600 epochs of 625)"
    assert (
        lines["global batch"]
        == "2048 = 4 virtual ranks of 512 images, each shared by 8 processes, BatchNorm over 512 as in the paper"
    )
    assert lines["images"] == "768,000,000"
    assert lines["model"] == "resnet50, 25.6 M parameters"
    assert lines["data"] == f"{rsb.cwd}/data/imagenet-1k (NOT FOUND)"
    assert lines["runs"] == f"{rsb.cwd}/runs/a1-resnet50-s0-unknown (new)"
    assert lines["cost"].startswith("213.3 GPU-hours at 1000 images/s per GPU, 6.7 h on 32 GPUs")
    assert (
        f"note: no shards of 'imagenet-1k' were found. Searched for\n  {rsb.cwd}/data/imagenet-1k/train/" in done.stdout
    )
    assert "optimizer.lr = 0.005" in done.stdout
    assert "\n#SBATCH --nodes=4\n" in done.stdout and "\n#SBATCH --gpus-per-node=8\n" in done.stdout
    assert "modified" not in lines
    verdict = done.stdout.splitlines()[-1]
    assert verdict.startswith("would be refused: ") and verdict.endswith("no shards of 'imagenet-1k' were found")
    recipe, *_, job = done.stderr.splitlines()
    assert recipe.startswith("recipe /") and recipe.endswith("/a1.toml")
    assert job.startswith("job /") and job.endswith("/slurm.toml")
    assert list(rsb.cwd.iterdir()) == [], "a dry run writes nothing"


def test_the_dry_run_as_json_has_the_same_content(rsb):
    found = rsb.json("submit", "--recipe", "a1", "--nodes", "4", "--dry-run", "--json", "--seeds", "3",
                     "--set", "optimizer.lr=4e-3", "--set", "job.slurm.partition=gpu", "--data", "s3/x",
                     code=1)  # fmt: skip
    assert [found[key] for key in ("nodes", "world_size", "global_batch", "virtual_ranks")] == [4, 32, 2048, 4]
    assert [found[key] for key in ("epochs", "steps_per_epoch", "steps", "images")] == [600, 625, 375_000, 768_000_000]
    assert found["data"] == f"{rsb.cwd}/s3/x" and found["data_found"] is False
    assert found["modified"] == {"optimizer.lr": [5e-3, 4e-3]}
    assert found["recipe"]["optimizer"]["lr"] == 4e-3
    assert [run["seed"] for run in found["runs"]] == [0, 1, 2]
    assert "#SBATCH --array=0-2%3\n" in found["script"] and "#SBATCH --partition=gpu\n" in found["script"]
    assert found["gpu_hours"] is None
    assert found["ready"] is False and "no shards of 'imagenet-1k' were found" in found["refusals"][-1]
    assert list(rsb.cwd.iterdir()) == []


def test_existing_data_is_found_and_names_the_run(rsb, digits):
    found = rsb.json("submit", "--recipe", "digits", "--job", "local", "--data", str(digits), "--dry-run", "--json")
    assert found["data_found"] is True and found["notes"] == []
    assert found["ready"] is True and found["refusals"] == []
    assert re.fullmatch("digits-resnet10t-s0-[0-9a-f]{8}", found["runs"][0]["run_id"])
    assert found["script"] is None
    assert found["steps"] == 25 * 22


def test_a_dry_run_needs_no_network(rsb, tmp_path):
    rsb.env |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "nobody", "HOME": str(tmp_path)}
    rsb.env["AWS_SECRET_ACCESS_KEY"] = "geheim"
    done = rsb.run(
        "submit", "--recipe=digits", "--job=cloud-spot", "--nodes=2", "--gpus-per-node=1", "--dry-run",
        "--set=job.cloud.accelerators=H100", "--set=job.cloud.price=10", "--images-per-s=100",
        "--runs=s3://bucket/runs", "--data=s3://bucket/digits", code=1,
    )  # fmt: skip
    assert "2 nodes × 1 GPU = 2 ranks, back end cloud" in done.stdout
    assert "in each run's folder: submissions/ (spec and task), code/ (this package as a wheel), logs/" in done.stdout
    assert "$10.00 per node and hour (job.cloud.price)" in done.stdout
    assert "s3://bucket/digits (could not be searched)" in done.stdout
    assert "--- SkyPilot task ---\nname: rsb-ID\nnum_nodes: 2\n" in done.stdout
    for note in ("could not search for the data", "could not check which of the runs exist"):
        said = next(line for line in done.stdout.splitlines() if line.startswith(f"note: {note}"))
        assert "http://127.0.0.1:9" in said and "Check AWS_ENDPOINT_URL, the credentials and the network." in said
    assert "geheim" not in done.stdout + done.stderr
