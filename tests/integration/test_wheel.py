"""Recipes, jobs and references are found wherever the package lies: wheel, sdist, editable install, bare checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.command import ROOT
from tests.commands_of import as_printed

RECIPES = {path.stem for path in (ROOT / "recipes").glob("*.toml")}
JOBS = {path.stem for path in (ROOT / "jobs").glob("*.toml")}
SWEEPS = {"resnet-depths", "deit", "seeds", "smoke"}
PACKAGES = sysconfig.get_path("purelib")  # where all that the package needs is installed

PROGRAM = """
import rsb_cluster
from rsb_cluster.results import references
print(rsb_cluster.__file__)
print(references.lookup("A1", "resnet50").references[0].top1)
"""


def checkout(folder: Path) -> Path:
    """Copy what is, or would be, in version control."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with an sdist, and the wheel that was built from it."""
    tree = checkout(tmp_path_factory.mktemp("tree"))
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", tree], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / "dist"


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty virtual environment into which the package was installed as the README says, and a folder as a target.

    Without a network: what the package needs is found where it is installed for these tests, in these versions.
    """
    folder, tree = tmp_path_factory.mktemp("venv"), dist.parent
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pinned = [line for line in (tree / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    here = {name: version(name) for name in (line.partition("==")[0] for line in pinned) if is_installed(name)}
    (tree / "constraints.txt").write_text("".join(f"{name}=={number}\n" for name, number in here.items()))
    env = os.environ | {
        "PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHONPATH": PACKAGES,
        "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_QUIET": "1",
    }  # fmt: skip
    subprocess.run(["pip", *as_printed("pip install -c constraints.txt .")], cwd=tree, env=env, check=True)
    (wheel,) = dist.glob("*.whl")
    to_target = ["pip", "install", "--no-deps", "--target", folder / "target", wheel]
    subprocess.run(to_target, env=env | {"PYTHONPATH": ""}, check=True)
    return folder


def is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def run(command: list[object], cwd: Path, *path: object) -> str:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(python: list[object], cwd: Path, *path: object, package: Path, bundled: Path) -> None:
    """Check that everything is found in these places."""
    file, top1 = run([*python, "-c", PROGRAM], cwd, *path).splitlines()
    assert Path(file).parent == package
    assert float(top1) > 80
    for kind, where, names in (
        ("recipes", "recipes", RECIPES),
        ("jobs", "jobs", JOBS),
        ("sweeps", "jobs/sweeps", SWEEPS),
    ):
        rows = run([*python, "-m", "rsb_cluster", kind, "list"], cwd, *path).splitlines()[1:]
        assert {row.split()[0] for row in rows} == names
        assert all(row.rstrip().endswith(f" {bundled}/{where}/{row.split()[0]}.toml") for row in rows)


@pytest.fixture
def neutral(tmp_path: Path) -> Iterator[Path]:
    """A folder outside the package, which stays unchanged."""
    folder = tmp_path / "neutral"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def test_the_sdist_holds_what_is_needed_to_build_and_to_test(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert len(names) == len(set(names))
    assert {f"recipes/{name}.toml" for name in RECIPES} | {f"jobs/{name}.toml" for name in JOBS} <= set(names)
    expected = {"pyproject.toml", "README.md", "LICENSE", "rsb_cluster/cli/__init__.py", "tests/conftest.py"}
    assert expected <= set(names)
    assert not [
        name for name in names if "__pycache__" in name or name.startswith((".venv", "dist/", "runs/", "data/"))
    ]


def test_the_wheel_holds_each_file_once_and_nothing_else(dist):
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    assert len(names) == len(set(names))
    info = next(name.split("/")[0] for name in names if name.endswith("METADATA"))
    ours = {name for name in names if not name.startswith(info)}
    package = dist.parent / "rsb_cluster"
    tree = {str(path.relative_to(dist.parent)) for path in package.rglob("*") if path.is_file()}
    bundled = {f"recipes/{name}.toml" for name in RECIPES} | {f"jobs/{name}.toml" for name in JOBS}
    bundled |= {f"jobs/sweeps/{name}.toml" for name in SWEEPS}
    assert ours == tree | {f"rsb_cluster/_bundled/{name}" for name in bundled}
    assert sorted(name.rsplit("/", 1)[-1] for name in ours if name.endswith("a1.toml")) == ["a1.toml"]
    assert {f"{info}/entry_points.txt", f"{info}/licenses/LICENSE"} <= set(names)


def test_an_installed_wheel_finds_its_files(installed, neutral):
    package = installed / "target" / "rsb_cluster"
    check([sys.executable], neutral, installed / "target", PACKAGES, package=package, bundled=package / "_bundled")


def test_an_installed_wheel_in_an_environment_of_its_own_has_the_command(installed, neutral):
    (package,) = installed.glob("lib/python*/site-packages/rsb_cluster")
    check([installed / "bin" / "python"], neutral, PACKAGES, package=package, bundled=package / "_bundled")
    command = [installed / "bin" / "rsb-cluster", "submit", "--recipe", "digits", "--job", "local", "--dry-run"]
    assert "550 (25 epochs of 22)" in run(command, neutral, PACKAGES)


def test_recipes_beside_an_installed_wheel_are_not_used(installed, neutral):
    stranger = installed / "target" / "recipes"
    stranger.mkdir()
    (stranger / "a1.toml").write_text("not = 'ours'")
    try:
        shown = run([sys.executable, "-m", "rsb_cluster", "recipes", "list"], neutral, installed / "target", PACKAGES)
        assert str(stranger) not in shown
    finally:
        shutil.rmtree(stranger)


def test_the_editable_install_finds_the_checkouts_files(neutral):
    check([sys.executable], neutral, package=ROOT / "rsb_cluster", bundled=ROOT)


def test_a_bare_checkout_finds_its_files(tmp_path, neutral):
    tree = checkout(tmp_path / "a tree")
    check([sys.executable], neutral, tree, package=tree / "rsb_cluster", bundled=tree)


def test_an_unpacked_sdist_finds_its_files(dist, tmp_path, neutral):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    tree = tmp_path / path.name.removesuffix(".tar.gz")
    check([sys.executable], neutral, tree, package=tree / "rsb_cluster", bundled=tree)
