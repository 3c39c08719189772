"""Concurrent submits create one run, and an accepted job is recorded or reported."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from rsb_cluster.backends.local import Local
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.config.sweep_file import Grid, SweepFile, expand
from rsb_cluster.errors import ConfigError, RefusedError, SubmitError
from rsb_cluster.node.processes import Process
from rsb_cluster.runs.sweep import Sweep, read_sweep
from rsb_cluster.submission import submit
from rsb_cluster.submission.job_arrays import ToSubmit, make_arrays
from rsb_cluster.submission.plan import Plan
from rsb_cluster.submission.plan_runs import plan_runs
from rsb_cluster.submission.planned_run import PlannedRun
from tests.servers.daemons import poll
from tests.unit.bundled import load_job

pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")

FILE = SweepFile(name="x", grid=(Grid(recipes=("digits",), models=("test_resnet",), seeds=(0, 1)),))
# Their processes wait here, so that no rank is ever started.
WAITS = ("setup=['sleep 60']",)


def planned(runs: Path, data: Path, *job_overrides: str) -> list[PlannedRun]:
    points = expand(FILE, job="local", job_overrides=parse_overrides((*WAITS, *job_overrides)))
    return plan_runs(points, str(runs), str(data), dry_run=False)[0]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder of runs; jobs that were started there end after the test."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "runs"
    for pickle in tmp_path.rglob("*_submitted.pkl"):
        process = Process.parse(pickle.name.removesuffix("_submitted.pkl"))
        if process is not None:  # else a job of Slurm's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


# --- concurrent submits --------------------------------------------------------------------------------------------


def test_the_second_of_two_submits_uses_the_first_ones_run(runs, digits):
    """It was planned before the first one wrote; the run's package versions and time are those of the first."""
    first, second = planned(runs, digits), planned(runs, digits)
    submit.create_runs(first)
    before = [p.run.store.read_bytes("spec.json") for p in first]
    submit.create_runs(second)
    assert [p.run.store.read_bytes("spec.json") for p in second] == before


