"""Against the real SkyPilot, in an environment of its own that the test makes (330 MB from the package index).

python -m pytest -m long tests/integration/test_skypilot.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import ROOT
from tests.unit.test_cloud_task import TASKS, task

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """The interpreter of an environment with our package and the extra ``cloud``, as a user installs it."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv is None:
        pytest.skip("this machine has no uv")
    folder = tmp_path_factory.mktemp("sky")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run([uv, "venv", "--quiet", "--python", version, folder / "venv"], check=True)
    made = str(folder / "venv" / "bin" / "python")
    subprocess.run([uv, "pip", "install", "--quiet", "--python", made, f"{ROOT}[cloud]"], check=True)
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


CALLS = """
import inspect, sky, sky.jobs, sky.exceptions
from sky.schemas.api.responses import ManagedJobRecord
from sky.server import common
from sky.client import sdk
from rsb_cluster.scheduler.cloud import _STATES, engine
from sky.jobs import ManagedJobStatus
inspect.signature(sky.jobs.launch).bind("task", name="x", pool=None)
inspect.signature(sky.jobs.queue_v2).bind(refresh=False, name_match="rsb-", fields=engine._FIELDS)
inspect.signature(sky.jobs.cancel).bind(job_ids=[1])
assert set(engine._FIELDS) <= set(ManagedJobRecord.model_fields)
live = {status.value for status in ManagedJobStatus if not status.is_terminal()}
assert live <= set(_STATES), live - set(_STATES)
assert not {status.value for status in ManagedJobStatus.terminal_statuses()} & set(_STATES)
common.is_api_server_local, common.get_server_url, sdk.enabled_clouds
sky.exceptions.ClusterNotUpError, sky.api_info, sky.api_stop, sky.get
"""


def test_the_engines_calls_and_words_are_those_of_the_library(python, tmp_path):
    run(python, tmp_path, CALLS)


def test_the_command_line_works_on_the_click_that_skypilot_wants(python, tmp_path):
    import_click = "import click, importlib.metadata as m; print(m.version('click'))"
    assert run(python, tmp_path, import_click).startswith("8.1.")
    cli = "from rsb_cluster.cli import main; main()"
    assert "doctor" in run(python, tmp_path, cli, "--help")
    assert "cloud-spot" in run(python, tmp_path, cli, "jobs", "list")


SERVER = """
import json, sky, sys
from rsb_cluster.scheduler.cloud import engine
from rsb_cluster.errors import SubmitError
server = engine.server()
try:
    engine.launch(json.load(sys.stdin), pool="")
except SubmitError as error:
    refused = str(error)
print(json.dumps([server.is_local, server.version, engine.enabled_clouds(), engine.jobs(), refused]))
sky.api_stop()
"""


def test_a_server_without_clouds_answers_and_refuses_with_a_message(python, tmp_path):
    """It starts without a network. Nothing is enabled, so a launch is refused; that is heard as ours."""
    said = run(python, tmp_path, SERVER, given=json.dumps([task("spot")])).splitlines()
    (found,) = [line for line in said if line.startswith("[true, ")]
    is_local, version, clouds, jobs, refused = json.loads(found)
    assert is_local and version.startswith("0.14.") and clouds == [] and jobs == {}
    assert refused.startswith("SkyPilot: ")
