"""What SkyPilot and the nodes are told: the job, the task as reviewed, its shell lines run, the wheel, the spec."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import rsb_cluster
from rsb_cluster.backends.skypilot import prices, wheel
from rsb_cluster.backends.skypilot.sky_task import as_yaml, sky_task
from rsb_cluster.config import catalog
from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError
from rsb_cluster.node.node_spec import SPEC_SHA256, SPEC_URL, NodeSpec, Wheel, decode, digest
from tests.command import ROOT

GOLDEN = ROOT / "tests" / "unit" / "golden"
RUN = "s3://bucket/runs/a1-resnet50-s0-0123456789ab"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
CPU = ("gpus_per_node=0", "cloud.accelerators=''")


def load_job(name: str, *assignments: str) -> Job:
    return catalog.load_job(str(catalog.bundled_dir("jobs") / f"{name}.toml"), assignments=assignments)[0]


def spec_of(job: Job, run_url: str = RUN, **changes: object) -> NodeSpec:
    fields = {
        "submission_id": "rsb-20260101-000000-abc123",
        "run_url": run_url,
        "run_id": run_url.rpartition("/")[2],
        "job": job.model_dump(mode="json"),
        "python": HERE,
        "code": Wheel(url=f"{run_url}/code/{'0' * 64}/rsb_cluster-1.0-py3-none-any.whl", sha256="0" * 64),
        "pins": ("timm==1.0.15", "torch==2.6.0"),
    }
    return NodeSpec(**fields | changes)


# --- the job --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ("gpus_per_node=4",),
            "gpus_per_node = 4 with accelerators = 'H100:8': they must agree. Use --gpus-per-node 8",
        ),
        (("cloud.accelerators=''",), "gpus_per_node = 8 with no cloud.accelerators: they must agree"),
        (("cloud.accelerators=8",), "cloud.accelerators"),
        (("cloud.accelerators='H100:8,A100:8'",), "is not NAME:COUNT, such as H100:8"),
        (("cloud.infra=['slurm/lab/gpu']",), "SkyPilot has no spot nodes on Slurm (slurm/lab/gpu). Use spot = false"),
        (("checkpoint.every_min=0",), "cloud.spot without checkpoints: a machine may go without a word"),
        (("min_nodes=1", "nodes=2"), "SkyPilot starts all nodes or none. Leave min_nodes out"),
        (("cloud.envs.AWS_SECRET_ACCESS_KEY='x'",), "looks like a credential, and would be written into the task"),
        (("cloud.envs.WANDB_API_KEY='x'",), "use secrets = ['WANDB_API_KEY'], which takes it from your shell"),
        (("cloud.max_restart=1",), "Did you mean 'cloud.max_restarts'?"),
    ],
)
def test_a_job_that_cannot_be_is_refused_with_what_to_do(assignments, message):
    with pytest.raises(ConfigError) as caught:
        load_job("cloud-spot", *assignments)
    assert message in str(caught.value)


def test_gpus_may_follow_from_the_instance_type():
    job = load_job("cloud-spot", "cloud.accelerators=''", "cloud.instance_type=p5.48xlarge")
    assert job.world_size == 8


# --- the task -------------------------------------------------------------------------------------------------------

TASKS = {
    "spot": (("cloud-spot", "nodes=4"), {"AWS_REGION": "us-east-1", "AWS_SECRET_ACCESS_KEY": "hidden"}),
    "failover": (
        ("cloud", "cloud.infra=['aws/us-east-1','gcp','k8s/lab']", "cloud.image='docker:nvidia/cuda'", "mem_gb=512"),
        {"AWS_ENDPOINT_URL": "https://s3.example.org"},
    ),
    "cpu": (
        (
            "cloud-slurm", *CPU, "cpus_per_task=2", "tasks_per_node=2", "setup=['module load \"a b\"']",
            "cloud.secrets=['AWS_ACCESS_KEY_ID']", "cloud.envs.UV_TORCH_BACKEND=cpu", "trackers=['tensorboard']",
        ),
        {"AWS_ACCESS_KEY_ID": "hidden"},
    ),
}  # fmt: skip


def task(name: str) -> dict:
    job, environment = TASKS[name]
    return sky_task(spec_of(load_job(*job), python="3.11"), environment)


def reviewable(name: str) -> str:
    """The task, but for the digest of the spec, which any new field of a job changes."""
    return as_yaml(task(name)).replace(task(name)["envs"][SPEC_SHA256], "SPEC-SHA256")


@pytest.mark.parametrize("name", TASKS)
def test_the_task_is_the_one_that_was_reviewed(name):
    text = as_yaml(task(name))
    assert yaml.safe_load(text) == task(name)
    assert reviewable(name) == (GOLDEN / f"sky-{name}.yaml").read_text()
    assert "hidden" not in text


@pytest.mark.parametrize("name", TASKS)
def test_its_shell_lines_are_good(name):
    for lines in (task(name)["setup"], task(name)["run"]):
        done = subprocess.run(["bash", "-n"], input=lines, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("code", "heard"), [(0, 0), (75, 75), (100, 0), (130, 0), (1, 1), (137, 137)])
def test_the_engine_hears_whether_another_start_makes_sense(tmp_path, monkeypatch, code, heard):
    """75: it does. A run that failed (100) or was stopped (130) has ended; of what is left the engine decides."""
    lines = task("spot")["run"]
    python = tmp_path / re.search(r'"\$HOME/(.*)"', lines)[1]
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\n[ "$*" = "-m rsb_cluster.node" ] && exit {code}\nexit 99\n')
    python.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert subprocess.run(["bash", "-c", lines], capture_output=True).returncode == heard


def test_an_address_with_a_password_is_refused():
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL holds a password"):
        sky_task(spec_of(load_job("cloud")), {"AWS_ENDPOINT_URL": "https://me:geheim@s3.example.org"})


# uv needs a package index: here stands a program that makes the environment, and notes what it was asked for.
UV = """\
#!/bin/bash
echo "$*" >>"$HOME/asked"
if [ "$1" = venv ]; then
  mkdir -p "${@: -1}/bin" && ln -sf "%s" "${@: -1}/bin/python"
