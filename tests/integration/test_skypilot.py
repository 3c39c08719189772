"""Against the real SkyPilot, in an environment of its own that the test makes (330 MB from the package index)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rsb_cluster.backends.skypilot.sky_task import sky_task
from tests.command import ROOT
from tests.commands_of import as_printed
from tests.unit.bundled import load_job
from tests.unit.sky_jobs import CPU, TASKS, spec_of, task


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """The interpreter of an environment with our package and the extra ``cloud``, as a user installs it."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert uv, "SkyPilot gets an environment by uv, which `make test` installs"
    folder = tmp_path_factory.mktemp("sky")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run([uv, "venv", "--quiet", "--python", version, folder / "venv"], check=True)
    made = str(folder / "venv" / "bin" / "python")
    install = as_printed("pip install '.[cloud]'")
    subprocess.run([uv, "pip", *install, "--quiet", "--python", made], cwd=ROOT, check=True)
    return made


def run(python: str, home: Path, code: str, *arguments: str, given: str = "") -> str:
    env = {
        "HOME": str(home),
        "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    }
    command = [python, "-c", code, *arguments]
    done = subprocess.run(command, cwd=home, input=given, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


TAKE = """
import json, sys, sky
for config in json.load(sys.stdin):
    secrets = [(name, "x") for name in config.get("secrets", {})]
    task = sky.Task.from_yaml_config(config, secrets_overrides=secrets)
    for resources in task.resources:
        recovery = resources.job_recovery
        print(json.dumps([task.num_nodes, resources.use_spot, resources.accelerators, recovery, str(resources.infra)]))
"""


def test_skypilot_takes_our_tasks(python, tmp_path):
    given = json.dumps([task(name) for name in TASKS])
    found = [json.loads(line) for line in run(python, tmp_path, TAKE, given=given).splitlines()]
    recovery = {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 10, "recover_on_exit_codes": [75, 143]}
    assert all(one[3] == recovery for one in found)
    assert found[0][:3] == [4, True, {"H100": 8}]
    assert len(found) == 1 + 3 + 1, "one for each place that any of is"


# As SkyPilot's catalog of AWS, which it would fetch if it were missing or some hours old.
CATALOG = {
    "aws/vms.csv": """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch
m6i.xlarge,,,4.0,16.0,,0.192,0.07,us-east-1,use1-az1,x86_64
m6i.2xlarge,,,8.0,32.0,,0.384,0.09,us-east-1,use1-az1,x86_64
p4d.24xlarge,A100,8.0,96.0,1152.0,,32.77,9.8,us-east-1,use1-az1,x86_64
p5.48xlarge,H100,8.0,192.0,2048.0,,55.04,29.5,us-east-1,use1-az1,x86_64
p5.48xlarge,H100,8.0,192.0,2048.0,,55.04,28.1,us-east-1,use1-az2,x86_64
p5.48xlarge,H100,8.0,192.0,2048.0,,60.54,19.9,us-west-2,usw2-az1,x86_64
p5.4xlarge,H100,1.0,16.0,256.0,,6.88,3.1,us-east-1,use1-az1,x86_64
""",
    "aws/images.csv": "Tag,Region,OS,OSVersion,ImageId,CreationDate,BaseImageId\n",
    "aws/instance_quota_mapping.csv": "InstanceType,OnDemandInstanceCode,SpotInstanceCode\n",
    "common/accelerators.csv": "AcceleratorName,Clouds\nA100,['AWS']\nH100,['AWS']\n",
    "common/metadata.csv": "AcceleratorName,MemoryInfo\n",
}

# The optimizer needs no account, only AWS as an enabled cloud.
OPTIMIZE = """
import json, sys, sky, sky.check
from rsb_cluster.config.job import Job
from rsb_cluster.backends.skypilot import prices
sky.check.get_cached_enabled_clouds_or_refresh = lambda *_, **__: [sky.AWS()]
for fields, config in json.load(sys.stdin):
    secrets = [(name, "x") for name in config.get("secrets", {})]
    with sky.Dag() as dag:
        task = sky.Task.from_yaml_config(config, secrets_overrides=secrets)
    sky.Optimizer.optimize(dag, quiet=True)
    best = task.best_resources
    job = Job.model_validate(fields)
    estimate = prices.price(job, spot=job.cloud.spot)
    print(json.dumps([best.instance_type, best.region, best.use_spot, best.get_cost(3600), estimate.usd_per_h]))
"""


@pytest.mark.parametrize(
    ("job", "best"),
    [
        # The cheapest of spot, wherever: in another region than the cheapest on demand.
        (("cloud-spot", "nodes=4"), ("p5.48xlarge", "us-west-2", True, 19.9)),
        (("cloud", "nodes=4"), ("p5.48xlarge", "us-east-1", False, 55.04)),
        (("cloud-spot", "cloud.infra=['aws/us-east-1']"), ("p5.48xlarge", "us-east-1", True, 28.1)),
        (
            ("cloud-spot", "gpus_per_node=1", "cloud.accelerators='H100:1'", "cpus_per_task=16", "mem_gb=128"),
            ("p5.4xlarge", "us-east-1", True, 3.1),
        ),
        (("cloud-spot", *CPU, "cpus_per_task=8"), ("m6i.2xlarge", "us-east-1", True, 0.09)),
    ],
)
def test_the_optimizer_chooses_the_node_of_our_estimate(python, tmp_path, job, best):
    for name, content in CATALOG.items():
        path = tmp_path / ".sky/catalogs/v8" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    loaded = load_job(*job)
    config = sky_task(spec_of(loaded, python="3.11"), {"AWS_REGION": "us-east-1"})
    given = json.dumps([(loaded.model_dump(mode="json"), config)])
    said = json.loads(run(python, tmp_path, OPTIMIZE, given=given).splitlines()[-1])
    assert tuple(said[:4]) == best, "an hour of a node"
    assert said[4] == best[3], "the estimate before submitting"


CALLS = """
import inspect, sky, sky.jobs, sky.exceptions
from sky.schemas.api.responses import ManagedJobRecord
from sky.server import common
from sky.client import sdk
from rsb_cluster.backends.skypilot import engine
from rsb_cluster.backends.skypilot.backend import _STATES
from sky.jobs import ManagedJobStatus
inspect.signature(sky.jobs.launch).bind("task", name="x", pool=None)
inspect.signature(sky.jobs.queue_v2).bind(refresh=False, name_match="rsb-", fields=engine._FIELDS)
inspect.signature(sky.jobs.cancel).bind(job_ids=[1])
inspect.signature(sky.jobs.tail_logs).bind(job_id=1, follow=False, controller=True, tail=9, output_stream=None)
assert set(engine._FIELDS) <= set(ManagedJobRecord.model_fields)
live = {status.value for status in ManagedJobStatus if not status.is_terminal()}
assert live <= set(_STATES), live - set(_STATES)
assert not {status.value for status in ManagedJobStatus.terminal_statuses()} & set(_STATES)
common.is_api_server_local, common.get_server_url, sdk.enabled_clouds
sky.exceptions.ClusterNotUpError, sky.api_info, sky.api_stop, sky.get
# What its log says of launches.
from sky.jobs import controller, recovery_strategy, state
from rsb_cluster.backends.skypilot import launches
said = "".join(map(inspect.getsource, (controller, recovery_strategy, state))).replace("'\\n", "'")
words = " ".join(said.replace("'", " ").split())
for sign in (launches._FAILED, launches._CRASHED, *launches._STARTED, "Failed to successfully submit the job to the"):
    assert " ".join(sign.split()) in words, sign
"""


def test_the_calls_and_states_are_those_of_the_library(python, tmp_path):
    run(python, tmp_path, CALLS)


def test_the_command_line_works_with_the_click_that_skypilot_requires(python, tmp_path):
    import_click = "import click, importlib.metadata as m; print(m.version('click'))"
    assert run(python, tmp_path, import_click).startswith("8.1.")
    cli = "from rsb_cluster.cli import main; main()"
    assert "doctor" in run(python, tmp_path, cli, "--help")
    assert "cloud-spot" in run(python, tmp_path, cli, "jobs", "list")


SERVER = """
import json, sky, sys
from rsb_cluster.backends.skypilot import engine
from rsb_cluster.errors import SubmitError
server = engine.server()
try:
    engine.launch(json.load(sys.stdin), pool="")
except SubmitError as error:
    refused = str(error)
print(json.dumps([server.is_local, server.version, engine.enabled_clouds(), engine.jobs(), refused]))
sky.api_stop()
"""


@pytest.mark.long  # a server that takes a machine for itself
def test_a_server_without_clouds_answers_and_refuses_with_a_message(python, tmp_path):
    """It starts without a network. No cloud is enabled, so a launch is refused, which becomes a SubmitError."""
    said = run(python, tmp_path, SERVER, given=json.dumps([task("spot")])).splitlines()
    (found,) = [line for line in said if line.startswith("[true, ")]
    is_local, version, clouds, jobs, refused = json.loads(found)
    assert is_local and version.startswith("0.14.") and clouds == [] and jobs == {}
    assert refused.startswith("SkyPilot: ")
