"""Which job of the queue is ours, how often it is asked, and why a job has ended."""

import os
import pwd

import pytest

from rsb_cluster.backends import JobStatus
from rsb_cluster.backends.slurm import queue
from rsb_cluster.backends.slurm.queue import Queue
from rsb_cluster.errors import SubmitError
from rsb_cluster.runs.run import Submission

NOW = 1_700_000_000.0
FOLDER = "/shared/submissions/20231114-a1-7"


def submission(job_id="7", **fields):
    values = {"user": "me", "name": "a1-s0", "folder": FOLDER, "time": NOW} | fields
    return Submission(backend="slurm", job_id=job_id, shape="", **values)


def line(job_id="7", task="7_N/A", state="RUNNING", reason="None", **fields):
    values = {"user": "me", "at": int(NOW) + 1, "name": "a1-s0", "script": f"{FOLDER}/job.sh"} | fields
    return f"{job_id}|{task}|{state}|{reason}|{values['user']}|{values['at']}|{values['name']}|{values['script']}\n"


@pytest.fixture
def squeue(slurm_programs):
    slurm_programs.write("sacct", errors="Slurm accounting storage is disabled\n", code=1)
    return slurm_programs


def state(squeue, answer, asked=None):
    squeue.write("squeue", answer)
    (status,) = Queue().query([asked or submission()], fresh=True)
    return status.state


@pytest.mark.parametrize(
    ("slurm_says", "expected"),
    [
        ("RUNNING", "running"), ("COMPLETING", "running"), ("STAGE_OUT", "running"), ("SIGNALING", "running"),
        ("PENDING", "queued"), ("CONFIGURING", "queued"), ("REQUEUED", "queued"), ("REQUEUE_HOLD", "queued"),
        ("SPECIAL_EXIT", "queued"), ("SUSPENDED", "queued"),
        ("COMPLETED", "gone"), ("CANCELLED", "gone"), ("TIMEOUT", "gone"), ("PREEMPTED", "gone"), ("NODE_FAIL", "gone"),
    ],
)  # fmt: skip
def test_states(squeue, slurm_says, expected):
    assert state(squeue, line(state=slurm_says)) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"user": "colleague"},
        {"name": "jupyter"},
        {"script": "/shared/submissions/20231114-a1-8/job.sh"},
        {"at": int(NOW) - 10 * 86_400},
    ],
    ids=["user", "name", "script", "earlier"],
)
def test_a_job_that_has_the_number_by_now_is_not_ours(squeue, other):
    assert state(squeue, line(**other)) == "gone"


@pytest.mark.parametrize(
    "same",
    [
        {"at": int(NOW) + 5 * 86_400},
        {"at": int(NOW) - 600},
        {"script": "(null)"},
        {"script": "/tmp/sbatch-wrapper-x7.sh"},
        {"at": "N/A"},
    ],
    ids=["requeued", "the controller's clock is behind", "no script", "a wrapper's copy", "no time"],
)
def test_a_job_is_ours_whatever_is_not_known_of_it(squeue, same):
    assert state(squeue, line(**same)) == "running"


def test_submissions_of_earlier_versions_are_found_by_their_number(squeue):
    """They have neither user nor name, and submitit's script had another name."""
    old = submission(user="", name="")
    assert state(squeue, line(name="any", script=f"{FOLDER}/.submission_file_1f.sh"), old) == "running"


def test_lines_that_are_no_jobs_are_skipped(squeue):
    chatter = "CLUSTER: big\n*** maintenance on Friday | 8:00 ***\n1|2|3\n\n"
    assert state(squeue, chatter + line() + "bye\n") == "running"
    assert state(squeue, chatter) == "gone"


@pytest.mark.parametrize("answer", ['{"jobs": [{"job_id": 7, "job_state": ["PENDING"]}]}', "7 gpu a1-s0 me PD 0:00 1"])
def test_an_answer_in_another_form_says_nothing_of_a_job(squeue, answer):
    """As of a wrapper that ignores the options; the job is not gone."""
    with pytest.raises(SubmitError, match="squeue's answer is not in the form that was asked for"):
        state(squeue, answer)


def test_array_tasks_are_found_by_either_number(squeue):
    answer = line("8", "7_0") + line("7", "7_1", "PENDING", "Resources")
    squeue.write("squeue", answer)
    found = Queue().query([submission("7_0"), submission("7_1"), submission("7_2")], fresh=True)
    assert [(s.state, s.reason) for s in found] == [("running", ""), ("queued", "pending: Resources"), ("gone", "")]


def test_each_cluster_is_asked_for_its_own_jobs(squeue):
    squeue.write("squeue", line())
    asked = [submission("7"), submission("7", cluster="big"), submission("8_0", cluster="big")]
    assert [s.state for s in Queue().query(asked, fresh=True)] == ["running", "running", "gone"]
    assert [call[:-1] for call in squeue.calls("squeue")] == [
        ["-h", "-r", "-o", queue._FORMAT, "-j"], ["--clusters=big", "-h", "-r", "-o", queue._FORMAT, "-j"],
    ]  # fmt: skip
    assert [call[-1] for call in squeue.calls("squeue")] == ["7", "7,8"]


