"""What the command line says, where it says it, and with which exit code."""

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from rsb_cluster.cli import main
from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.runs.run import Attempt, Run, Spec
from tests.servers.daemons import GUARD_S

LINES = re.compile(r"^(.+?)  +(.+(?:\n +.+)*)$", re.MULTILINE)


def commands(group=main, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize(
    ("path", "command"), list(commands()), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_command_and_option_says_what_it_is_for(path, command):
    assert command.help and len(command.help) > 20
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help and parameter.help.endswith((".", "]")), f"{' '.join(path)} {parameter.opts}"


def test_help_goes_to_stdout(rsb):
    done = rsb.run("--help")
    assert done.stdout.startswith("Usage: ") and done.stderr == ""
    for (name, *_), _ in commands():
        assert f"  {name} " in done.stdout
    assert rsb("--version").startswith("rsb-cluster, version ")


# --- mistakes: exit code 2, and a message that helps ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("recipes show a9", "Error: there is no recipe 'a9'. Known: a1, a1h, a2, a2-reg, a3, deit, digits,"),
        ("recipes show ./a1.toml", "Error: there is no file a1.toml."),
        ("recipes diff a1 diet", "Error: there is no recipe 'diet'. Did you mean 'deit'?"),
        ("recipes show a1 --set optimizer.lr=-1", "with --set: optimizer.lr = -1: input should be greater than 0."),
        ("jobs show slrum", "Error: there is no job 'slrum'. Did you mean 'slurm'? Known: cloud, "),
        ("submit", "Error: Missing option '--recipe'."),
        ("submit --recipe a9", "Error: there is no recipe 'a9'."),
        ("submit --recipe a1 --dry-run --job nowhere", "Error: there is no job 'nowhere'. Known: cloud,"),
        ("submit --recipe a1 --seed 1 --seeds 2", "--seed names one seed, --seeds counts from 0; give one of them."),
        ("submit --recipe a1 --seed -1", "Invalid value for '--seed': -1 is not in the range x>=0."),
        ("submit --recipe a1 --seeds 0", "Invalid value for '--seeds': 0 is not in the range x>=1."),
        ("submit --recipe a1 --nodes four", "'four' is neither a number of nodes nor a range such as 2-4"),
        ("submit --recipe a1 --images-per-s 0", "Invalid value for '--images-per-s': 0.0 is not in the range x>0."),
        ("submit --recipe a1 --nods 4", "Error: No such option"),
        ("submit --recipe a1 --dry-run --set data.trian_samples=1",
         "unknown key 'data.trian_samples'. Did you mean 'data.train_samples'?"),
        ("submit --recipe a1 --dry-run --set job.node=1", "slurm.toml: unknown key 'node'. Did you mean 'nodes'?"),
        ("submit --recipe a1 --dry-run --set lr", "'lr' is not of the form key=value, for example optimizer.lr=4e-3."),
        ("submit --recipe a1 --dry-run --job slurm --nodes 3",
         "train.global_batch = 2048 is not divisible by 24 ranks (slurm.toml: 3 nodes × 8 GPUs). Use 2040 or 2064."),
        ("submit --recipe a1 --dry-run --job local --nodes 2", "nodes = 2: the local back end is this machine alone."),
        ("submit --recipe a1 --dry-run --job slurm --set job.slurm.nodes=2", "slurm.nodes cannot be set. Set the"),
        ("submit --recipe a1 --dry-run --job local --gpus-per-node 2 --set job.tasks_per_node=0",
         "gpus_per_node = 2, but CUDA_VISIBLE_DEVICES='5' lets this shell use 1. Use --gpus-per-node 1, or set"),
        ("status zzz", "0 runs are there; 'rsb-cluster status' lists them."),
        ("sweep", "Error: name a sweep file ('rsb-cluster sweeps list'), or give --recipe."),
        ("sweep resnet-depth", "Error: there is no sweep 'resnet-depth'. Did you mean 'resnet-depths'? Known: deit,"),
        ("sweep seeds --recipe a1", "'seeds' is a sweep file, which says recipes, models and values itself; give one"),
        ("sweep --recipe a1,a9 --dry-run", "Error: there is no recipe 'a9'."),
        ("sweep --recipe a1 --name A --dry-run", "the command line: name = 'A': string should match pattern"),
        ("sweep --recipe a1 --vary optimizer.lr --dry-run", "--vary 'optimizer.lr' is not of the form key=value,value"),
        ("sweep --recipe a1 --vary optimizer.rl=1 --dry-run", "unknown key 'optimizer.rl'. Did you mean"),
        ("sweep seeds --dry-run --images-per-s fast", "--images-per-s fast is neither images/s, as in 1200, nor MODEL"),
        ("sweep resnet-depths --dry-run --job local", "nodes = 2: the local back end is this machine alone."),
        ("retry", "Error: Missing argument 'RUN|SWEEP...'."),
        ("cancel", "Error: Missing argument 'RUN|SWEEP...'."),
        ("logs x --rank -1", "Invalid value for '--rank': -1 is not in the range x>=0."),
        ("collect --format xls", "Invalid value for '--format': 'xls' is not one of 'table', 'csv', 'json', 'md',"),
        ("evaluate resnet18 --data x --save-predictions .", "--save-predictions: . is a folder. Name a file."),
        ("evaluate resnet18 --data x --save-predictions no/p.csv", "no/p.csv lies in no folder that is there."),
        ("sumbit", "Error: No such command 'sumbit'."),
    ],
)  # fmt: skip
def test_a_mistake_is_explained_on_stderr(rsb, command, message):
    rsb.env["CUDA_VISIBLE_DEVICES"] = "5"
    done = rsb.run(*command.split(), code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(rsb.cwd.iterdir()) == []


def test_an_empty_name_cancels_nothing(rsb):
    assert "a run's name is empty" in rsb.error("cancel", "")
    assert "a run's name is empty" in rsb.error("preempt", "")


def test_missing_data_names_what_was_looked_for(rsb):
    where = f"{rsb.cwd}/data/imagenet-1k/train/index.npz"
    said = rsb.error("submit", "--recipe", "a3", "--job", "local", code=1)
    assert f"no shards of 'imagenet-1k' were found. Looked for\n  {where}\nSay where they are with --data" in said
    said = rsb.error("submit", "--recipe", "a3", "--job", "local", "--data", "here", code=1)
    assert f"Looked for\n  {rsb.cwd}/here/train/index.npz\n  {rsb.cwd}/here/imagenet-1k/train/index.npz\n" in said
    assert list(rsb.cwd.iterdir()) == []


def test_another_number_of_samples_is_refused_with_the_right_one(rsb, digits):
    said = rsb.error("submit", "--recipe", "digits", "--data", str(digits), "--set", "data.train_samples=1400")
    assert f"{digits}/train holds 1438 samples, the recipe says data.train_samples = 1400." in said
    assert said.endswith("If this is the right data, add --set data.train_samples=1438.\n")
    said = rsb.error("submit", "--recipe", "digits", "--data", str(digits), "--set", "data.num_classes=9")
    assert "has a sample of class 9, the recipe says data.num_classes = 9. Use --set data.num_classes=10." in said


def test_a_set_without_its_validation_part_is_named(rsb, digits):
    shutil.copytree(digits / "train", rsb.cwd / "half" / "train")
    said = rsb.error("submit", "--recipe", "fashion-mnist", "--job", "local", "--data", "half", code=1)
    assert f"there is no {rsb.cwd}/half/val/index.npz" in said


def test_a_model_that_timm_does_not_know_is_refused_with_the_nearest(rsb):
    said = rsb.error("submit", "--recipe", "a1", "--job", "slurm", "--model", "resnet5", "--dry-run")
    assert re.search(r"model.name = 'resnet5': timm has no such model. Did you mean 'resnet\w*'\?\n$", said)


def test_a_model_that_takes_one_size_only_is_refused_with_what_to_do(rsb):
    said = rsb.error("submit", "--recipe", "a3", "--job", "slurm", "--model", "deit_small_patch16_224", "--dry-run")
    assert "model.name = 'deit_small_patch16_224' does not take images of 160 px" in said
    assert "add --set model.kwargs.dynamic_img_size=true" in said


def test_a_folder_of_runs_that_cannot_be_written_is_refused(rsb, digits):
    (rsb.cwd / "file").write_text("precious")
    said = rsb.error("submit", "--recipe", "digits", "--job", "local", "--data", str(digits), "--runs", "file", code=1)
    assert f"cannot use {rsb.cwd}/file/probe-" in said and said.endswith("Choose another folder.\n")
    assert [path.name for path in rsb.cwd.iterdir()] == ["file"]


def test_a_machine_without_slurm_is_told_so(rsb, digits):
    rsb.env["PATH"] = "/nonexistent"
    said = rsb.error("submit", "--recipe", "digits", "--job", "slurm-cpu", "--data", str(digits), code=1)
    assert "there is no 'sbatch' on this machine. Submit from a login node of the cluster, or use --job local." in said
    assert list(rsb.cwd.iterdir()) == []


# --- names that may stand for more than was meant -------------------------------------------------------------------

SEEDS = [f"a1-x-s{seed}-0000000{seed}" for seed in range(3)]


def make_runs(folder: Path, *run_ids: str) -> None:
    """Make runs that nobody works on."""
    for run_id in run_ids:
        spec = Spec(run_id=run_id, seed=0, virtual_ranks=4, data="", train_digest="", val_digest="")
        Run.at(folder, run_id).create(load_recipe("digits").recipe, spec)


def refused(tmp_path: Path, *args: str, code: int = 2) -> str:
    done = CliRunner().invoke(main, [*args, "--runs", str(tmp_path)])
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize("command", ["cancel", "preempt", "retry"])
def test_a_beginning_of_several_runs_is_not_acted_upon_unasked(tmp_path, command):
    make_runs(tmp_path, *SEEDS)
    assert refused(tmp_path, command, SEEDS[0], "a1-x") == (
        "Error: 'a1-x' stands for 3 runs:\n  a1-x-s0-00000000\n  a1-x-s1-00000001\n  a1-x-s2-00000002\n"
        "Name one; or say that all are meant, with --yes or a glob.\n"
    )


@pytest.mark.parametrize("names", [["a1-x", "--yes"], ["a1-x-*"], ["a1-x-s0", "a1-x-s1", "a1-x-s2"]])
def test_several_runs_are_acted_upon_where_that_was_said(tmp_path, names):
    make_runs(tmp_path, *SEEDS)
    assert "all 3 runs are neither queued nor running" in refused(tmp_path, "cancel", *names, code=1)


def test_of_very_many_runs_some_are_shown(tmp_path):
    make_runs(tmp_path, *(f"a1-s{seed}" for seed in range(22)))
    said = refused(tmp_path, "retry", "a1")
    assert "'a1' stands for 22 runs:" in said and said.count("  a1-s") == 20 and "\n  … and 2 more\n" in said


def test_on_a_terminal_it_is_asked(rsb):
    make_runs(rsb.cwd / "runs", *SEEDS)
    for answer, expected in ((b"n\n", "Aborted!"), (b"y\n", "all 3 runs are neither queued nor running")):
        terminal, stdin = pty.openpty()
        command = [sys.executable, "-m", "rsb_cluster", "cancel", "a1-x"]
        with subprocess.Popen(command, cwd=rsb.cwd, env=rsb.env, stdin=stdin, stderr=subprocess.PIPE) as process:
            os.write(terminal, answer)
            said = process.communicate(timeout=GUARD_S)[1].decode()
        assert process.returncode == 1
        assert "'a1-x' stands for 3 runs:\n  a1-x-s0-00000000\n" in said and "All of them? [y/N]: " in said
        assert expected in said
        os.close(terminal)
        os.close(stdin)


# --- what it says when all is well ----------------------------------------------------------------------------------


def test_the_dry_run_of_a1_on_four_nodes_says_what_it_will_be(rsb):
    done = rsb.run("submit", "--recipe", "a1", "--nodes", "4", "--dry-run", "--images-per-s", "1000")
    lines = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in done.stdout.split("\n\n")[0].splitlines()}
    assert lines["resources"] == "4 nodes × 8 GPUs = 32 ranks, back end slurm"
    assert lines["steps"] == "375,000 (600 epochs of 625)"
    assert lines["global batch"] == "2048 = 32 virtual ranks × 64 images"
    assert lines["images"] == "768,000,000"
    assert lines["model"] == "resnet50, 25.6 M parameters"
    assert lines["data"] == f"{rsb.cwd}/data/imagenet-1k (NOT FOUND)"
    assert lines["runs"] == f"{rsb.cwd}/runs/a1-resnet50-s0-unknown (new)"
    assert lines["cost"].startswith("213.3 GPU-hours at 1000 images/s and GPU, 6.7 h on 32 of them")
    assert (
        f"note: no shards of 'imagenet-1k' were found. Looked for\n  {rsb.cwd}/data/imagenet-1k/train/" in done.stdout
    )
    assert "optimizer.lr = 0.005" in done.stdout
    assert "\n#SBATCH --nodes=4\n" in done.stdout and "\n#SBATCH --gpus-per-node=8\n" in done.stdout
    assert "modified" not in lines
    recipe, job = done.stderr.splitlines()
    assert recipe.startswith("recipe /") and recipe.endswith("/a1.toml")
    assert job.startswith("job /") and job.endswith("/slurm.toml")
    assert list(rsb.cwd.iterdir()) == [], "a dry run writes nothing"


