"""The SkyPilot task: as reviewed, and with its shell lines run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rsb_cluster.backends.skypilot.sky_task import as_yaml, sky_task
from rsb_cluster.errors import ConfigError
from rsb_cluster.node.node_spec import SPEC_SHA256, Wheel, digest
from tests.command import ROOT
from tests.unit.bundled import load_job
from tests.unit.sky_jobs import HERE, TASKS, spec_of, task

GOLDEN = ROOT / "tests" / "unit" / "golden"


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
def test_its_shell_lines_are_valid(name):
    for lines in (task(name)["setup"], task(name)["run"]):
        done = subprocess.run(["bash", "-n"], input=lines, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("code", "heard"), [(0, 0), (75, 75), (100, 0), (130, 0), (1, 1), (137, 137)])
def test_the_exit_code_says_whether_another_start_makes_sense(tmp_path, monkeypatch, code, heard):
    """75: it does. A run that failed (100) or was stopped (130) is not restarted; else the engine decides."""
    lines = task("spot")["run"]
    python = tmp_path / re.search(r'"\$HOME/(.*)"', lines)[1]
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\n[ "$*" = "-P -m rsb_cluster.node" ] && exit {code}\nexit 99\n')
    python.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert subprocess.run(["bash", "-c", lines], capture_output=True).returncode == heard


def test_an_address_with_a_password_is_refused():
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL contains a password"):
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
        '#!/bin/bash\n[ "$*" = "-P -m rsb_cluster.node" ] && touch "$HOME/started" && exit\n'
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
