"""The cloud lab of ``make cloud-evidence`` asks for one list of versions, on this machine and on its offline nodes."""

import functools
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.command import ROOT

LAB = ROOT / "tests" / "cloud"


def listed() -> dict[str, str]:
    lines = (LAB / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", pin) for pin in pins), "names and versions, and no places"
    return dict(pin.split("==") for pin in pins)


def test_the_list_has_all_that_the_lab_asks_for():
    """A new dependency, here or of SkyPilot, needs 'make cloud-constraints'."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [line for line in (LAB / "requirements.in").read_text().splitlines() if not line.startswith("#")]
    asked += [*project["project"]["dependencies"], *project["dependency-groups"]["test"]]
    pins = listed()
    for requirement in map(Requirement, asked):
        version = pins.get(canonicalize_name(requirement.name))
        assert version and requirement.specifier.contains(version), f"{requirement}: the list has {version}"


def test_nothing_is_installed_but_from_the_list():
    script = (LAB / "setup.sh").read_text()
    before, _, after = script.partition("export UV_CONSTRAINT=$list UV_BUILD_CONSTRAINT=$list")
    assert " install " in after and not re.search(r"(uv|\$uv)\S* (pip install|venv)|pip3? install", before)
    assert "UV_CONSTRAINT=/etc/cloud-lab.txt" in after, "nor on the machines"
    assert not re.search(r"[\w\])]==\d", script), "no version stands beside the list"


class Index(http.server.SimpleHTTPRequestHandler):
    """A package index that writes no log."""

    def log_message(self, *args):
        pass


def publish(folder: Path, *versions: str) -> None:
    """Write an index with versions of a package, whose metadata can be read without the wheels."""
    page = folder / "simple" / "dated"
    page.mkdir(parents=True, exist_ok=True)
    links = []
    for version in versions:
        wheel, info = page / f"dated-{version}-py3-none-any.whl", f"dated-{version}.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: dated\nVersion: {version}\n"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{info}/METADATA", metadata)
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
        wheel.with_name(f"{wheel.name}.metadata").write_text(metadata)
        digest = hashlib.sha256(metadata.encode()).hexdigest()
        links.append(f'<a href="{wheel.name}" data-core-metadata="sha256={digest}">{wheel.name}</a>')
    (page / "index.html").write_text("<!DOCTYPE html><html><body>" + "".join(links) + "</body></html>")


@pytest.fixture
def index(tmp_path):
    """The URL of a package index whose newer version came after the node's cache was filled."""
    folder = tmp_path / "index"
    publish(folder, "2.9.0", "4.0.0")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Index, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/simple"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_offline_node_asks_for_the_listed_version_and_not_for_the_newest(tmp_path, index):
    """The cache has the newest one's metadata, as of any look at the index, and not the package itself."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert uv, "`make test` installs it"
    node = {"UV_PROGRAM": uv, "UV_CACHE": str(tmp_path / "cache"), "UV_DEFAULT_INDEX": index}
    env = os.environ | node | {"UV_CONSTRAINT": str(tmp_path / "list.txt")}
    (tmp_path / "list.txt").write_text("dated==2.9.0\n")

    def run(*words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", str(LAB / "uv.sh"), *words], cwd=tmp_path, env=env | changes, capture_output=True, text=True
        )

    def install(name: str, **changes: str) -> subprocess.CompletedProcess[str]:
        assert run("venv", "--python", sys.executable, name).returncode == 0
        return run("pip", "install", "--python", f"{name}/bin/python", "dated", **changes)

    assert install("lab").returncode == 0
    (tmp_path / "asked.in").write_text("dated\n")
    assert run("pip", "compile", "asked.in", UV_CONSTRAINT="").returncode == 0
    failed = install("without", UV_OFFLINE="1", UV_CONSTRAINT="")
    assert failed.returncode and "4.0.0" in failed.stderr
    assert "dated==2.9.0" in install("node", UV_OFFLINE="1").stderr