def test_the_dry_run_as_json_says_the_same(rsb):
    found = rsb.json("submit", "--recipe", "a1", "--nodes", "4", "--dry-run", "--json", "--seeds", "3",
                     "--set", "optimizer.lr=4e-3", "--set", "job.slurm.partition=gpu", "--data", "s3/x")  # fmt: skip
    assert [found[key] for key in ("nodes", "world_size", "global_batch", "virtual_ranks")] == [4, 32, 2048, 32]
    assert [found[key] for key in ("epochs", "steps_per_epoch", "steps", "images")] == [600, 625, 375_000, 768_000_000]
    assert found["data"] == f"{rsb.cwd}/s3/x" and found["data_found"] is False
    assert found["modified"] == {"optimizer.lr": [5e-3, 4e-3]}
    assert found["recipe"]["optimizer"]["lr"] == 4e-3
    assert [run["seed"] for run in found["runs"]] == [0, 1, 2]
    assert "#SBATCH --array=0-2%3\n" in found["script"] and "#SBATCH --partition=gpu\n" in found["script"]
    assert found["gpu_hours"] is None
    assert list(rsb.cwd.iterdir()) == []


def test_data_that_is_there_is_found_and_names_the_run(rsb, digits):
    found = rsb.json("submit", "--recipe", "digits", "--job", "local", "--data", str(digits), "--dry-run", "--json")
    assert found["data_found"] is True and found["notes"] == []
    assert re.fullmatch("digits-resnet10t-s0-[0-9a-f]{8}", found["runs"][0]["run_id"])
    assert found["script"] is None
    assert found["steps"] == 25 * 22


