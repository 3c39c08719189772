"""Cancelling runs: all jobs of each, and the cancel requests in the runs' folders if Slurm refuses.

Slurm's programs are replaced by programs with a queue of their own, which refuse what a test wants them to refuse.
"""

import os
from pathlib import Path

import pytest

from rsb_cluster.backends.skypilot.backend import SkyPilot
from rsb_cluster.errors import StorageError, SubmitError
from rsb_cluster.monitor import actions
from rsb_cluster.node.node_spec import submission_folder
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Run, Submission
from tests.unit.bundled import load_job
from tests.unit.new_runs import make_run
from tests.unit.sky_jobs import launch
from tests.unit.sweeps import finish, make, planned


@pytest.mark.usefixtures("here")
def test_retry_says_which_runs_it_cannot_submit_and_why(tmp_path, digits):
    runs = planned(tmp_path, digits)
    finish(make(runs[0]))
    never, broken, gone = make(runs[1]), make(runs[2], load_job("slurm-cpu")), runs[3].run
    broken.store.write_bytes("recipe.json", b"{")
    done = actions.retry([p.run for p in runs], failed_only=True)
    assert done.submitted == {}
    assert done.refused.keys() == {never.run_id, broken.run_id, gone.run_id}
    assert "its last job is not recorded" in done.refused[never.run_id]
    assert "recipe.json is not JSON" in done.refused[broken.run_id]
    assert "its folder does not exist; submit the sweep again" in done.refused[gone.run_id]


@pytest.mark.usefixtures("here")
def test_retry_takes_the_data_where_the_last_submit_found_them(sky, tmp_path):
    run = make_run(tmp_path / "runs")
    job = load_job("cloud-spot")
    task = Task(run.url, run.run_id, job.model_dump(mode="json"), "s3://bucket/moved")
    [sent] = SkyPilot().submit(job, [task], tmp_path, "x")
    sky.say(sent.job_id, "FAILED")
    assert set(actions.retry([run], failed_only=False).submitted) == {run.run_id}
    first, second = run.submissions()
    assert first.job_id != second.job_id and first.data == second.data == "s3://bucket/moved"
    spec = run.store.read_json(f"{submission_folder(second.job_id)}/spec.json")
    assert spec["data"] == "s3://bucket/moved"


SQUEUE = """\
[ ! -e "$OUT/down" ] || { echo "squeue: error: Unable to contact slurm controller" >&2; exit 1; }
cat "$OUT/queue"
"""

# Like Slurm's own, it continues after a job that it could not signal, and fails in the end.
SCANCEL = """\
echo "$@" >>"$OUT/scancel"
[ ! -e "$OUT/down" ] || { echo "scancel: error: Unable to contact slurm controller" >&2; exit 1; }
code=0
case "$1" in --signal=*) shift ;; *) ends=1 ;; esac
for job in "$@"; do
  if grep -qx -- "$job" "$OUT/refused"; then
    echo "scancel: error: Kill job error on job id $job: Access/permission denied" >&2; code=1
  elif ! grep -q "|$job|" "$OUT/queue"; then
    echo "scancel: error: Kill job error on job id $job: Invalid job id specified" >&2; code=1
  elif [ "$ends" ]; then
    sed -i "/|$job|PENDING/d; s/|$job|RUNNING/|$job|COMPLETING/" "$OUT/queue"
  fi
done
exit $code
"""


