"""docs/tutorial.md, as a reader goes through it: every command, on a real Slurm, with small pictures and two seeds.

Its two runs are an array whose tasks share a node, which is tested on the way.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from rsb_cluster.runs.run import Run
from tests.command import RsbCluster
from tests.commands_of import as_printed, commands_of
from tests.faults.victim import on_slurm
from tests.servers.slurm import SlurmCluster
from tests.tutorial_edits import INSTALLATION, JOB, RECIPE, edit
from tests.unit.own_pictures import folders_of_pictures

pytestmark = pytest.mark.slurm

# For small pictures, few of them, on CPUs: what the reader finds in the tutorial, and what the test types.
SMALLER = {"resnet18,resnet34": "test_resnet,resnet10t", "resnet18": "test_resnet", "slurm": "slurm-cpu"}
SEEDS = ("--seeds 3", "--seeds 2")


def typed(command: str) -> list[str]:
    words = shlex.split(command.replace(*SEEDS))
    for old, new in SMALLER.items():
        words = [new if word == old else word.replace(f"-{old}-", f"-{new}-") for word in words]
    return words[1:]


def test_a_folder_of_pictures_becomes_a_table_with_error_bars(tmp_path: Path, slurm: SlurmCluster) -> None:
    rsb = RsbCluster(tmp_path, slurm.env)
    folders_of_pictures(tmp_path / "pictures", px=40)
    commands = [command for command in commands_of("docs/tutorial.md") if not command.startswith(INSTALLATION)]
    said = {}
    for command in commands:
        if command.endswith("--seeds 3"):  # so that both run when the node is looked at
            rsb.hold()
        if command == "rsb-cluster status":
            both_train_on_one_node(rsb, slurm)
        if command.startswith("rsb-cluster logs -f"):
            rsb.allow()
        done = rsb.run(*typed(command))
        said[command] = done.stdout + done.stderr
        if command.startswith("rsb-cluster recipes copy"):
            edit(tmp_path / "pictures.toml", RECIPE)
        if command.startswith("rsb-cluster jobs copy"):
            edit(tmp_path / "here.toml", JOB)
            with (tmp_path / "here.toml").open("a") as file:
                file.write('[slurm]\nnodelist = "n2"\n')
            (tmp_path / "rsb-cluster.toml").write_text('job = "./here.toml"\n')

    def output(beginning: str) -> str:
        return next(text for command, text in said.items() if command.startswith(f"rsb-cluster {beginning}"))

    assert "train on it: rsb-cluster submit --recipe a3 --data data/pictures" in output("shards make")
    assert "train.global_batch" in output("recipes diff") and "data.num_classes" in output("recipes diff")
    assert f"job ./here.toml {tmp_path}/rsb-cluster.toml where" in " ".join(output("config show").split())
    assert "#SBATCH --array=0-1" in output("submit --recipe ./pictures.toml --model resnet18 --seeds 3 --dry-run")
    assert "optimizer.lr = 0.008 is for a batch of 2,048" in output("submit --recipe ./pictures.toml")
    row = next(line for line in output("collect").splitlines() if line.startswith("pictures"))
    assert "±" in row and " 2 " in row
    assert (tmp_path / "report.html").stat().st_size > 100_000
    csv = (tmp_path / "table.csv").read_text()
    assert all(path.name in csv for path in (tmp_path / "runs").glob("pictures-*"))
    assert (tmp_path / "weights" / "model.safetensors").is_file()
    the_readmes_dry_runs_are_ready(rsb)


def the_readmes_dry_runs_are_ready(rsb: RsbCluster) -> None:
    """Those with a job file of one's own, in the same folder."""
    (rsb.cwd / "data" / "photos").symlink_to(rsb.cwd / "data" / "pictures")
    rsb(*as_printed("rsb-cluster recipes copy a3 mine.toml --data data/photos"))
    seeds = rsb(*as_printed("rsb-cluster submit --recipe a3 --data data/photos --job ./here.toml --seeds 3 --dry-run"))
    assert "#SBATCH --array=0-2" in seeds and seeds.rstrip().splitlines()[-1].startswith("ready")
    mine = rsb(
        *as_printed("rsb-cluster submit --recipe ./mine.toml --job ./here.toml --set optimizer.lr=4e-3 --dry-run")
    )
    assert "optimizer.lr" in mine and mine.rstrip().splitlines()[-1].startswith("ready")


def both_train_on_one_node(rsb: RsbCluster, slurm: SlurmCluster) -> None:
    """Two concurrent runs of two ranks on a node of four CPUs: each has its own rendezvous."""
    runs = [Run.at(path.parent, path.name) for path in sorted((rsb.cwd / "runs").glob("pictures-*"))]
    assert len(runs) == 2
    for run in runs:
        on_slurm(rsb, run, slurm).wait_for_steps(1, 5)
    attempts = [run.attempts()[0] for run in runs]
    assert not any(attempt.cause for attempt in attempts), "both run now"
    one, other = attempts
    assert one.job_id.split("_")[0] == other.job_id.split("_")[0]  # one array
    assert one.world_size == other.world_size == 2 and one.hosts == other.hosts
