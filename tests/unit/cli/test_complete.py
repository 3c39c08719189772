"""Completion: what the shell is told, as bash asks for it; and that it imports nothing slow."""

import sys

import click
import pytest

from rsb_cluster.cli import main
from tests.unit.new_runs import make_run

ASK = (
    "import sys\nfrom rsb_cluster.cli import main\n"
    "try:\n    main(prog_name='rsb-cluster')\n"
    "finally:\n    print(*{'torch', 'timm', 'botocore', 'submitit'} & set(sys.modules), file=sys.stderr)"
)  # fmt: skip


@pytest.fixture
def complete(rsb):
    """Returns what bash would offer for the last word of a line, and the slow modules that were imported."""

    def ask(line: str) -> tuple[list[str], list[str]]:
        rsb.env |= {
            "_RSB_CLUSTER_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")),
        }  # fmt: skip
        done = rsb.python("-c", ASK)
        return [word.removeprefix("plain,") for word in done.stdout.split()], done.stderr.split()

    return ask


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rsb-cluster sw", ["sweep", "sweeps"]),
        ("rsb-cluster submit --recipe di", ["digits"]),
        ("rsb-cluster sweep --recipe a1,de", ["a1,deit"]),
        ("rsb-cluster submit --recipe a1 --job slurm-", ["slurm-cpu", "slurm-spot"]),
        ("rsb-cluster submit --model resnet1", ["resnet101", "resnet152", "resnet18"]),
        ("rsb-cluster jobs show local-", ["local-gpu"]),
        ("rsb-cluster sweep resn", ["resnet-depths"]),
        ("rsb-cluster logs dig", ["digits-s0"]),
        ("rsb-cluster cancel nothing", []),
        ("rsb-cluster runs show dig", ["digits-s0"]),
        ("rsb-cluster submit --recipe ./mi", ["file,./mi"]),
        ("rsb-cluster submit --data da", ["dir,da"]),
        ("rsb-cluster shards verify s3://b", []),
        ("rsb-cluster submit --recipe a1 --init dig", ["digits-s0"]),
    ],
)
def test_names_are_completed_without_slow_imports(rsb, complete, line, words):
    make_run(rsb.cwd / "runs")
    assert complete(line) == (words, [])


def test_runs_in_a_bucket_are_not_asked_for(complete):
    assert complete("rsb-cluster logs --runs s3://nobody/runs a1") == ([], [])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(rsb, shell):
    rsb.env["_RSB_CLUSTER_COMPLETE"] = f"{shell}_source"
    done = rsb.python("-c", "from rsb_cluster.cli import main; main(prog_name='rsb-cluster')")
    assert f"_RSB_CLUSTER_COMPLETE={shell}_complete" in done.stdout and sys.executable not in done.stdout


def test_every_argument_that_names_something_is_completed():
    """Names, runs and weights; not what is new, such as the destination of a copy."""
    for group in (main, *(main.commands[name] for name in ("recipes", "jobs", "sweeps", "runs"))):
        for command in group.commands.values():
            for argument in command.params:
                if isinstance(argument, click.Argument) and argument.name != "dest":
                    assert argument._custom_shell_complete, f"{group.name} {command.name}: {argument.name}"