fi
"""


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A home folder with uv where SkyPilot puts it, and a run with a wheel, both with names that need quotes."""
    home = tmp_path / "it's home"
    uv = home / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    # Not a link to the program itself: it would not find the packages of this environment.
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\n[ "$*" = "-m rsb_cluster.node" ] && touch "$HOME/started" && exit\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    uv.write_text(UV % python)
    uv.chmod(0o755)
    monkeypatch.setenv("HOME", str(home))
    return home


def set_up(
    node: Path, content: bytes, *assignments: str, **changes: object
) -> tuple[subprocess.CompletedProcess, Path]:
    run = node.parent / "a run's folder"
    code = Wheel(url=f"file://{run}/code/x/rsb_cluster-1.0-py3-none-any.whl", sha256=digest(b"wheel"))
    path = Path(code.url.removeprefix("file://"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    job = load_job("cloud-spot", "trackers=['tensorboard']", *assignments)
    made = sky_task(spec_of(job, str(run), code=code, **changes), {})
    done = subprocess.run(["bash", "-c", made.get("setup", made["run"])], capture_output=True, text=True)
    return done, node / ".rsb-cluster"


def test_a_node_is_set_up_once_with_the_code_that_was_submitted(node):
    done, folder = set_up(node, b"wheel")
    assert (done.returncode, done.stderr) == (0, "")
    (venv,) = [path for path in folder.iterdir() if path.is_dir()]
    assert (venv / "rsb_cluster-1.0-py3-none-any.whl").read_bytes() == b"wheel"
    assert (venv / "pins.txt").read_text().splitlines() == ["timm==1.0.15", "torch==2.6.0"]
    asked = (node / "asked").read_text().splitlines()
    assert asked[0] == f"venv --quiet --clear --python {HERE} {venv}"
    assert asked[1].endswith(f"--constraint {venv}/pins.txt s3fs")
    assert asked[2].endswith(f"--constraint {venv}/pins.txt {venv}/rsb_cluster-1.0-py3-none-any.whl[tensorboard]")
    assert len(asked) == 3
    assert set_up(node, b"wheel")[0].returncode == 0
    assert len((node / "asked").read_text().splitlines()) == 3
    assert set_up(node, b"wheel", pins=("torch==2.7.0",))[0].returncode == 0
    assert len((node / "asked").read_text().splitlines()) == 6


def test_other_code_is_not_installed(node):
    done, folder = set_up(node, b"whale")
    assert done.returncode == 1
    assert "is not the code that was submitted" in done.stderr
    assert not list(folder.rglob("ready")) and not list(folder.rglob("*.whl"))
    assert len((node / "asked").read_text().splitlines()) == 2


def test_a_worker_of_a_pool_is_set_up_by_the_job_itself(node):
    """SkyPilot runs only ``run`` there."""
    done, folder = set_up(node, b"whale", "cloud.pool=mine")
    assert done.returncode == 1 and not list(folder.rglob("ready")) and not (node / "started").exists()
    done, folder = set_up(node, b"wheel", "cloud.pool=mine")
    assert list(folder.rglob("ready"))
    assert done.returncode == 0 and (node / "started").exists(), "and then the node"


# --- the wheel ------------------------------------------------------------------------------------------------------


def test_the_wheel_is_what_runs_here_and_can_be_installed(tmp_path):
    built = wheel.build()
    assert built == wheel.build() and built.sha256 == digest(built.content)
    path = tmp_path / built.filename
    path.write_bytes(built.content)
    uv = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "to"),
    ]
    subprocess.run([*uv, str(path)], check=True, capture_output=True)
    for folder, there in (("rsb_cluster", "rsb_cluster"), ("recipes", "rsb_cluster/_bundled/recipes")):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and file.suffix != ".pyc":
                assert (tmp_path / "to" / there / file.relative_to(ROOT / folder)).read_bytes() == file.read_bytes()
    said = subprocess.run(
        [sys.executable, "-m", "rsb_cluster", "jobs", "list"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "to")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "cloud-spot" in said.stdout


def test_a_change_that_nobody_has_committed_is_in_it(tmp_path, monkeypatch):
    before = wheel.build()
    shutil.copytree(ROOT / "rsb_cluster", tmp_path / "rsb_cluster", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(rsb_cluster, "__file__", str(tmp_path / "rsb_cluster" / "__init__.py"))
    assert wheel.build() == before, "the place says nothing"
    (tmp_path / "rsb_cluster" / "new.py").write_text("changed = True\n")
    (tmp_path / "rsb_cluster" / "__pycache__").mkdir()
    (tmp_path / "rsb_cluster" / "__pycache__" / "new.pyc").write_text("left out")
    after = wheel.build()
    (tmp_path / after.filename).write_bytes(after.content)
    with zipfile.ZipFile(tmp_path / after.filename) as archive:
        assert archive.read("rsb_cluster/new.py") == b"changed = True\n"
        assert not [name for name in archive.namelist() if name.endswith(".pyc")]
    assert after.sha256 != before.sha256


def test_pins_are_what_is_installed_here_without_the_name_of_the_build():
    import torch

    pinned = dict(pin.split("==") for pin in wheel.pins())
    assert pinned["torch"] == torch.__version__.partition("+")[0]
    assert {"timm", "numpy", "s3fs", "aiobotocore", "pydantic"} <= pinned.keys()
    assert not {"rsb-cluster", "pytest", "skypilot"} & pinned.keys()


# --- the spec -------------------------------------------------------------------------------------------------------


def test_a_node_believes_the_spec_that_was_submitted_and_no_other():
    made = spec_of(load_job("cloud-spot"))
    url = f"{RUN}/{made.path}"
    environment = sky_task(made, {})["envs"]
    assert environment == {SPEC_URL: url, SPEC_SHA256: digest(made.encode())}
    assert decode(made.encode(), url, environment[SPEC_SHA256]) == made
    with pytest.raises(ConfigError, match="is not what was submitted"):
        decode(made.encode() + b" ", url, environment[SPEC_SHA256])


@pytest.mark.parametrize(
    ("changes", "url", "message"),
    [
        ({"python": "3.9"}, RUN, f"this node has Python {HERE}, the run was submitted with 3.9"),
        ({"code": Wheel(url="s3://other/x.whl", sha256="0" * 64)}, RUN, "s3://other/x.whl is not below the run's own"),
        ({}, "s3://bucket/runs/other", "is not below the run's own folder"),
        ({"code": Wheel(url=f"{RUN}-evil/x.whl", sha256="0" * 64)}, RUN, "is not below the run's own folder"),
        ({"code": Wheel(url=f"{RUN}/../x.whl", sha256="0" * 64)}, RUN, "is not below the run's own folder"),
    ],
)
def test_a_spec_that_points_elsewhere_is_refused(changes, url, message):
    made = spec_of(load_job("cloud-spot"), **changes)
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        decode(made.encode(), f"{url}/{made.path}", digest(made.encode()))


def test_a_spec_of_another_format_is_refused():
    content = json.dumps(spec_of(load_job("cloud")).model_dump(mode="json") | {"format": 2}).encode()
    with pytest.raises(ConfigError, match="format"):
        decode(content, f"{RUN}/spec.json", digest(content))


# --- prices ---------------------------------------------------------------------------------------------------------

VMS = """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone
p5.48xlarge,H100,8.0,192.0,2048.0,"{'Name': 'H100, 80 GB'}",98.32,39.0,us-east-1,us-east-1a
p5.48xlarge,H100,8.0,192.0,2048.0,,98.32,29.5,us-west-2,us-west-2a
p5.4xlarge,H100,1.0,16.0,256.0,,12.3,,us-east-1,us-east-1a
m6i.large,,,2.0,8.0,,0.1,0.04,us-east-1,us-east-1a
"""


@pytest.fixture
def catalogs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for version, text in (("v7", VMS.replace("29.5", "1.0")), ("v10", VMS)):
        folder = tmp_path / ".sky" / "catalogs" / version / "aws"
        folder.mkdir(parents=True)
        (folder / "vms.csv").write_text(text)


@pytest.mark.parametrize(
    ("job", "spot", "on_demand"),
    [
        (("cloud-spot",), 29.5, 98.32),
        (("cloud-spot", "cloud.infra=['aws/us-east-1/us-east-1a']"), 39.0, 98.32),
        (("cloud-spot", "gpus_per_node=1", "cloud.accelerators=h100"), None, 12.3),
        (("cloud-spot", "cpus_per_task=25"), None, None),
        (("cloud-gcp-spot",), None, None),
        (("cloud-spot", *CPU, "cpus_per_task=2"), 0.04, 0.1),
        (("cloud-spot", *CPU, "cloud.instance_type=m6i.large"), 0.04, 0.1),
        (("cloud-spot", "cloud.price=7.5"), 7.5, None),
    ],
)
def test_the_lowest_price_of_a_node_that_fits_is_taken_from_the_newest_catalog(catalogs, job, spot, on_demand):
    found = [prices.price(load_job(*job), spot=kind) for kind in (True, False)]
    assert [one and one.usd_per_h for one in found] == [spot, on_demand]


def test_without_a_catalog_no_price_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prices.price(load_job("cloud-spot"), spot=True) is None
