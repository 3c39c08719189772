"""The README's commands, as printed: each is run here, in a folder and a bucket as they suppose, or by another test.

What is printed without --dry-run and would train on a cluster is planned here, with --dry-run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from rsb_cluster.cli import main
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.runs.sweep import Member, Sweep, write_sweep
from rsb_cluster.storage.store import Store
from tests.commands_of import ROOT, commands_of
from tests.made_runs import make_runs
from tests.servers.s3 import S3Server
from tests.unit import formats
from tests.unit.own_pictures import folders_of_pictures
from tests.unit.tars import pair, tar_of

# What trains, installs or needs a Slurm: the test that runs it.
ELSEWHERE = {
    "pip install -c constraints.txt .": "integration/test_wheel.py",
    "pip install '.[cloud]'": "integration/test_skypilot.py",
    "rsb-cluster submit --recipe digits --wait": "integration/test_local.py",
    "rsb-cluster preempt digits": "integration/test_local.py",
    "rsb-cluster submit --recipe a3 --data data/photos --job ./here.toml --seeds 3 --dry-run": (
        "integration/test_tutorial.py"
    ),
    "rsb-cluster submit --recipe ./mine.toml --job ./here.toml --set optimizer.lr=4e-3 --dry-run": (
        "integration/test_tutorial.py"
    ),
    "export RSB_RUNS=s3://bucket/runs": "integration/test_cloud_run.py",  # and here, as EXPORT
    "rsb-cluster logs -f a1": "integration/test_cloud_run.py",
    "rsb-cluster preempt a1": "integration/test_cloud_run.py",
    "rsb-cluster cancel a1": "integration/test_cloud_run.py",
    "rsb-cluster selftest resume --job ./here.toml": "integration/test_selftest.py",
    "rsb-cluster sweep resnet-depths --parallel 4": "integration/conftest.py",
    "rsb-cluster sweep resnet-depths --collect": "integration/conftest.py",
    "rsb-cluster retry --failed resnet-depths": "integration/conftest.py",
    "rsb-cluster export a1-resnet50-s0 --to hf s3://bucket/models/resnet50-a1 --checkpoint best": (
        "unit/weights/test_export.py"
    ),
}
NO_IMAGENET = "no shards of 'imagenet-1k' were found"
NO_SLURM = "scontrol show config failed"  # this test starts none; where sbatch is not installed, all is well
# What is refused here, for lack of what no test has: what is lacking, and what the command says.
REFUSED = {
    # An account at a cloud; the long tests in tests/cloud have a cloud of their own.
    "rsb-cluster doctor --job cloud-spot --data s3://bucket/imagenet-1k": "checks found a problem",
    "rsb-cluster submit --recipe a1 --nodes 4 --job cloud-spot --data s3://bucket/imagenet-1k --dry-run "
    "--images-per-s 2500": "s3://bucket/imagenet-1k (NOT FOUND)",
    # ImageNet. The README shows the first of these as it is here.
    "rsb-cluster submit --recipe a1 --nodes 4 --dry-run --images-per-s 1200": NO_IMAGENET,
    "rsb-cluster submit --recipe a3 --set data.classes=./ten.txt": NO_IMAGENET,
    "rsb-cluster sweep resnet-depths --dry-run --images-per-s resnet18=4000 --images-per-s 1000": NO_IMAGENET,
    "rsb-cluster shards make imagenet-1k s3://bucket/imagenet-1k --root /data/ilsvrc": "/data/ilsvrc/train",
    # A Slurm whose nodes have GPUs.
    "rsb-cluster submit --recipe a3 --data s3://bucket/my-images": NO_SLURM,
    # Stanford's cars, and a run on ImageNet.
    "rsb-cluster submit --recipe ft-cars --init a1-resnet50-s0-2df9ebd6 --data s3://bucket/stanford-cars": (
        "s3://bucket/stanford-cars (NOT FOUND)"
    ),
    # ImageNet, and eight GPUs.
    "rsb-cluster evaluate a1-resnet50-s0 resnet50.a1_in1k --data s3://bucket/imagenet-1k --labels real --gpus 8": (
        "s3://bucket/imagenet-1k"
    ),
}
EXPORT = "export RSB_RUNS=s3://bucket/runs"
TRAINS = ("rsb-cluster submit ", "rsb-cluster sweep ")


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> Callable[[str], str]:
    """Returns what a command prints in a folder and a bucket with what the README supposes to be there."""
    monkeypatch.chdir(tmp_path)
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    s3.make_bucket("bucket")
    folders_of_pictures(tmp_path / "photos")
    folders_of_pictures(tmp_path / "images")
    formats.parquet(tmp_path / "hub" / "beans")
    theirs = Store("s3://bucket/theirs/train")
    theirs.write_bytes("own-0.tar", tar_of(pair("a", b"image", 0) + pair("b", b"image", 1)))
    (tmp_path / "ten.txt").write_text("\n".join(f"n{i:08d}" for i in range(10)))
    runs = make_runs(tmp_path / "runs", 6, rows=4, endings=("finished",))
    members = tuple(Member(run_id=run.run_id, recipe="a1", model="resnet50", seed=0) for run in runs)
    write_sweep(str(tmp_path / "runs"), Sweep(sweep_id="resnet-depths-1", file="", created=1, members=members))

    def run(command: str) -> str:
        if command.startswith("rsb-cluster shards verify"):  # after the plans, which find that these are not ImageNet's
            make_set(open_set(str(tmp_path / "photos")), Store("s3://bucket/imagenet-1k"))
        words = shlex.split(command)[1:]
        if command.startswith(TRAINS) and "--dry-run" not in words:
            words.append("--dry-run")
        # The cloud's commands are typed after the export.
        env = dict([shlex.split(EXPORT)[1].split("=")]) if "--job cloud-spot" in command else {}
        done = CliRunner().invoke(main, words, env=env, catch_exceptions=False)
        if command not in REFUSED:
            assert done.exit_code == 0, f"{command}\n{done.output}"
        elif done.exit_code or REFUSED[command] != NO_SLURM:
            assert done.exit_code in (1, 2) and REFUSED[command] in done.output, f"{command}\n{done.output}"
        return done.stdout

    return run


@pytest.mark.s3
def test_every_command_of_the_readme_does_what_it_says(typed: Callable[[str], str], tmp_path: Path) -> None:
    commands = commands_of("README.md")
    known = {*ELSEWHERE, *REFUSED}
    assert len(commands) > 30 and known <= set(commands), "a command that is gone is named here"
    said = {command: typed(command) for command in commands if command not in ELSEWHERE}
    assert "3 classes" in said["rsb-cluster shards make ./photos data/photos"]
    planned = said["rsb-cluster submit --recipe a1 --nodes 4 --dry-run --images-per-s 1200"]
    shown = (ROOT / "README.md").read_text().partition("--dry-run --images-per-s 1200\nrecipe")[2].partition("...\n")[0]
    for line in shown.splitlines()[1:]:
        if "(jobs/" not in line and "data/" not in line:  # paths are shortened in the README
            assert f"\n{line}\n" in planned, line
    assert (tmp_path / "table.tex").read_text().startswith("%") or "tabular" in (tmp_path / "table.tex").read_text()
    assert (tmp_path / "report.html").is_file() and (tmp_path / "mine.toml").is_file()


def test_the_commands_that_run_elsewhere_are_run_there_as_printed() -> None:
    for command, file in ELSEWHERE.items():
        assert f'as_printed("{command}")' in (ROOT / "tests" / file).read_text(), f"{file} does not run {command}"


def test_the_pictures_of_the_readme_are_there_and_small() -> None:
    text = (ROOT / "README.md").read_text()
    pictures = re.findall(r"!\[[^]]+\]\(docs/([^)]+)\)", text)
    assert pictures == ["terminal.svg", "report.png"]
    for name in pictures:
        assert 1_000 < (ROOT / "docs" / name).stat().st_size < 100_000
