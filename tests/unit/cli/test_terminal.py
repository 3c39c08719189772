"""What the commands share: that nothing which takes long is silent."""

import logging

from click.testing import CliRunner

from rsb_cluster.cli import main, terminal
from rsb_cluster.errors import plural


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "PROGRESS_EVERY_S", 0.0)
    with terminal.progress_bar("making shards") as progress:
        progress(1000, 3000)
        progress(5, 0)
    assert capsys.readouterr() == ("", "making shards: 1,000 of 3,000\nmaking shards: 5\n")


def test_a_quick_command_shows_no_progress(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "PROGRESS_EVERY_S", 1e9)
    with terminal.progress_bar("making shards") as progress:
        progress(1000, 3000)
    assert capsys.readouterr() == ("", "")


def test_what_is_being_done_is_said_once_on_standard_error(capsys):
    for _ in range(2):
        assert CliRunner().invoke(main, ["recipes", "list"]).exit_code == 0
    logging.getLogger("rsb_cluster.submission.model_check").info("checking %s ...", "resnet50")
    assert capsys.readouterr() == ("", "checking resnet50 ...\n")


def test_one_is_not_many():
    assert [plural(n, "run") for n in (0, 1, 2, 1000)] == ["0 runs", "1 run", "2 runs", "1,000 runs"]
    assert [plural(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]
