"""Each module can be imported alone, the command line loads what it needs, and tests stand where their module does."""

import json
import os
import pkgutil
import subprocess
import sys

import pytest

import rsb_cluster
from tests.command import ROOT

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(rsb_cluster.__path__, "rsb_cluster.") if not m.name.endswith("__main__")
)
HEAVY_MODULES = [name for name in MODULES if name.startswith("rsb_cluster.train")]
LIGHT_MODULES = [name for name in MODULES if name not in HEAVY_MODULES]

HEAVY = (
    "torch", "torchvision", "timm", "numpy", "webdataset", "submitit", "s3fs", "botocore", "sklearn", "PIL",
)  # fmt: skip

# Each in a child of one interpreter that has imported nothing of ours; the packages of others are loaded once.
EACH_ALONE = """
import importlib, os, sys, traceback
for name in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} cannot be imported alone")
"""


def python(*args: str, cwd: object = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_each_file_of_unit_tests_stands_where_its_module_does():
    """The tests of rsb_cluster/a/b.py, or of all of a package b, are in tests/unit/a/test_b.py."""
    unit = ROOT / "tests" / "unit"
    files = [path.relative_to(unit) for path in unit.rglob("test_*.py") if path.name != "test_layers.py"]
    places = {".".join(("rsb_cluster", *path.parent.parts, path.stem.removeprefix("test_"))) for path in files}
    assert len(places) > 60
    assert sorted(places - set(MODULES)) == []


def test_the_package_has_modules():
    assert len(LIGHT_MODULES) > 20 and len(HEAVY_MODULES) > 8


def test_each_module_imports_alone_and_without_a_warning():
    others = "import click, fsspec, jinja2, numpy, plotly, pydantic, rich.table, submitit, tomlkit\n"
    assert python("-W", "error", "-c", others + EACH_ALONE, *LIGHT_MODULES).stderr == ""


def test_each_module_of_training_imports_alone():
    """The warnings of torch and timm are not ours."""
    python("-c", "import torch, torchvision, timm, webdataset\n" + EACH_ALONE, *HEAVY_MODULES)


SAY_MODULES = """
import json, sys
from rsb_cluster.cli import main
main(sys.argv[1:], standalone_mode=False)
sys.stderr.write("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_help_loads_click_and_nothing_else(tmp_path):
    """So it answers in a third of a second."""
    loaded = set(json.loads(python("-c", SAY_MODULES, "--help", cwd=tmp_path).stderr.splitlines()[-1]))
    foreign = loaded - set(sys.stdlib_module_names) - {"rsb_cluster", "click", "__main__"}
    assert [name for name in foreign if not name.startswith("_")] == []


@pytest.mark.parametrize(
    "command",
    [
        ["submit", "--help"], ["recipes", "list"], ["recipes", "show", "a1"],
        ["recipes", "diff", "a1", "a2"], ["jobs", "list"], ["jobs", "show", "slurm"], ["sweeps", "list"],
        ["status"], ["collect"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_light_command_loads_nothing_heavy(tmp_path, command):
    done = python("-c", SAY_MODULES, *command, cwd=tmp_path)
    loaded = json.loads(done.stderr.splitlines()[-1])
    assert "click" in loaded
    assert sorted(set(HEAVY) & set(loaded)) == []
