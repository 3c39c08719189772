"""A folder of runs that two users share: who may read and write what, and what a command says of another's runs."""

import json
import os
import stat
from pathlib import Path

import pytest

from rsb_cluster.errors import ConfigError
from rsb_cluster.node.processes import Process
from rsb_cluster.runs import sharing
from rsb_cluster.runs.run import Run, Submission
from tests.unit.bundled import load_job
from tests.unit.runs.made import IDS, add_sweep
from tests.users import GROUP

PRIVATE, SHARED, OWN = IDS


def modes(folder: Path) -> dict[str, str]:
    """The permissions of all that is below a folder, and of itself."""
    found = {str(path.relative_to(folder)): path.stat() for path in (folder, *folder.rglob("*"))}
    return {name: f"{stat.S_IMODE(status.st_mode):o}" for name, status in found.items()}


# --- who may read ---------------------------------------------------------------------------------------------------


def test_a_shared_run_is_read_by_the_group_whatever_the_umask(ann, bob):
    """The folder says it to all that is written into it later, by any process: with umask 077 as with 002."""
    for user, run_id in ((ann, PRIVATE), (bob, SHARED)):
        run = user.makes(run_id, mode=sharing.GROUP, **{"checkpoints__step-00000001-a0001__manifest.json": "{}"})
        found = modes(Path(run.url))
        assert {name: mode for name, mode in found.items() if "." in name and name != "."} == dict.fromkeys(
            ("recipe.json", "spec.json", "checkpoints/step-00000001-a0001/manifest.json"), "640"
        )
        assert {found[name] for name in (".", "checkpoints", "checkpoints/step-00000001-a0001")} == {"2750"}
        assert {path.stat().st_gid for path in Path(run.url).rglob("*")} == {GROUP}
    assert json.loads(bob.does(f"print(open('{ann.office}/runs/{PRIVATE}/spec.json').read())"))["run_id"] == PRIVATE


def test_a_run_is_private_unless_it_is_shared(ann, bob):
    run = ann.makes(PRIVATE, mode=sharing.PRIVATE)
    assert modes(Path(run.url))["."] == "700"
    assert bob.python("-c", f"open('{run.url}/spec.json')").stderr.endswith(f"'{run.url}/spec.json'\n")


def test_a_run_that_is_there_is_shared_by_its_owner_alone(ann, bob):
    run = ann.makes(PRIVATE, mode=sharing.PRIVATE, logs__x="a log")
    code = (
        "from rsb_cluster.runs.run import Run; from rsb_cluster.runs.sharing import share_run; "
        f"share_run(Run.at('{bob.office}/runs', '{PRIVATE}'))"
    )
    bob.does(code)
    assert modes(Path(run.url))["."] == "700"
    ann.does(code)
    assert set(modes(Path(run.url)).values()) == {"2750", "640"}
    assert {path.stat().st_gid for path in Path(run.url).rglob("*")} == {GROUP}


def test_scripts_and_pickles_are_written_by_their_owner_alone(ann, bob):
    for user, share in ((ann, "group"), (bob, "private")):
        user.does(f"""
from pathlib import Path
from rsb_cluster.runs import sharing
from tests.unit.bundled import load_job
job = load_job("local", "share={share}")
with sharing.umask_of(job):
    folder = Path("{user.office}/runs/submissions/{user.name}/1")
    sharing.make_submission_folder(folder, job)
    (folder / "task.pkl").touch()
""")
    found = modes(ann.office / "runs" / "submissions")
    assert {name: found[name] for name in ("bin", "bin/1", "bin/1/task.pkl")} == {
        "bin": "2750", "bin/1": "2750", "bin/1/task.pkl": "640",
    }  # fmt: skip
    assert (found["games"], found["games/1"]) == ("700", "700")
    assert found["."] == "3770", "each adds a folder, and nobody removes another's"
    thief = f"import os; os.rename('{ann.office}/runs/submissions/bin', '{ann.office}/runs/submissions/old')"
    assert "PermissionError" in bob.python("-c", thief).stderr


def test_scripts_are_not_written_where_others_can_write(tmp_path):
    folder = tmp_path / "submissions" / "me"
    folder.mkdir(parents=True)
    folder.chmod(0o775)
    with pytest.raises(ConfigError, match=r"which nodes execute, would be written to .*, where others can write: "):
        sharing.make_submission_folder(folder / "1", load_job("local"))
    assert list(folder.iterdir()) == []


