"""What keeps a job from starting is read from SkyPilot's own log, and shown instead of "queued" alone."""

import pytest

from rsb_cluster.backends.skypilot import backend, engine
from rsb_cluster.backends.skypilot.launches import FailedLaunches, failed_launches
from rsb_cluster.errors import ConfigError, SubmitError
from rsb_cluster.monitor import logs
from rsb_cluster.monitor.status import read_status
from tests.unit.sky_jobs import attempt, launch

AT = "I 11-30 12:00:01.123 PID=71 recovery_strategy.py:1137] "
REASON = "sky.exceptions.CommandError: Command failed with return code 2. Failed to set up SkyPilot runtime on cluster."
# Of SkyPilot 0.14.1, whose nodes asked for a package that their cache lacked.
FAILED = f"""\
{AT}Failed to launch a cluster with error: {REASON})
{AT}  Traceback: Traceback (most recent call last):
{AT}Retrying to launch the cluster in 63.1 seconds.
"""


def test_failed_launches_are_counted_with_the_last_reason():
    assert failed_launches("") == FailedLaunches()
    log = FAILED * 3 + f"{AT}\x1b[31mFailed to launch a cluster with error: NoCapacity: none (in us-east-1))\x1b[0m\n"
    assert failed_launches(log) == FailedLaunches(4, "NoCapacity: none (in us-east-1)")
    assert failed_launches(FAILED.replace(AT, "")) == FailedLaunches(1, REASON), "without a time, too"
    assert str(failed_launches(FAILED)) == f"1 launch has failed, the last with: {REASON}"


@pytest.mark.parametrize("started", ["Job started.", "==== Recovered. ===="])
def test_those_before_the_last_start_do_not_count(started):
    assert failed_launches(f"{FAILED}{AT}{started}\n") == FailedLaunches()
    assert failed_launches(f"{FAILED}{AT}{started}\n{FAILED}").count == 1


def test_a_failure_of_our_own_set_up_is_a_reason_and_a_preemption_is_none():
    crashed = "User program crashed (FAILED_SETUP). (Retry the job as max_restarts_on_errors is set to 10. [3/10])"
    assert failed_launches(f"{AT}{crashed}\n") == FailedLaunches(0, crashed)
    saved = "User program crashed (FAILED). (Exit code(s) [75] matched recover_on_exit_codes [[75, 143]])"
    assert failed_launches(f"{AT}{saved}\n") == FailedLaunches()


@pytest.mark.parametrize("state", ["STARTING", "PENDING"])
def test_status_says_what_keeps_a_job_from_starting(sky, run, tmp_path, state):
    sent = launch(run, tmp_path)
    sky.say(sent.job_id, state, details="In backoff, waiting for resources")
    sky.logs[1] = FAILED * 4
    (status,) = read_status([run])
    assert (status.state, status.engine) == ("queued", f"sky 1 {state} (4 failed launches)")
    command = f"sky jobs logs --controller --name {sent.job_id}"
    assert (
        status.problem == status.cause == f"4 launches have failed, the last with: {REASON}. SkyPilot's log: {command}"
    )


def test_a_recovery_that_does_not_start_says_so_rather_than_the_preemption(sky, run, tmp_path):
    sent = launch(run, tmp_path)
    attempt(run, sent.job_id, 1, "preempted")
    sky.say(sent.job_id, "RECOVERING", recoveries=1)
    (status,) = read_status([run])
    assert status.cause == "preempted", "the first launch of it"
    sky.logs[1] = FAILED
    (status,) = read_status([run])
    assert status.engine == "sky 1 RECOVERING (1 recovered, 1 failed launch)"
    assert status.cause.startswith("1 launch has failed, the last with: ")
    sky.say(sent.job_id, "RUNNING", recoveries=5)
    (status,) = read_status([run])
    assert status.state == "starting" and status.cause.startswith("5 recovered. SkyPilot's log: ")
    attempt(run, sent.job_id, 2)
    (status,) = read_status([run])
    assert (status.state, status.problem) == ("running", "")


def test_without_its_log_skypilots_own_words_are_shown(sky, run, tmp_path, monkeypatch):
    def unreachable(number):
        raise SubmitError("SkyPilot: no")

    sent = launch(run, tmp_path)
    monkeypatch.setattr(engine, "controller_log", unreachable)
    sky.say(sent.job_id, "PENDING", details="In backoff, waiting for resources")
    (status,) = read_status([run])
    assert status.cause.startswith("In backoff, waiting for resources. SkyPilot's log: sky jobs logs --controller")


def test_only_the_logs_of_a_few_jobs_are_read(sky, run, tmp_path, monkeypatch):
    sent = [launch(run, tmp_path) for _ in range(backend.LOGS_READ + 3)]
    read = []
    monkeypatch.setattr(engine, "controller_log", lambda number: read.append(number) or "")
    backend.SkyPilot().query(sent)
    assert read == list(range(1, backend.LOGS_READ + 1))


def test_logs_say_why_there_are_none(sky, run, tmp_path, monkeypatch):
    sent = launch(run, tmp_path)
    sky.say(sent.job_id, "STARTING")
    sky.logs[1] = FAILED * 4
    with pytest.raises(
        ConfigError, match=r"has not started yet\. sky 1 STARTING \(4 failed launches\): 4 launches have"
    ):
        list(logs.read_log(run, rank=0, attempt=0, follow=False))

    # Followed, it is said when it changes; the log itself goes elsewhere.
    said, polls = [], []

    def later(seconds):
        polls.append(seconds)
        if len(polls) == 2:
            sky.logs[1] = FAILED * 5
        elif len(polls) == 4:
            attempt(run, sent.job_id, 1, "finished")
            run.store.write_bytes("logs/0001-rank00000.log", b"step 1\n")

    monkeypatch.setattr(logs, "ASK_S", 0.0)
    monkeypatch.setattr(logs.time, "sleep", later)
    assert "".join(logs.read_log(run, rank=0, attempt=0, follow=True, tell=said.append)) == "step 1\n"
    assert [text.partition(":")[0] for text in said] == [
        f"sky 1 STARTING ({count} failed launches)" for count in (4, 5)
    ]
