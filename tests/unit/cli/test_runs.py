"""Names that match more runs than intended, and a folder without runs."""

import json
import math
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from rsb_cluster.cli import main
from rsb_cluster.node.exit_codes import RUNNING
from rsb_cluster.node.processes import Process
from rsb_cluster.runs.run import Attempt, Submission
from tests.servers.daemons import GUARD_S
from tests.unit.new_runs import make_run


def test_ctrl_c_stops_logs_that_follow_without_a_traceback(rsb):
    run = make_run(rsb.cwd / "runs")
    job, folder = str(Process.of(os.getpid())), rsb.cwd / "job"  # this process is the job, and does not end
    folder.mkdir()
    (folder / RUNNING).touch()
    run.add_submission(Submission(backend="local", job_id=job, folder=str(folder), shape="", time=1.0))
    command = [sys.executable, "-m", "rsb_cluster", "logs", "-f", run.run_id]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with (folder / f"{job}_0_log.out").open("w", buffering=1) as log:
        print("first line", file=log)
        with subprocess.Popen(command, cwd=rsb.cwd, env=rsb.env, text=True, **pipes) as process:
            assert process.stdout.readline() == "first line\n"
            print("second line", file=log)
            assert process.stdout.readline() == "second line\n", "it follows"
            process.send_signal(signal.SIGINT)
            rest = process.communicate(timeout=GUARD_S)
    assert (process.returncode, *rest) == (130, "", "")


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
    """It is named, as mostly it is not the one that was meant."""
    done = rsb.run("status")
    said = f"There are no runs in {rsb.cwd}/runs. Another folder is named by --runs or RSB_RUNS.\n"
    assert (done.stdout, done.stderr) == ("", said)
    assert rsb.run("collect").stderr == said
    assert rsb.json("status", "--json") == []


def test_runs_are_filtered_and_sorted_and_piped_as_tab_separated_values(tmp_path):
    make_runs(tmp_path, "digits-x-s1-00000001", "digits-x-s0-00000000")

    def ids(*args: str) -> list[str]:
        done = CliRunner().invoke(main, ["status", "--runs", str(tmp_path), *args])
        assert done.exit_code == 0, done.output
        return [line.partition("\t")[0] for line in done.stdout.splitlines()]

    both = ["digits-x-s0-00000000", "digits-x-s1-00000001"]
    assert ids() == ["run_id", *both]
    assert ids("--state", "never started,failed", "--recipe", "dig*", "--model", "resnet10t") == ["run_id", *both]
    assert ids("--state", "failed") == [] and ids("--since", "2d") == [] and ids("--recipe", "a1") == []
    assert ids("--state", "failed", "--json") == ["[]"]
    assert "is neither an age such as 90m, 2h or 3d nor a date" in refused(tmp_path, "status", "--since", "soon")
    assert "Did you mean 'failed'?" in refused(tmp_path, "status", "--state", "faild")


def test_a_loss_that_is_no_number_is_null_in_json(tmp_path):
    """JSON has no NaN, and parsers of other languages refuse it."""
    run = make_run(tmp_path)
    run.write_attempt(Attempt(number=1, job_id="1", world_size=1, hosts=("h",), started=1, start_step=0))
    rows = [{"kind": "train", "step": 5, "epoch": 1.0, "loss": math.nan}, {"kind": "eval", "step": 5, "loss": math.nan}]
    run.store.write_bytes("metrics/0001-000000.jsonl", "\n".join(map(json.dumps, rows)).encode())
    for command in (["status"], ["runs", "show", run.run_id]):
        done = CliRunner().invoke(main, [*command, "--json", "--runs", str(tmp_path)])
        assert done.exit_code == 0 and '"loss": null' in done.output and "NaN" not in done.output, done.output


def test_a_page_on_a_run_cuts_no_number_however_narrow_the_terminal(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    for number in (1, 2):
        run.write_attempt(
            Attempt(number=number, job_id="4711", world_size=4, hosts=("node-17",), started=1e9, start_step=123_456)
        )
    row = {"kind": "eval", "step": 300_000, "epoch": 480.0, "top1": 75.75, "loss": 1.2345}
    run.store.write_bytes("metrics/0001-000000.jsonl", json.dumps(row).encode())
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setattr(
        "rsb_cluster.cli.run_folders.console", lambda **_: Console(force_terminal=True, color_system=None)
    )
    said = CliRunner().invoke(main, ["runs", "show", run.run_id, "--runs", str(tmp_path)]).output
    assert "123,456-123,456" in said and "09-09 01:46" in said
    first, second = [line for line in said.splitlines() if "123,456" in line]
    assert first.split()[-1] == "killed" and "runs," in said.partition(second)[2], "only the last may run"
