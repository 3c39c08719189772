"""The user's command at the end of a run: what it is told, that it runs once, and that it can do no harm."""

import json
import logging
import os
import re
import shutil
import tomllib

import pytest

from rsb_cluster.node import notify as module
from rsb_cluster.node.notify import notify
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.runs.run import Attempt
from tests.command import ROOT
from tests.unit.new_runs import make_run


def ranks(rank: int = 0, job_id: str = "7") -> Ranks:
    return Ranks(rank, rank, 4, job_id, 0, 4)


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path / "runs")
    run.write_attempt(
        Attempt(number=1, job_id="7", world_size=4, hosts=("h",), started=1, start_step=0, ended=5, end_step=3,
                cause="failed", message="a shard was replaced")
    )  # fmt: skip
    return run


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="rsb_cluster")
    return caplog


def test_the_command_gets_the_end_and_the_row_of_the_table_once_a_job(run, tmp_path):
    told = tmp_path / "told"
    for rank in (2, 0, 3):
        notify(run, ranks(rank), f"cat >>'{told}'", "failed", "a shard was replaced")
    message = json.loads(told.read_text())
    assert {key: message[key] for key in ("run_id", "url", "state", "reason")} == {
        "run_id": run.run_id, "url": run.url, "state": "failed", "reason": "a shard was replaced",
    }  # fmt: skip
    row = message["row"]
    assert (row["recipe"], row["model"], row["seed"], row["state"]) == ("digits", "resnet10t", 0, "failed")
    told.unlink()
    notify(run, ranks(0, "8"), f"cat >>'{told}'", "failed", "again")
    assert json.loads(told.read_text())["reason"] == "again", "another job"
    assert len(run.attempts()) == 1


def test_a_command_that_fails_is_logged(run, said):
    notify(run, ranks(), "echo 'no such host' >&2; exit 6", "finished", "")
    assert "job.notify_command ended with exit code 6:\nno such host" in said.text


def test_a_command_that_hangs_is_ended(run, said, monkeypatch):
    monkeypatch.setattr(module, "LIMIT_S", 1.0)
    notify(run, ranks(), "sleep 600", "finished", "")
    assert "job.notify_command did not end within 1 s, and was killed" in said.text


def test_a_command_that_reads_nothing_is_no_error(run, said):
    notify(run, ranks(), "exec <&-; echo done", "finished", "")
    assert "job.notify_command was run:\ndone" in said.text


def test_a_run_whose_folder_is_gone_is_told_by_rank_0_and_not_made_again(run, tmp_path):
    shutil.rmtree(run.url)
    told = tmp_path / "told"
    for rank in (1, 0):
        notify(run, ranks(rank), f"cat >>'{told}'", "failed", "gone")
    assert json.loads(told.read_text())["row"]["state"] == "missing"
    assert not run.store.exists()


def test_the_documented_commands_send_what_they_say(run, tmp_path, monkeypatch):
    """With programs in place of mail and curl that keep what they get."""
    examples = re.findall(r"```toml\n(# mail.*?)```", (ROOT / "docs" / "runs.md").read_text(), re.DOTALL)
    commands = [tomllib.loads(text)["notify_command"] for text in re.split(r"\n(?=# )", examples[0])]
    assert len(commands) == 3
    for name in ("mail", "curl"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@" >"{tmp_path}/arguments"; cat >"{tmp_path}/got"\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".config").mkdir()
    (tmp_path / ".config" / "rsb-hook").write_text("https://chat.example.org/hook\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    got, arguments = [], []
    for number, command in enumerate(commands):
        notify(run, ranks(0, str(number)), command, "failed", "disk full")
        got.append(json.loads((tmp_path / "got").read_text()))
        arguments.append((tmp_path / "arguments").read_text())
    assert arguments[0] == "-s a run has ended ann@example.org\n"
    assert arguments[1] == arguments[2] and arguments[1].endswith("--data-binary @- https://chat.example.org/hook\n")
    assert got[0] == got[1] and got[1]["reason"] == "disk full" and got[1]["row"]["model"] == "resnet10t"
    assert got[2] == {"text": f"{run.run_id} failed"}


def test_nothing_happens_without_a_command(run):
    notify(run, ranks(), "", "finished", "")
    assert not run.store.exists("attempts/notified-7.json")