class Queue:
    """Slurm's queue."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, text in (("squeue", SQUEUE), ("scancel", SCANCEL)):
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}")
            (folder / "bin" / name).chmod(0o755)
        self.refuse()

    def hold(self, **jobs: str) -> None:
        """Set the jobs in the queue: ``j7="RUNNING"``."""
        (self.folder / "queue").write_text(
            "".join(f"{j[1:]}|{j[1:]}|{state}|None|me|0|run|(null)\n" for j, state in jobs.items())
        )

    def refuse(self, *jobs: str) -> None:
        (self.folder / "refused").write_text("".join(f"{job}\n" for job in jobs))

    def go_down(self) -> None:
        (self.folder / "down").touch()


@pytest.fixture
def queue(tmp_path, monkeypatch):
    (tmp_path / "slurm").mkdir()
    made = Queue(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{made.folder}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("OUT", str(made.folder))
    return made


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / "runs", seed) for seed in range(3)]


def send(run: Run, *job_ids: str) -> None:
    for number, job_id in enumerate(job_ids):
        run.add_submission(Submission(backend="slurm", job_id=job_id, folder="/f", shape="", time=number))


def test_all_jobs_of_a_run_are_cancelled(queue, runs):
    """Also an earlier one that is still queued, which would resume the run when it starts."""
    send(runs[0], "5", "7", "8")
    send(runs[1], "9_1")
    queue.hold(j7="RUNNING", j8="PENDING", j9_1="PENDING")
    ended = actions.cancel(runs)
    assert ended == {runs[0].run_id: ("7", "8"), runs[1].run_id: ("9_1",)}
    assert (queue.folder / "queue").read_text() == "7|7|COMPLETING|None|me|0|run|(null)\n"
    assert [runs[0].is_cancelled(job) for job in ("5", "7", "8")] == [False, True, True]
    assert runs[1].is_cancelled("9_1") and not runs[2].cancelled()
    assert actions.cancel(runs) == {runs[0].run_id: ("7",)}, "it is still saving, and may be cancelled again"


@pytest.mark.parametrize("before", [(), ("3", "4")])
def test_a_run_that_could_not_be_cancelled_keeps_no_cancel_request(queue, runs, before):
    """Its next preemption would stop it."""
    send(runs[0], "7", "8")
    runs[0].request_cancel(before)
    queue.hold(j7="RUNNING", j8="PENDING")
    queue.refuse("7", "8")
    with pytest.raises(SubmitError, match=rf"(?s)could not cancel job 7 \({runs[0].run_id}\), 8 \(.*permission denied"):
        actions.cancel(runs)
    assert runs[0].cancelled() == before
    assert runs[0].store.exists("cancelled.json") == bool(before)


def test_slurm_that_does_not_answer_leaves_no_cancel_request(queue, runs, monkeypatch):
    send(runs[0], "7")
    queue.hold(j7="RUNNING")

    def answer_no_more(run: Run, job_ids: list[str]) -> None:
        write(run, job_ids)
        queue.go_down()

    write = Run.request_cancel
    monkeypatch.setattr(Run, "request_cancel", answer_no_more)
    with pytest.raises(SubmitError, match="Unable to contact slurm controller"):
        actions.cancel(runs)
    assert not runs[0].store.exists("cancelled.json")


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_ctrl_c_before_scancel_leaves_no_cancel_request(queue, runs):
    send(runs[0], "7")
    queue.hold(j7="RUNNING")
    (queue.folder / "bin" / "scancel").write_text("#!/bin/bash\nkill -INT $PPID; exec sleep 5\n")
    with pytest.raises(KeyboardInterrupt):
        actions.cancel(runs)
    assert not runs[0].store.exists("cancelled.json")


def test_a_cancelled_job_keeps_its_request_if_another_job_was_refused(queue, runs):
    send(runs[0], "7", "8")
    send(runs[1], "9")
    queue.hold(j7="RUNNING", j8="PENDING", j9="PENDING")
    queue.refuse("8", "9")
    with pytest.raises(SubmitError) as caught:
        actions.cancel(runs)
    assert f"could not cancel job 8 ({runs[0].run_id}), 9 ({runs[1].run_id}): " in str(caught.value)
    assert str(caught.value).endswith("1 other job was cancelled.")
    assert runs[0].cancelled() == ("7",) and runs[1].cancelled() == ()


def test_a_job_that_has_just_ended_is_no_failure(queue, runs, monkeypatch):
    send(runs[0], "7")
    send(runs[1], "8")
    queue.hold(j7="RUNNING", j8="PENDING")
    write = Run.request_cancel

    def end_meanwhile(run: Run, job_ids: list[str]) -> None:
        write(run, job_ids)
        queue.hold(j8="PENDING")

    monkeypatch.setattr(Run, "request_cancel", end_meanwhile)
    assert actions.cancel(runs) == {runs[0].run_id: ("7",), runs[1].run_id: ("8",)}
    assert "7 8" in (queue.folder / "scancel").read_text()
    assert (queue.folder / "queue").read_text() == "", "the other has left the queue"


def test_a_failing_engine_does_not_affect_another(queue, runs, sky):
    send(runs[0], "7")
    in_cloud = launch(runs[0], queue.folder).job_id
    send(runs[1], "8")
    queue.hold(j7="PENDING", j8="PENDING")
    queue.refuse("7", "8")
    with pytest.raises(SubmitError, match=r"could not cancel job 7 .*, 8 "):
        actions.cancel(runs)
    assert sky.table[in_cloud].state == "CANCELLED"
    assert runs[0].cancelled() == (in_cloud,) and runs[1].cancelled() == ()


def test_all_running_jobs_are_preempted_and_one_that_has_just_ended_is_no_failure(queue, runs, monkeypatch):
    send(runs[0], "6", "7")
    send(runs[1], "8")
    queue.hold(j6="PENDING", j7="RUNNING", j8="RUNNING")
    assert actions.preempt(runs) == {runs[0].run_id: ("7",), runs[1].run_id: ("8",)}
    queue.hold(j7="RUNNING", j8="RUNNING")
    queue.refuse("7")
    with pytest.raises(SubmitError, match=r"scancel --signal=TERM 7 failed: .*permission denied"):
        actions.preempt(runs)
    queue.refuse()
    monkeypatch.setattr(actions.backends, "states", lambda submissions: ["running"] * len(submissions))
    queue.hold(j8="RUNNING")
    assert actions.preempt(runs[:2])[runs[1].run_id] == ("8",)


def test_retry_submits_the_last_job_again(sky, runs, tmp_path):
    run = runs[0]
    sent = launch(run, tmp_path, "nodes=2", "cloud.pool=mine")
    sky.say(sent.job_id, "FAILED")
    done = actions.retry([run], failed_only=True)
    assert not done.refused and done.submitted[run.run_id] != sent.job_id
    assert sky.tasks[1]["num_nodes"] == 2 and sky.pools == ["mine", "mine"]


@pytest.mark.parametrize("action", [actions.cancel, actions.preempt])
def test_a_run_that_cannot_be_read_keeps_no_other_from_being_ended(queue, runs, action):
    """Of 'cancel a1-*' the damaged run of many, or a colleague's."""
    for i, run in enumerate(runs):
        send(run, str(7 + i))
    queue.hold(j7="RUNNING", j8="RUNNING", j9="RUNNING")
    (name,) = runs[1].store.files("submissions")
    runs[1].store.write_bytes(name, b"{")
    with pytest.raises(SubmitError, match=rf"(?s){runs[1].run_id} was left alone: .* is not JSON.*2 other (job|run)s"):
        action(runs)
    assert sorted(job for job in (queue.folder / "scancel").read_text().split() if job.isdigit()) == ["7", "9"]
    with pytest.raises(StorageError, match="is not JSON"):
        action(runs[1:2])


def test_a_cancel_that_cannot_be_recorded_for_one_run_ends_the_others(queue, runs):
    for i, run in enumerate(runs):
        send(run, str(7 + i))
    queue.hold(j7="RUNNING", j8="RUNNING", j9="RUNNING")
    (Path(runs[0].url) / "cancelled.json").mkdir()
    with pytest.raises(SubmitError, match=rf"(?s)could not cancel {runs[0].run_id}: cannot use .*2 other jobs were"):
        actions.cancel(runs)
    assert (queue.folder / "scancel").read_text().split()[-2:] == ["8", "9"] and runs[1].is_cancelled("8")
