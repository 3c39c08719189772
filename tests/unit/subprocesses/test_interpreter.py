"""What lies in the current folder, or is hidden by PYTHONPATH, is not what is executed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rsb_cluster.errors import ConfigError
from rsb_cluster.subprocesses.interpreter import check_python_path, drop_empty_entries, interpreter
from tests.command import ROOT

SAY = "import json; from rsb_cluster.subprocesses.interpreter import interpreter; print(json.dumps(interpreter()))"


def run(*command: str, cwd: Path, python_path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {} if python_path is None else {"PYTHONPATH": python_path}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder with files of names that everything imports."""
    for name in ("random", "json", "timm", "submitit"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('caught')\n")
    return tmp_path


@pytest.mark.parametrize("module", ["rsb_cluster", "submitit.core._submit", "rsb_cluster.node.rank"])
def test_nothing_is_imported_from_the_current_folder(trap: Path, module: str) -> None:
    assert "caught" in run(sys.executable, "-m", module, cwd=trap).stderr, "as Python does by itself"
    assert "caught" not in run(*interpreter(), "-m", module, cwd=trap).stderr


def test_a_checkout_that_is_not_installed_comes_from_the_current_folder(tmp_path: Path) -> None:
    """Without it there would be nothing to start; as in a copy of it beside an installed one."""
    shutil.copytree(ROOT / "rsb_cluster", tmp_path / "rsb_cluster", ignore=shutil.ignore_patterns("__pycache__"))
    assert "-P" not in run(sys.executable, "-c", SAY, cwd=tmp_path).stdout
    named = run(sys.executable, "-c", SAY, cwd=tmp_path, python_path=str(tmp_path))
    assert "-P" in named.stdout, "PYTHONPATH names it, too"


def test_a_process_that_was_started_safely_starts_others_so(tmp_path: Path) -> None:
    assert run(*interpreter(), "-c", SAY, cwd=tmp_path).stdout == f'["{sys.executable}", "-P"]\n'


def test_what_a_site_prints_when_python_starts_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('Python of the site')\n")
    said = run(*interpreter(), "-c", SAY, cwd=tmp_path, python_path=f"{tmp_path}:{ROOT}").stdout
    plain = run(sys.executable, "-c", SAY, cwd=tmp_path, python_path=f"{tmp_path}:{ROOT}").stdout
    assert said.splitlines()[1:] == plain.splitlines()[1:] == [f'["{sys.executable}", "-P"]']


@pytest.mark.parametrize(("before", "after"), [("/a:", "/a"), (":/a::/b", "/a:/b"), ("", ""), ("/a", "/a")])
def test_empty_entries_of_the_path_stand_for_no_folder(before: str, after: str) -> None:
    environment = {"PYTHONPATH": before, "X": ":"}
    drop_empty_entries(environment)
    assert environment == {"PYTHONPATH": after, "X": ":"}
    drop_empty_entries(none := {"X": ":"})
    assert none == {"X": ":"}


@pytest.mark.parametrize("file", ["timm.py", "torch/__init__.py", "numpy.py", "torchvision/__init__.py"])
def test_a_path_that_hides_an_installed_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("")
    monkeypatch.setenv("PYTHONPATH", f"/nowhere{os.pathsep}{tmp_path}")
    with pytest.raises(ConfigError, match=rf"PYTHONPATH: {tmp_path / file} would be imported as '\w+', instead of the"):
        check_python_path()


def test_a_path_that_hides_nothing_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without ``__init__.py`` is not imported; and packages may be there alone, or be the installed ones."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "other.py").write_text("")
    installed = Path(pytest.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", str(tmp_path), str(installed)]))
    check_python_path()
    (tmp_path / "timm.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    check_python_path()