def test_what_is_published_is_readable_for_all_who_can_read_the_runs(ann, bob):
    """Whatever the umask, 077 here, also of a run that they may not read; and nobody else's file is replaced."""
    runs = ann.office / "runs"
    run = ann.makes(OWN, mode=sharing.PRIVATE)
    ann.does(f"from tests.unit.runs.made import add_sweep; add_sweep({run.runs_url!r}, 'mine', {OWN!r})")
    (sweep_id,) = (path.stem for path in (runs / "sweeps").iterdir())
    ann("collect", sweep_id, "--publish")
    published = runs / "sweeps" / sweep_id
    assert modes(published) == {".": "3770", "collect.json": "640", "report.html": "640"}
    assert {path.stat().st_gid for path in (published, *published.iterdir())} == {GROUP}
    assert bob.python("-c", f"open('{run.url}/spec.json')").returncode
    for name in ("collect.json", "report.html"):
        assert int(bob.does(f"print(len(open('{published}/{name}').read()))")) > 1
    before = (published / "collect.json").read_bytes()
    assert f"not allowed to use {published}" in bob.error("collect", sweep_id, "--publish", code=1)
    assert (published / "collect.json").read_bytes() == before


def test_nothing_is_shared_with_a_group_that_cannot_have_it(ann, bob):
    job = load_job("local", "share=group")
    runs = ann.office / "runs"
    runs.chmod(0o700)
    with pytest.raises(ConfigError, match=r"mode 700 and group 100, which cannot read it\. Use 'chmod 2750 /"):
        sharing.check_can_share(str(runs), job)
    sharing.check_can_share(str(runs), load_job("local"))
    runs.chmod(0o777)
    os.chown(runs, 0, 4)
    said = ann.python(
        "-c",
        f"""
from rsb_cluster.runs import sharing
from tests.unit.bundled import load_job
sharing.check_can_share({str(runs)!r}, load_job("local", "share=group"))
""",
    ).stderr
    assert "group 4, which is none of yours. Have it changed (chgrp), or use other --runs." in said


# --- what is said of another's runs ---------------------------------------------------------------------------------


def test_a_run_that_cannot_be_read_is_a_line_and_hides_no_other(ann, bob):
    ann.makes(PRIVATE, mode=sharing.PRIVATE)
    ann.makes(SHARED, mode=sharing.GROUP)
    bob.makes(OWN, mode=sharing.PRIVATE)
    evaluations = ann.office / "runs" / "evaluations" / PRIVATE
    evaluations.mkdir(parents=True)
    evaluations.chmod(0o700)
    found = {status["run_id"]: (status["state"], status["cause"]) for status in bob.json("status", "--json")}
    assert found == {
        PRIVATE: ("unreadable", "it belongs to bin, who does not share it (--share group)"),
        SHARED: ("never started", ""),
        OWN: ("never started", ""),
    }
    collected = bob.json("collect", "--format", "json")
    states = {run["run_id"]: run["state"] for run in collected["unfinished"]}
    assert states == {PRIVATE: "unreadable", SHARED: "not sent", OWN: "not sent"}
    bob("report")
    assert PRIVATE in (bob.cwd / "report.html").read_text()


def test_a_command_on_such_a_run_says_whose_it_is(ann, bob):
    ann.makes(PRIVATE, mode=sharing.PRIVATE)
    for command in ("logs", "cancel"):
        said = bob.error(command, PRIVATE, code=1)
        assert f"not allowed to use {ann.office}/runs/{PRIVATE}/submissions" in said
        assert "belongs to bin (drwx------)" in said
    ann.makes(SHARED, mode=sharing.GROUP)
    said = bob.error("retry", PRIVATE, SHARED, code=1)
    assert f"{PRIVATE}: it belongs to bin, who does not share it" in said
    assert f"{SHARED}: it belongs to bin, who must do it." in said


def test_the_job_of_a_shared_run_may_be_private(ann, bob):
    """As of one that was shared after it was submitted: its state is told, its log and a signal to it are refused."""
    folder = ann.office / "runs" / "submissions" / "bin" / "1"
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    job = Submission(backend="local", job_id=str(Process.of(os.getpid())), folder=str(folder), shape="", time=1)
    ann.makes(SHARED, mode=sharing.GROUP, submissions__1=job.model_dump_json()).store.move(
        "submissions/1", "submissions/1.json"
    )
    assert [status["state"] for status in bob.json("status", "--json")] == ["starting"]
    assert f"not allowed to use {folder}" in bob.error("logs", SHARED, code=1)
    assert f"job {job.job_id} is another user's, who must do it." in bob.error("preempt", SHARED, code=1)


def test_a_sweep_that_cannot_be_read_hides_no_run(ann, bob):
    add_sweep(ann.office / "runs", "theirs", PRIVATE)
    (ann.office / "runs" / "sweeps").chmod(0o700)
    bob.makes(OWN, mode=sharing.PRIVATE)
    assert [status["run_id"] for status in bob.json("status", "--json", "a2")] == [OWN]
    assert bob.json("collect", "--format", "json")["unfinished"]


def test_the_owner_of_ones_own_run_is_nobody_else(tmp_path):
    assert sharing.other_owner(Run.at(tmp_path, "x")) == ""
    (tmp_path / "x").mkdir()
    assert sharing.other_owner(Run.at(tmp_path, "x")) == ""
    assert sharing.other_owner(Run.at("s3://b/runs", "x")) == ""