def test_an_empty_folder_has_no_runs(rsb):
    done = rsb.run("status")
    assert (done.stdout, done.stderr) == ("", "there are no runs yet\n")
    assert rsb.json("status", "--json") == []


def test_lists_and_tables_are_data(rsb):
    for kind, names in (
        ("recipes", {"a1", "a2", "a3", "deit", "digits", "fashion-mnist"}),
        ("jobs", {"local", "slurm"}),
    ):
        done = rsb.run(kind, "list")
        assert names <= {line.split()[0] for line in done.stdout.splitlines()}
        assert done.stderr == ""
    done = rsb.run("jobs", "show", "slurm")
    assert done.stdout.startswith("# GPU nodes") and done.stderr.endswith("/slurm.toml\n")
    assert rsb.json("jobs", "show", "slurm", "--json")["gpus_per_node"] == 8
    assert rsb.json("recipes", "show", "a1", "--json")["optimizer"]["lr"] == 5e-3


@pytest.mark.parametrize(("kind", "name"), [("recipes", "a1"), ("jobs", "slurm")])
def test_copy_refuses_to_overwrite(rsb, kind, name):
    done = rsb.run(kind, "copy", name, "mine.toml")
    assert done.stdout == "" and done.stderr.endswith(f"{name}.toml to mine.toml\n")
    before = (rsb.cwd / "mine.toml").read_bytes()
    assert rsb.error(kind, "copy", "digits" if kind == "recipes" else "local", "mine.toml") == (
        "Error: mine.toml exists already. Give another name.\n"
    )
    assert (rsb.cwd / "mine.toml").read_bytes() == before