def test_somebody_who_looks_asks_twice_a_minute_and_who_decides_asks_now(squeue, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(queue.time, "monotonic", lambda: now[0])
    squeue.write("squeue", line())
    asked = Queue()
    for _ in range(60):
        now[0] += 1
        asked.query([submission()], fresh=False)
    assert len(squeue.calls("squeue")) == 2
    asked.query([submission()], fresh=True)
    assert len(squeue.calls("squeue")) == 3
    squeue.write("squeue", line() + line("9", "9_N/A", "PENDING"))
    newer = asked.query([submission(), submission("9")], fresh=False)
    assert [s.state for s in newer] == ["running", "queued"], "the last answer was not of that job"
    assert len(squeue.calls("squeue")) == 4


def test_a_controller_that_does_not_answer_is_an_error_and_unknown_jobs_are_none(squeue):
    squeue.write("squeue", errors="slurm_load_jobs error: Unable to contact slurm controller\n", code=1)
    with pytest.raises(SubmitError, match="Unable to contact slurm controller"):
        Queue().query([submission()], fresh=True)
    squeue.write("squeue", errors="slurm_load_jobs error: Invalid job id specified\n", code=1)
    assert Queue().query([submission()], fresh=True) == [JobStatus("gone")]


def test_accounting_says_why_a_job_ended_and_is_asked_once(slurm_programs):
    slurm_programs.write("squeue")
    slurm_programs.write(
        "sacct",
        "7|me|OUT_OF_MEMORY\n8_0|me|CANCELLED by 0\n8_1|me|COMPLETED\n9|colleague|NODE_FAIL\nnoise\n"
        "10|me|TIMEOUT|of-others\n",
    )
    asked = Queue()
    jobs = [submission(job_id) for job_id in ("7", "8_0", "8_1", "9", "10")]
    for _ in range(2):
        assert [s.reason for s in asked.query(jobs, fresh=False)] == ["OUT_OF_MEMORY", "CANCELLED", "", "", ""]
        assert [s.is_cancelled for s in asked.query(jobs, fresh=False)] == [False, True, False, None, None]
    assert len(slurm_programs.calls("sacct")) == 1


def test_tasks_that_never_started_are_one_line_of_accounting(slurm_programs):
    slurm_programs.write("squeue")
    slurm_programs.write("sacct", "8_[0,2-3%4]|me|CANCELLED by 1001|a1-s0\n8_1|me|TIMEOUT|a1-s0\n9_[x]|me|FAILED|\n")
    jobs = [submission(f"8_{task}") for task in range(5)]
    reasons = [s.reason for s in Queue().query(jobs, fresh=False)]
    assert reasons == ["CANCELLED", "TIMEOUT", "CANCELLED", "CANCELLED", ""]


def test_a_job_without_a_cluster_is_looked_for_on_the_default_one(squeue, monkeypatch):
    """As the shell is set to another one by now: there it would be gone."""
    monkeypatch.setenv("SLURM_CLUSTERS", "other")
    assert state(squeue, line()) == "running"
    assert "SLURM_CLUSTERS" not in squeue.environment("squeue")


@pytest.mark.parametrize(("private", "expected"), [("jobs,usage", "unknown"), ("none", "gone")])
def test_a_job_that_a_site_may_hide_is_not_gone(squeue, private, expected):
    """With PrivateData=jobs a colleague's job looks like one that has ended."""
    squeue.write("squeue")
    squeue.write("scontrol", f"PreemptType = jobs\nPrivateData             = {private}\n")
    jobs = [submission(user="colleague"), submission(user=queue.this_user()), submission(user="")]
    assert [s.state for s in Queue().query(jobs, fresh=False)] == [expected, "gone", "gone"]


def test_a_decision_does_not_wait_for_accounting(slurm_programs):
    slurm_programs.write("squeue")
    slurm_programs.write("sacct", "7|me|OUT_OF_MEMORY\n")
    assert Queue().query([submission()], fresh=True) == [JobStatus("gone")]
    assert slurm_programs.calls("sacct") == []


def test_a_site_without_accounting_is_asked_once(squeue):
    squeue.write("squeue")
    asked = Queue()
    for job_id in ("7", "8", "9"):
        assert asked.query([submission(job_id)], fresh=False) == [JobStatus("gone", is_cancelled=None)]
    assert len(squeue.calls("sacct")) == 1


def test_the_user_is_the_one_that_slurm_sees(monkeypatch):
    monkeypatch.setenv("USER", "somebody-else")
    monkeypatch.setenv("LOGNAME", "somebody-else")
    assert queue.this_user() == pwd.getpwuid(os.getuid()).pw_name
