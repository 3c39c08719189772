"""What a submit must not touch or cannot write is refused before anything is made."""

from __future__ import annotations

import shutil

import pytest

pytestmark = pytest.mark.usefixtures("here")


def test_a_folder_of_runs_that_cannot_be_written_is_refused(rsb, digits):
    (rsb.cwd / "file").write_text("precious")
    said = rsb.error("submit", "--recipe", "digits", "--job", "local", "--data", str(digits), "--runs", "file", code=1)
    assert f"cannot use {rsb.cwd}/file/probe-" in said and said.endswith("Choose another folder.\n")
    assert [path.name for path in rsb.cwd.iterdir()] == ["file"]


# --- a folder of runs that two users share ---------------------------------------------------------------------------

PLAN = """
from tests.unit.sweeps import DIGITS, file
from rsb_cluster.submission.plan import plan
from rsb_cluster.submission.request import Request
plan(file(grid=[DIGITS]), None, Request(job="local", data={data!r}, runs={runs!r}, seeds=(0,)), is_sweep=True)
"""


def test_what_is_anothers_is_refused_before_anything_is_made(ann, bob, digits):
    """A folder for scripts or for sweeps that only a colleague can write: a sentence, and no run."""
    data, runs = ann.office / "data", ann.office / "runs"
    shutil.copytree(digits, data)
    data.chmod(0o755)
    said = []
    for folder in ("submissions", "sweeps"):
        (runs / folder).mkdir(mode=0o755)
        done = bob.python("-c", PLAN.format(data=str(data), runs=str(runs)))
        said.append(done.stderr.splitlines()[-1])
        (runs / folder).rmdir()
        assert list(runs.iterdir()) == []
    assert [line.partition(": ")[0] for line in said] == ["rsb_cluster.errors.ConfigError"] * 2
    assert (
        f"scripts and logs cannot be written to {runs}/submissions/games: {runs}/submissions belongs to root" in said[0]
    )
    assert f"nothing can be added to {runs}/sweeps: {runs}/sweeps belongs to root (drwxr-sr-x)." in said[1]
    assert all(f"'chmod 3770 {runs}/" in line for line in said)


def test_a_run_that_a_colleague_owns_is_not_submitted(ann, bob, digits):
    """Of a sweep the other runs are; a single one is refused. Whether it can be read makes no difference."""
    data, runs = ann.office / "data", ann.office / "runs"
    shutil.copytree(digits, data)
    data.chmod(0o755)
    for mode in (0o700, 0o2750):
        code = f"""
from tests.unit.sweeps import make, planned
one = planned({str(runs)!r}, {str(data)!r})[0]
one.run.store.make_folder({mode})
"""
        ann.does(f"{code}\nif not one.run.exists(): make(one)")
        found = bob.does(f"""
from tests.unit.sweeps import planned_with_notes
runs, notes = planned_with_notes({str(runs)!r}, {str(data)!r})
print([run.state for run in runs], notes)
""")
        assert found.startswith("['not yours', 'new', 'new', 'new'] ['digits-resnet10t-s0-")
        assert "belongs to bin, who must submit it" in found
    single = PLAN.format(data=str(data), runs=str(runs)).replace("[DIGITS]", "[DIGITS | {'models': ['resnet10t']}]")
    done = bob.python("-c", single.replace('job="local"', 'job="slurm-cpu"'))
    assert "Nothing is left to submit. Use other --runs for runs of your own." in done.stderr
