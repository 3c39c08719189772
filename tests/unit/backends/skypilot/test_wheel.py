"""The code of a cloud run: the package as it is imported here, and the versions of its dependencies."""

import os
import shutil
import subprocess
import sys
import zipfile

import rsb_cluster
from rsb_cluster.backends.skypilot import wheel
from rsb_cluster.node.node_spec import digest
from tests.command import ROOT


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


def test_uncommitted_changes_are_in_it(tmp_path, monkeypatch):
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


def test_pins_are_the_installed_versions_without_local_labels():
    import torch

    pinned = dict(pin.split("==") for pin in wheel.pins())
    assert pinned["torch"] == torch.__version__.partition("+")[0]
    assert {"timm", "numpy", "s3fs", "aiobotocore", "pydantic"} <= pinned.keys()
    assert not {"rsb-cluster", "pytest", "skypilot"} & pinned.keys()
