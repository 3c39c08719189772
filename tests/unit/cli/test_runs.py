"""Names that match more runs than intended, and a folder without runs."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from rsb_cluster.cli import main
from tests.servers.daemons import GUARD_S
from tests.unit.new_runs import make_run


def test_an_empty_name_cancels_nothing(rsb):
    assert "a run's name is empty" in rsb.error("cancel", "")
    assert "a run's name is empty" in rsb.error("preempt", "")


SEEDS = [f"a1-x-s{seed}-0000000{seed}" for seed in range(3)]


def make_runs(folder: Path, *run_ids: str) -> None:
    """Make runs without jobs."""
    for run_id in run_ids:
        make_run(folder, run_id=run_id)


def refused(tmp_path: Path, *args: str, code: int = 2) -> str:
    done = CliRunner().invoke(main, [*args, "--runs", str(tmp_path)])
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize("command", ["cancel", "preempt", "retry"])
def test_a_prefix_of_several_runs_needs_confirmation(tmp_path, command):
    make_runs(tmp_path, *SEEDS)
    assert refused(tmp_path, command, SEEDS[0], "a1-x") == (
        "Error: 'a1-x' matches 3 runs:\n  a1-x-s0-00000000\n  a1-x-s1-00000001\n  a1-x-s2-00000002\n"
        "Name one run, or select all of them with --yes or a glob.\n"
    )


@pytest.mark.parametrize("names", [["a1-x", "--yes"], ["a1-x-*"], ["a1-x-s0", "a1-x-s1", "a1-x-s2"]])
def test_yes_a_glob_or_a_sweep_confirms_several_runs(tmp_path, names):
    make_runs(tmp_path, *SEEDS)
    assert "all 3 runs are neither queued nor running" in refused(tmp_path, "cancel", *names, code=1)


def test_of_many_runs_only_the_first_are_listed(tmp_path):
    make_runs(tmp_path, *(f"a1-s{seed}" for seed in range(22)))
    said = refused(tmp_path, "retry", "a1")
    assert "'a1' matches 22 runs:" in said and said.count("  a1-s") == 20 and "\n  … and 2 more\n" in said


def test_on_a_terminal_the_user_is_asked_to_confirm(rsb):
    make_runs(rsb.cwd / "runs", *SEEDS)
    for answer, expected in ((b"n\n", "Aborted!"), (b"y\n", "all 3 runs are neither queued nor running")):
        terminal, stdin = pty.openpty()
        command = [sys.executable, "-m", "rsb_cluster", "cancel", "a1-x"]
        with subprocess.Popen(command, cwd=rsb.cwd, env=rsb.env, stdin=stdin, stderr=subprocess.PIPE) as process:
            os.write(terminal, answer)
            said = process.communicate(timeout=GUARD_S)[1].decode()
        assert process.returncode == 1
        assert "'a1-x' matches 3 runs:\n  a1-x-s0-00000000\n" in said and "All of them? [y/N]: " in said
        assert expected in said
        os.close(terminal)
        os.close(stdin)


def test_an_empty_folder_has_no_runs(rsb):
    done = rsb.run("status")
    assert (done.stdout, done.stderr) == ("", "there are no runs yet\n")
    assert rsb.json("status", "--json") == []