def test_concurrent_submits_create_one_run(runs, digits):
    barrier = threading.Barrier(4)

    def create(mine):
        barrier.wait()
        submit.create_runs(mine)

    plans = [planned(runs, digits) for _ in range(4)]
    threads = [threading.Thread(target=create, args=(mine,)) for mine in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {p.run.spec().virtual_ranks for p in plans[0]} == {4}
    assert [p.state for p in planned(runs, digits)] == ["unfinished"] * 2


def test_each_submit_has_its_data_where_it_found_them(runs, digits, tmp_path):
    """The same shards at another place are the same run; the spec keeps to where they were first."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(digits)
    first, second = planned(runs, digits), planned(runs, elsewhere)
    assert [p.run.url for p in first] == [p.run.url for p in second], "the same run"
    submit.create_runs(first)
    submit.create_runs(second)
    (array,) = make_arrays(str(runs), [ToSubmit(p.run, p.point.job, p.data.url) for p in second], name="x")
    assert {task.data for task in array.tasks} == {str(elsewhere)}
    assert {one.run.spec().data for one in second} == {str(digits)}


def test_a_run_that_a_killed_submit_left_incomplete_is_completed(runs, digits):
    first = planned(runs, digits)
    submit.create_runs(first)
    (Path(first[0].run.url) / "spec.json").unlink()
    again = planned(runs, digits)
    assert [p.state for p in again] == ["new", "unfinished"]
    submit.create_runs([p for p in again if p.state == "new"])
    assert first[0].run.spec().run_id == first[0].run.run_id


def test_a_sweep_submitted_twice_keeps_its_first_time(runs):
    sweeps = [Sweep(sweep_id="x-1", file="", created=created, members=()) for created in (1.0, 2.0)]
    for sweep in sweeps:
        submit.submit(Plan(str(runs), (), (), sweep))
    assert read_sweep(str(runs), "x-1") == sweeps[0]


# --- accepted jobs are recorded ------------------------------------------------------------------------------------


def arrays_of(runs: Path, made: list[PlannedRun]):
    jobs = [load_job("local", *WAITS), load_job("local", *WAITS, "time_min=7")]
    chosen = ((made[0], jobs[0]), (made[1], jobs[0]), (made[0], jobs[1]))
    return make_arrays(str(runs), [ToSubmit(p.run, job, p.data.url) for p, job in chosen], name="x")


def test_a_folder_of_scripts_that_cannot_be_made_is_said(runs, digits):
    made = planned(runs, digits)
    submit.create_runs(made)
    array = dataclasses.replace(arrays_of(runs, made)[0], folder=Path("/dev/null/x"))
    with pytest.raises(ConfigError, match=r"scripts and logs cannot be written to /dev/null: .*submissions=FOLDER"):
        submit.submit_arrays([array])


def test_a_submission_is_recorded_as_soon_as_possible(runs, digits, monkeypatch):
    made = planned(runs, digits)
    submit.create_runs(made)
    in_the_way = Path(made[0].run.url) / "submissions"
    in_the_way.write_text("")
    monkeypatch.setattr(submit, "RECORD_RETRY_S", (0.02,) * 500)
    threading.Timer(0.2, in_the_way.unlink).start()
    sent = submit.submit_arrays(arrays_of(runs, made)[:1])
    assert [p.run.submissions() for p in made] == [[one] for one in sent]


def test_jobs_that_cannot_be_recorded_are_named_with_the_command_that_cancels_them(runs, digits, monkeypatch):
    made = planned(runs, digits)
    submit.create_runs(made)
    (Path(made[0].run.url) / "submissions").write_text("")
    monkeypatch.setattr(submit, "RECORD_RETRY_S", (0.0, 0.0))
    first, second = arrays_of(runs, made)
    with pytest.raises(SubmitError) as caught:
        submit.submit_arrays([first, second])
    (recorded,) = made[1].run.submissions()
    said = str(caught.value)
    assert (
        f"back end local accepted job {recorded.job_id} ({made[0].run.run_id}), but the submission could not be" in said
    )
    assert made[1].run.run_id not in said
    assert not second.folder.exists(), "arrays after it are not submitted"
    lost = recorded.model_copy(update={"folder": str(first.folder / "0")})
    assert Local().query([lost])[0].state in ("queued", "running")
    subprocess.run(["bash", "-c", said.splitlines()[-1]], check=True)
    assert poll(lambda: Local().query([lost])[0].state == "gone")
    assert Local().query([recorded])[0].state in ("queued", "running")


# --- who may read -----------------------------------------------------------------------------------------------------


def test_what_is_submitted_with_share_is_readable_for_the_group_whatever_the_umask(runs, digits):
    """The run, and the scripts, pickles and logs of its job; a run that was private becomes so, too."""
    job = load_job("local", *WAITS, "share='group'")
    runs.mkdir(mode=0o750)
    before = os.umask(0o077)
    try:
        private, new = planned(runs, digits)
        submit.create_runs([private])
        shared = planned(runs, digits, "share='group'")
        assert [p.state for p in shared] == ["unfinished", "new"]
        arrays = make_arrays(str(runs), [ToSubmit(p.run, job, p.data.url) for p in shared], name="x")
        submit.submit(Plan(str(runs), tuple(shared), arrays))
    finally:
        os.umask(before)
    found = [path for folder in (private.run.url, new.run.url, arrays[0].folder.parent) for path in below(folder)]
    assert {path.name for path in found} >= {"spec.json", "queue.log", "0", arrays[0].folder.name}
    assert [
        (str(path), oct(mode)) for path in found if (mode := path.stat().st_mode & 0o777) not in (0o750, 0o640)
    ] == []


def below(folder: str | Path) -> list[Path]:
    return [Path(folder), *Path(folder).rglob("*")]


# --- a submit that is refused ---------------------------------------------------------------------------------------


def slurm_plan(runs: Path, data: Path) -> Plan:
    points = expand(
        FILE, job="slurm-cpu", job_overrides=[], recipe_overrides=parse_overrides(("train.virtual_ranks=0",))
    )
    made = plan_runs(points, str(runs), str(data), dry_run=False)[0]
    todo = [ToSubmit(p.run, p.point.job, p.data.url) for p in made if p.should_submit]
    sweep = Sweep(sweep_id="x-1", file="", created=0.0, members=())
    return Plan(str(runs), tuple(made), make_arrays(str(runs), todo, name="x"), sweep)


def test_a_refused_submit_leaves_nothing(runs, digits, slurm_programs):
    slurm_programs.write("scontrol", "MaxArraySize = 1001\n")
    slurm_programs.write("sbatch", errors="sbatch: error: invalid partition specified: none\n", code=1)
    with pytest.raises(RefusedError, match="invalid partition specified: none"):
        submit.submit(slurm_plan(runs, digits))
    assert not runs.exists()


def test_of_a_refused_submit_what_was_there_stays(runs, digits, slurm_programs):
    slurm_programs.write("scontrol", "MaxArraySize = 1001\n")
    slurm_programs.write("sbatch", errors="sbatch: error: QOSMaxSubmitJobPerUserLimit\n", code=1)
    plan = slurm_plan(runs, digits)
    submit.create_runs(plan.runs[:1])
    with pytest.raises(RefusedError):
        submit.submit(slurm_plan(runs, digits))
    assert [p.run.exists() for p in plan.runs] == [True, False] and read_sweep(str(runs), "x-1")
    assert not list(runs.rglob("job.sh"))


def test_a_submit_of_which_slurm_says_nothing_keeps_what_its_job_would_need(runs, digits, slurm_programs):
    slurm_programs.write("scontrol", "MaxArraySize = 1001\n")
    slurm_programs.write("sbatch", errors="sbatch: error: Socket timed out on send/recv operation\n", code=1)
    plan = slurm_plan(runs, digits)
    with pytest.raises(SubmitError, match="check with 'squeue --me --name=x', and cancel it"):
        submit.submit(plan)
    assert all(p.run.exists() for p in plan.runs) and len(list(runs.rglob("job.sh"))) == 1


def test_a_job_that_slurm_takes_while_ctrl_c_is_pressed_is_recorded(runs, digits, slurm_programs):
    """In a terminal both get the signal: this process and sbatch."""
    slurm_programs.write("scontrol", "MaxArraySize = 1\n")
    sbatch = slurm_programs.folder / "sbatch"
    sbatch.write_text("#!/bin/bash\nkill -INT $PPID $$; kill -HUP $$; echo 7\n")
    sbatch.chmod(0o755)
    before = signal.getsignal(signal.SIGINT)
    plan = slurm_plan(runs, digits)
    with pytest.raises(SubmitError, match=r"interrupted after 1 run had .*'rsb-cluster cancel'.* 1 of 2 job arrays"):
        submit.submit(plan)
    assert [[s.job_id for s in p.run.submissions()] for p in plan.runs] == [["7"], []]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait_for_the_scheduler(runs, digits, slurm_programs):
    slurm_programs.write("scontrol", "MaxArraySize = 1001\n")
    sbatch = slurm_programs.folder / "sbatch"
    sbatch.write_text("#!/bin/bash\nkill -INT $PPID; sleep 0.2; kill -INT $PPID; sleep 60\n")
    sbatch.chmod(0o755)
    with pytest.raises(KeyboardInterrupt):
        submit.submit(slurm_plan(runs, digits))
