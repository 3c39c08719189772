"""The status of each run, from its folder and its jobs."""

import pytest

from rsb_cluster import backends
from rsb_cluster.backends.slurm.backend import Slurm
from rsb_cluster.errors import SubmitError
from rsb_cluster.monitor import actions
from rsb_cluster.monitor.status import STATES, Status, attention_order, find_status, has_ended, read_status, summary
from rsb_cluster.runs.metrics import MetricsWriter
from rsb_cluster.runs.run import Attempt, Run, Submission
from tests.unit.bundled import load_job
from tests.unit.new_runs import make_run
from tests.unit.sweeps import finish, make, planned


@pytest.mark.usefixtures("here")
def test_a_broken_run_does_not_affect_the_others(tmp_path, digits):
    runs = planned(tmp_path, digits)
    finish(make(runs[0], load_job("local")))
    make(runs[1]).store.write_bytes("recipe.json", b"{")
    make(runs[2]).store.write_json("result.json", {"top1": "high"})
    found = read_status([p.run for p in runs])
    assert [status.state for status in found] == ["finished", "broken", "broken", "missing"]
    assert "recipe.json is not JSON" in found[1].cause
    assert "result.json is no result. Was it edited by hand?" in found[2].cause
    assert (found[0].top1, found[0].step, found[0].total_steps, found[0].images_per_s) == (90, 550, 550, 9.5)


def attempt(number: int, start: int, cause: str = "", message: str = "") -> Attempt:
    return Attempt(
        number=number, job_id="1", world_size=1, hosts=("h",), started=1, start_step=start, cause=cause, message=message
    )  # type: ignore[arg-type]


def row(kind: str, step: int) -> dict[str, object]:
    return {"kind": kind, "step": step, "epoch": step / 22, "loss": 0.5, "images_per_s": 100.0, "top1": step / 10}


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path)


def log(run: Run, number: int, *rows: dict[str, object]) -> None:
    writer = MetricsWriter(run.store, number)
    for one in rows:
        writer.add(one)
    writer.flush()


def test_a_run_that_was_killed_has_the_state_killed(run):
    run.write_attempt(attempt(1, 0, "preempted"))
    run.write_attempt(attempt(2, 30))
    log(run, 1, row("train", 30), row("eval", 30), row("train", 40))
    (status,) = read_status([run])
    assert (status.state, status.cause, status.attempt) == ("killed", "killed", 2)
    assert (status.step, status.total_steps, status.top1, status.eta_s) == (30, 550, 3.0, None)


def test_the_exit_reason_has_cause_and_message(run):
    run.write_attempt(attempt(1, 0, "preempted"))
    run.write_attempt(attempt(2, 30, "failed", "out of [memory]"))
    (status,) = read_status([run])
    assert (status.state, status.cause) == ("failed", "failed (out of [memory])")


def test_a_run_that_was_never_started(run):
    (status,) = read_status([run])
    assert (status.state, status.cause, status.step, status.total_steps) == ("never started", "", 0, 550)


def submit_to_slurm(run: Run, job_id: str = "7") -> None:
    run.add_submission(Submission(backend="slurm", job_id=job_id, folder="/f", shape="", time=1e9))


def test_a_scheduler_that_cannot_be_asked_hides_no_run(run, slurm_programs, tmp_path):
    """Slurm's controller is away, SkyPilot is not installed here, and a third run is on this machine."""
    for name in ("squeue", "scontrol", "sbatch"):
        slurm_programs.write(name, errors="Unable to contact slurm controller (connect failure)\n", code=1)
    submit_to_slurm(run)
    here, away = make_run(tmp_path, 1), make_run(tmp_path, 2)
    here.write_attempt(attempt(1, 0, "crashed", "disk"))
    away.add_submission(Submission(backend="cloud", job_id="x-1", folder="/f", shape="", time=1e9))
    found = read_status([run, here, away])
    assert [s.state for s in found] == ["unknown", "crashed", "unknown"]
    assert "Unable to contact slurm controller" in found[0].cause
    assert found[2].cause
    assert [has_ended(s) for s in found] == [False, True, True], "only Slurm may answer when it is asked again"
    with pytest.raises(SubmitError, match="Unable to contact"):
        backends.states(run.submissions())  # on which something is decided
    assert "whether it is queued is unknown" in actions.retry([run], failed_only=True).refused[run.run_id]


def test_slurm_says_why_a_job_waits_and_how_it_ended(run, slurm_programs):
    slurm_programs.write("squeue", "7|7_N/A|PENDING|QOSMaxJobsPerUserLimit|me|0|a|(null)\n")
    submit_to_slurm(run)
    (status,) = read_status([run])
    assert (status.state, status.cause) == ("queued", "pending: QOSMaxJobsPerUserLimit")
    slurm_programs.write("squeue")
    slurm_programs.write("sacct", "8|me|OUT_OF_MEMORY\n")
    submit_to_slurm(run, "8")
    (status,) = read_status([run])
    assert (status.state, status.cause) == ("never started", "OUT_OF_MEMORY")
    run.write_attempt(attempt(1, 0))
    (status,) = read_status([run])
    assert (status.state, status.cause) == ("killed", "killed (OUT_OF_MEMORY)")


