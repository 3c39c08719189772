"""The command line as a whole: its help, what it says of mistakes, and terminals and pipes of all kinds."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from rsb_cluster.cli import main
from tests.servers.daemons import GUARD_S
from tests.unit.new_runs import make_run


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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("recipes show a9", "Error: there is no recipe 'a9'. Known: a1, a1h, a2, a2-reg, a3, deit, digits,"),
        ("recipes show ./a1.toml", "Error: there is no file a1.toml."),
        ("recipes diff a1 diet", "Error: there is no recipe 'diet'. Did you mean 'deit'?"),
        ("recipes show a1 --set optimizer.lr=-1", "with --set: optimizer.lr = -1: must be a number > 0."),
        ("jobs show slrum", "Error: there is no job 'slrum'. Did you mean 'slurm'? Known: cloud, "),
        ("submit", "Error: Missing option '--recipe'."),
        ("submit \N{EM DASH}recipe a1", "'\N{EM DASH}recipe' begins with a typographic dash. Type it again"),
        ("status \N{EN DASH}watch", "begins with a typographic dash. Type it again: options begin with '--'."),
        ("submit --recipe a9", "Error: there is no recipe 'a9'."),
        ("submit --recipe a1 --dry-run --job nowhere", "Error: there is no job 'nowhere'. Known: cloud,"),
        ("submit --recipe a1 --seed 1 --seeds 2", "--seed is one seed, --seeds are several: use one of them."),
        ("submit --recipe a1 --seed -1", "Invalid value for '--seed': -1 is not in the range x>=0."),
        ("submit --recipe a1 --seeds 0", "'--seeds': 0 is no number of seeds between 1 and 10,000; one seed is --seed"),
        ("submit --recipe a1 --seeds 4-1", "'4-1' is neither a number of seeds, nor a list such as 1,5,7 or 0-4"),
        ("sweep seeds --seeds 1,x", "'1,x' is neither a number of seeds, nor a list such as 1,5,7 or 0-4"),
        ("submit --recipe a1 --gpus 4", "Did you mean '--gpus-per-node'?"),
        ("submit --recipe a1 --lr 4", "Did you mean '--set optimizer.lr=LR'?"),
        ("submit --recipe a1 --time-limit 4", "Did you mean '--time'?"),
        ("submit --recipe a1 --dry-run --set job.time=4", "slurm.toml: unknown key 'time'. Did you mean 'time_min'?"),
        ("submit --recipe a1 --dry-run --set job.partition=x", "key 'partition'. Did you mean 'slurm.partition'?"),
        ("submit --recipe a1 --nodes four", "'four' is neither a number of nodes nor a range such as 2-4"),
        ("submit --recipe a1 --images-per-s 0", "Invalid value for '--images-per-s': 0.0 is not in the range x>0."),
        ("submit --recipe a1 --nods 4", "Error: No such option"),
        ("submit --recipe a1 --dry-run --set data.trian_samples=1",
         "unknown key 'data.trian_samples'. Did you mean 'data.train_samples'?"),
        ("submit --recipe a1 --dry-run --set job.node=1", "slurm.toml: unknown key 'node'. Did you mean 'nodes'?"),
        ("submit --recipe a1 --dry-run --set lr", "'lr' is not of the form key=value, for example optimizer.lr=4e-3."),
        ("submit --recipe a1 --dry-run --job slurm --nodes 3",
         "24 ranks (slurm.toml: 3 nodes × 8 GPUs) cannot equally share 4 virtual ranks of 512 images. "
         "Use a job with 16 or 32 ranks in all"),
        ("submit --recipe a1 --dry-run --job local --nodes 2", "nodes = 2: the local back end is only this machine."),
        ("submit --recipe a1 --dry-run --job slurm --set job.slurm.nodes=2", "slurm.nodes cannot be set. Set the"),
        ("submit --recipe a1 --dry-run --job local --gpus-per-node 2 --set job.tasks_per_node=0",
         "gpus_per_node = 2, but with CUDA_VISIBLE_DEVICES='5' this shell may use 1. Use --gpus-per-node 1, or"),
        ("status zzz", "runs. Another folder is named by --runs or RSB_RUNS. So none matches 'zzz'."),
        ("sweep", "Error: name a sweep file ('rsb-cluster sweeps list'), or use --recipe."),
        ("sweep resnet-depth", "Error: there is no sweep 'resnet-depth'. Did you mean 'resnet-depths'? Known: deit,"),
        ("sweep seeds --recipe a1", "'seeds' is a sweep file, which sets recipes, models and values itself."),
        ("sweep --recipe a1,a9 --dry-run", "Error: there is no recipe 'a9'."),
        ("sweep --recipe a1 --name A --dry-run", "the command line: name = 'A': string should match pattern"),
        ("sweep --recipe a1 --vary optimizer.lr --dry-run", "--vary 'optimizer.lr' is not of the form key=value,value"),
        ("sweep --recipe a1 --vary optimizer.rl=1 --dry-run", "unknown key 'optimizer.rl'. Did you mean"),
        ("sweep seeds --dry-run --images-per-s fast", "--images-per-s fast is neither images/s, such as 1200, nor"),
        ("sweep resnet-depths --dry-run --job local", "nodes = 2: the local back end is only this machine."),
        ("retry", "Error: Missing argument 'RUN|SWEEP...'."),
        ("cancel", "Error: Missing argument 'RUN|SWEEP...'."),
        ("logs x --rank -1", "Invalid value for '--rank': -1 is not in the range x>=0."),
        ("collect --format xls", "Invalid value for '--format': 'xls' is not one of 'table', 'csv', 'json', 'md',"),
        ("evaluate resnet18 --data x --save-predictions .", "--save-predictions: . is a folder. Name a file."),
        ("evaluate resnet18 --data x --save-predictions no/p.csv", "no/p.csv is in a folder that does not exist."),
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


@pytest.mark.parametrize("command", [(), *(path for path, _ in commands())], ids=" ".join)
def test_help_shows_examples_line_by_line(command):
    shown = CliRunner().invoke(main, [*command, "--help"])
    assert shown.exit_code == 0
    assert "\\b" not in shown.output and "\b" not in shown.output
    # An example that was wrapped would have a second command in its line.
    assert not [line for line in shown.output.splitlines() if line.count("rsb-cluster ") > 1]


@pytest.mark.parametrize(
    ("command", "encoding"), [("collect", "latin-1"), ("collect --format md", "latin-1"), ("status", "ascii:strict")]
)
def test_characters_that_a_terminal_does_not_have_are_replaced(rsb, command, encoding):
    make_run(rsb.cwd / "runs")
    rsb.env["PYTHONIOENCODING"] = encoding
    with subprocess.Popen(
        [sys.executable, "-m", "rsb_cluster", *command.split()], cwd=rsb.cwd, env=rsb.env, stdout=subprocess.PIPE
    ) as process:
        shown = process.communicate(timeout=GUARD_S)[0].decode(encoding.partition(":")[0])
    # 'status' has no such characters where its output is no terminal; 'decode' above would raise.
    assert process.returncode == 0 and "digits-s0" in shown and ("?" in shown) == (command != "status")


@pytest.mark.parametrize(
    ("command", "output", "code", "said"),
    [
        ("--help", ">/dev/full", 1, "Error: cannot write the output: No space left on device.\n"),
        ("status", ">/dev/full", 1, "Error: cannot write the output: No space left on device.\n"),
        ("status --json", ">/dev/full", 1, "Error: cannot write the output: No space left on device.\n"),
        ("collect", ">&-", 0, ""),
        ("status", "> >(exec >&-)", 1, ""),
    ],
    ids=["full-help", "full-table", "full-json", "closed", "broken-pipe"],
)
def test_an_output_that_takes_nothing_is_no_bug(rsb, command, output, code, said):
    make_run(rsb.cwd / "runs")
    # The reader of the pipe has ended before anything is written.
    script = f"exec 3{output} || exit 9; sleep 0.2; exec {sys.executable} -m rsb_cluster {command} >&3"
    if output == ">&-":
        script = f"exec {sys.executable} -m rsb_cluster {command} >&-"
    done = subprocess.run(
        ["bash", "-c", script], cwd=rsb.cwd, env=rsb.env, stderr=subprocess.PIPE, text=True, timeout=GUARD_S
    )
    assert (done.returncode, done.stderr) == (code, said)


def test_an_argument_that_is_no_text_is_refused_or_replaced(rsb):
    assert "--set 'x=\\udcff' is not UTF-8." in rsb.error("submit", "--recipe", "a1", "--dry-run", "--set", "x=\udcff")
    rsb("report", "--title", "\udcff", "-o", "report.html")
    assert "<title>?" in (rsb.cwd / "report.html").read_text()


@pytest.mark.parametrize("kind", ["recipes", "jobs", "sweeps"])
def test_a_toml_file_may_begin_with_a_byte_order_mark_and_other_encodings_are_told(rsb, kind):
    bundled = {"recipes": "a1", "jobs": "slurm", "sweeps": "seeds"}[kind]
    rsb(kind, "copy", bundled, "mine.toml")
    path = rsb.cwd / "mine.toml"
    content = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert rsb(kind, "show", "./mine.toml").startswith(rsb(kind, "show", bundled)[:200])
    lines = content.count(b"\n")
    for other, said in (
        (content.decode().encode("utf-16"), "mine.toml is in UTF-16 or no text. Save it as UTF-8."),
        (content + b"# Z\xfcrich\n", f"mine.toml: line {lines + 1} is not UTF-8 (byte 0xfc); perhaps the file is in"),
    ):
        path.write_bytes(other)
        assert said in rsb.error(kind, "show", "./mine.toml")