def test_a_report_is_not_written_over_somebody_elses(rsb):
    """Other tools write a report.html, too; one that the user names is replaced, as in every tool, but no folder."""
    theirs = rsb.cwd / "report.html"
    theirs.write_text("<html>tests passed</html>")
    assert "report.html was not made by this command. Name another file with -o." in rsb.error("report")
    assert theirs.read_text() == "<html>tests passed</html>"
    rsb("report", "-o", "report.html")
    rsb("report")
    assert "rsb-cluster report" in theirs.read_text()
    for command in ("report", "collect"):
        assert f"cannot write {rsb.cwd}: Is a directory" in rsb.error(command, "-o", str(rsb.cwd))


def test_a_message_with_brackets_does_not_break_the_table(rsb, tmp_path):
    """gloo's errors hold paths in square brackets, which rich takes for markup."""
    recipe = load_recipe("digits").recipe
    run = Run.at(tmp_path / "runs", "digits-x-s0-00000000")
    run.create(recipe, Spec(run_id=run.run_id, seed=0, virtual_ranks=4, data="", train_digest="", val_digest=""))
    message = "another rank is gone: [/gloo/pair.cc:545] Read error"
    run.write_attempt(
        Attempt(
            number=1, job_id="1", world_size=2, hosts=(), started=0, start_step=0, cause="lost peer", message=message
        )
    )
    assert message in rsb("status")


def _all_commands(group=main, path=()):
    for name, command in group.commands.items():
        yield (*path, name)
        yield from _all_commands(command, (*path, name)) if hasattr(command, "commands") else ()


@pytest.mark.parametrize("command", [(), *_all_commands()], ids=" ".join)
def test_help_shows_examples_line_by_line(command):
    shown = CliRunner().invoke(main, [*command, "--help"])
    assert shown.exit_code == 0
    assert "\\b" not in shown.output and "\b" not in shown.output
    # An example that was wrapped would have a second command in its line.
    assert not [line for line in shown.output.splitlines() if line.count("rsb-cluster ") > 1]