def ended(run: Run) -> tuple[str, str]:
    (status,) = read_status([run])
    return status.state, status.cause


def test_a_cancelled_job_stays_cancelled_until_the_next_submit(run, slurm_programs, monkeypatch):
    """Queued after a preemption, it would look preempted for ever."""
    slurm_programs.write("squeue")
    slurm_programs.write("sacct", "7|me|COMPLETED\n")
    submit_to_slurm(run)
    run.write_attempt(attempt(1, 0, "preempted").model_copy(update={"job_id": "7"}))
    assert ended(run) == ("preempted", "preempted")
    run.request_cancel(["7"])
    assert ended(run) == ("cancelled", "cancelled job 7; before: preempted")
    done = actions.retry([run], failed_only=True)
    assert (done.submitted, done.refused, done.perhaps_cancelled) == ({}, {}, {})
    monkeypatch.setitem(backends.BACKENDS, "slurm", Slurm())
    slurm_programs.write("sacct", "7|me|COMPLETED\n8|me|FAILED\n")
    run.add_submission(Submission(backend="slurm", job_id="8", folder="/f", shape="", time=2e9))
    assert ended(run) == ("preempted", "preempted"), "the cancelled job was another one"


@pytest.mark.parametrize(
    ("cause", "state"),
    [(None, "cancelled"), ("preempted", "cancelled"), ("", "cancelled"), ("stopped", "stopped"), ("failed", "failed")],
)
def test_a_scancel_is_known_from_accounting(run, slurm_programs, cause, state):
    """A job that had come to an end of its own is not what was cancelled."""
    slurm_programs.write("squeue")
    slurm_programs.write("sacct", "7|me|CANCELLED by 1000\n")
    submit_to_slurm(run)
    if cause is not None:
        run.write_attempt(attempt(1, 0, cause).model_copy(update={"job_id": "7"}))
    assert ended(run)[0] == state


@pytest.mark.parametrize(
    ("cause", "state"),
    [(None, "gone"), ("preempted", "gone"), ("crashed", "gone"), ("", "killed"), ("stopped", "stopped")],
)
def test_without_accounting_a_job_that_left_the_queue_is_gone(run, slurm_programs, cause, state):
    slurm_programs.write("squeue")
    slurm_programs.write("sacct", errors="Slurm accounting storage is disabled\n", code=1)
    submit_to_slurm(run)
    if cause is not None:
        run.write_attempt(attempt(1, 0, cause).model_copy(update={"job_id": "7"}))
    assert ended(run)[0] == state
    if state == "gone":
        assert ended(run)[1].startswith("job 7 is gone; cancelled?")
        done = actions.retry([run], failed_only=True)
        assert set(done.perhaps_cancelled) == {run.run_id} and not done.submitted and not done.refused


def test_accounting_that_is_late_is_asked_again(run, slurm_programs):
    slurm_programs.write("squeue")
    slurm_programs.write("sacct", "7|me|PENDING\n")
    submit_to_slurm(run)
    assert ended(run) == ("never started", "")
    slurm_programs.write("sacct", "7|me|CANCELLED by 0\n")
    assert ended(run) == ("cancelled", "cancelled job 7")


@pytest.mark.usefixtures("here")
def test_a_finished_run_has_no_reason_and_says_where_it_ran(tmp_path, digits):
    run = make(planned(tmp_path, digits)[0], load_job("local"))
    run.write_attempt(attempt(1, 0, "preempted", "node n1").model_copy(update={"ended": 2e9}))
    finish(run)
    (status,) = read_status([run])
    assert (status.state, status.cause, status.hosts, status.updated) == ("finished", "", ("h",), 2e9)
    assert (status.recipe, status.model) == ("digits", "resnet10t")


def test_no_runs_have_no_status():
    assert read_status([]) == []


def test_the_summary_begins_with_what_needs_attention():
    found = [Status("r", "/r", state) for state in ("finished", "running", "finished", "failed", "some new cause")]
    assert summary(found) == "5 runs: 1 some new cause, 1 failed, 1 running, 2 finished"
    assert summary(found[:1]) == "1 run: 1 finished"
    assert attention_order("missing") < attention_order("running") < attention_order("finished")
    assert len(set(STATES)) == len(STATES)


def test_a_run_that_lost_its_spec_is_broken_and_not_hidden(run, tmp_path):
    """Checkpoints of days may be in it; what a killed submit has left, and other people's folders, are no runs."""
    run.store.delete("spec.json")
    (tmp_path / "notes" / "logs").mkdir(parents=True)
    assert find_status(str(tmp_path), ()) == ([], [])
    run.write_attempt(attempt(1, 0, "preempted"))
    for names in ((), (run.run_id,)):
        (status,) = find_status(str(tmp_path), names)[1]
        assert status.state == "broken" and "spec.json is missing; restore it, or submit the run again" in status.cause
