"""Jobs load and describe themselves, or say what is wrong with them."""

from __future__ import annotations

import sys

import pytest

from rsb_cluster.config import catalog
from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import validate
from rsb_cluster.errors import ConfigError
from tests.unit.bundled import JOBS, load_job


def test_every_bundled_job_is_tested_here():
    assert sorted(path.stem for path in catalog.bundled_dir("jobs").glob("*.toml")) == sorted(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_a_bundled_job_loads_and_describes_itself(name):
    job = load_job(name)
    assert job.name == name and job.description


@pytest.mark.parametrize(
    ("name", "assignments", "message"),
    [
        ("slurm", ["tasks_per_node=4"], "tasks_per_node = 4 with gpus_per_node = 8: there is one rank per GPU"),
        ("slurm", ["time_min=2"], "signal_delay_s is not shorter than time_min"),
        ("slurm", ["nodes=0"], "nodes = 0: must be an integer > 0."),
        ("slurm", ["nodes=true"], "nodes = True: must be an integer > 0."),
        ("slurm", ["min_nodes=5", "nodes=4"], "min_nodes = 5 is more than nodes = 4"),
        ("slurm", ["profile_steps=0-4"], "profile_steps = '0-4' is not FIRST-LAST, such as 100-110"),
        ("slurm", ["profile_steps=9-4"], "profile_steps = '9-4' is not FIRST-LAST, such as 100-110"),
        ("slurm", ["profile_steps=1-101"], "profile_steps = '1-101' are 101 steps, and a trace holds 100"),
        ("slurm", ["checkpoint.keep=1"], "checkpoint.keep = 1: must be an integer ≥ 2."),
        ("slurm", ["gpu_type=a100:8(S:0-1)"], "gpu_type = 'a100:8(S:0-1)' is not the type alone: of gpu:a100:8(S:0-1)"),
        ("slurm", ["slurm.exclude=['n1', 'n2']"], "slurm.exclude = ['n1', 'n2'] is no value of an option of sbatch"),
        ("slurm", ["slurm.licenses={a = 1}"], "slurm.licenses = {'a': 1} is no value of an option of sbatch"),
        ("slurm", ['slurm.comment="a\\nb"'], "slurm.comment = 'a\\nb' is no value of an option of sbatch"),
        ("slurm", ["slurm.exclusive=False"], "slurm.exclusive = 'False': write false, without quotes"),
        ("slurm", ["slurm.--partition=gpu"], "slurm: '--partition' is no name of an option of sbatch"),
        ("slurm", ["runs=$NOWHERE/runs"], "runs = '$NOWHERE/runs': variables are not replaced here. Write it out."),
        ("slurm", ["submissions=/s/${USER}"], "submissions = '/s/${USER}': variables are not replaced here."),
        ("slurm", ["partition=gpu"], "unknown key 'partition'."),
        ("slurm", ["time_mins=3"], "unknown key 'time_mins'. Did you mean 'time_min'?"),
        ("slurm", ["checkpoint.evry_min=3"], "unknown key 'checkpoint.evry_min'. Did you mean 'checkpoint.every_min'?"),
    ],
)
def test_a_mistake_in_a_job_is_explained(name, assignments, message):
    with pytest.raises(ConfigError) as caught:
        load_job(name, *assignments)
    assert f"{name}.toml: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("2026-12-02", "2026-12-02"),
        ("2026-12-02T12:00:00", "2026-12-02T12:00:00"),
        ("16:00:00", "16:00:00"),
        ("1_000", "1_000"),
        ("1e3", "1e3"),
        ("0x10", "0x10"),
        ("8", 8),
        ("true", True),
        ("n[1-3,7],gpu-a[01-02]", "n[1-3,7],gpu-a[01-02]"),
    ],
)
def test_an_option_of_sbatch_has_the_value_that_was_typed(typed, expected):
    """TOML reads some as times and numbers: 1_000 is an account, and no thousand."""
    assert load_job("slurm", f"slurm.x={typed}").slurm == {"x": expected}


def test_a_date_in_a_job_is_a_mistake_and_no_bug(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nbackend = "slurm"\nnodes = 2026-01-01\n')
    with pytest.raises(ConfigError, match=r"mine\.toml: nodes = "):
        catalog.load_job(str(path))


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("cloud.accelerators=8",), "cloud.accelerators"),
        (("cloud.accelerators='H100:8,A100:8'",), "is not NAME:COUNT, such as H100:8"),
        (("cloud.infra=['slurm/lab/gpu']",), "SkyPilot has no spot nodes on Slurm (slurm/lab/gpu). Use spot = false"),
        (("cloud.envs.AWS_SECRET_ACCESS_KEY='x'",), "looks like a credential, and would be written into the task"),
        (("cloud.envs.WANDB_API_KEY='x'",), "use secrets = ['WANDB_API_KEY'], which reads it from your shell"),
        (("cloud.max_restart=1",), "Did you mean 'cloud.max_restarts'?"),
    ],
)
def test_a_mistake_in_the_table_of_a_cloud_is_explained(assignments, message):
    with pytest.raises(ConfigError) as caught:
        load_job("cloud-spot", *assignments)
    assert message in str(caught.value)


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"name": "x", "backend": "local", "trackers": ["wandb"]}
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb is not installed. Use pip install 'rsb-cluster\[wandb\]'"):
        validate(Job, values, "job")
