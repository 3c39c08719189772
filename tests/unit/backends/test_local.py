"""The local back end with real processes, but without torch: its ranks run scripts of the tests."""

import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rsb_cluster.backends.local import Local, _gpus
from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError, SubmitError
from rsb_cluster.monitor import actions
from rsb_cluster.monitor.status import read_status
from rsb_cluster.monitor.watch import follow
from rsb_cluster.node.exit_codes import CANCELLED, RUNNING
from rsb_cluster.node.processes import Process
from rsb_cluster.runs.run import Attempt, Submission
from tests.servers.daemons import GUARD_S, poll
from tests.unit.bundled import load_job
from tests.unit.new_runs import make_run
from tests.unit.presser import Presser

SAY_ALL = "import os, time; print(*map('='.join, os.environ.items()), sep='\\n', flush=True); time.sleep(60)"
RANK = functools.partial(exec, SAY_ALL)
RANK.data, RANK.run_id = "", "digits-s0"  # all that a back end reads of a task
UNSEEN_PID = 2**22 + 1  # above the kernel's largest

# A queue is not waited for by who starts it.
pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Submits tasks to the back end; kills what is left of them after the test."""
    started: list[int] = []
    monkeypatch.setenv("RSB_GPU_LOCKS", str(tmp_path / "locks"))

    def launch(count, *assignments) -> list[Submission]:
        job = load_job("local", "tasks_per_node=0", *assignments)
        sent = Local().submit(job, [RANK] * count, tmp_path / f"queue{len(started)}", "x")
        started.append(Process.parse(sent[0].job_id).pid)
        return sent

    yield launch
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # it leads a session of its own, with its ranks


def state(submission: Submission) -> str:
    return Local().query([submission])[0].state


def log(submission: Submission) -> list[str]:
    return (Local().read_log(None, submission, 0, 0) or b"").decode().splitlines()


def submission(job_id: str, folder: Path) -> Submission:
    folder.mkdir(exist_ok=True)
    return Submission(backend="local", job_id=job_id, folder=str(folder), shape="", time=1)


# --- jobs and their ids ---------------------------------------------------------------------------------------------


def test_a_queue_keeps_one_id_from_the_submit_to_the_ranks(launch):
    one, other = launch(2, "setup=['export SET_UP=1', '# the last line']")
    assert one.job_id == other.job_id and Process.parse(one.job_id).is_alive
    assert state(other) == "queued"
    assert poll(lambda: any(line.startswith("SET_UP=") for line in log(one))), "its log is found by its id"
    said = dict(line.split("=", 1) for line in log(one) if "=" in line)
    assert said["SUBMITIT_LOCAL_JOB_ID"] == one.job_id
    assert said["CUDA_VISIBLE_DEVICES"] == "", "no GPU is touched"
    assert [state(one), state(other)] == ["running", "queued"]
    assert not Local().has_ended(None, one)
    started = "it has started meanwhile"
    assert Local().cancel_queued([one, other]) == [started, ""]
    assert [state(one), state(other)] == ["running", "gone"]
    assert Local().cancel_queued([one, other]) == [started, ""], "what has ended is no failure"
    assert Local().cancel([one]) == [""]
    assert poll(lambda: state(one) == "gone") and Local().has_ended(None, one)
    assert Local().cancel([one, other]) == ["", ""], "what has ended is no failure"


def test_a_job_runs_while_it_is_set_up_and_ctrl_c_ends_its_setup(launch, tmp_path):
    (sent,) = launch(1, f"setup=['# a comment', 'touch {tmp_path}/begun; sleep 600']")
    assert poll((tmp_path / "begun").exists) and state(sent) == "running"
    Local().preempt([sent])
    assert state(sent) == "running", "there is nothing to save yet"
    assert Local().cancel([sent]) == [""]
    assert poll(lambda: state(sent) == "gone")
    assert not list(tmp_path.rglob("*_start.json")), "to be cancelled is no failure"


def test_a_later_process_with_the_same_pid_is_not_signalled(tmp_path, sleeper):
    later = submission(str(dataclasses.replace(Process.of(sleeper.pid), start=1)), tmp_path / "job")
    (tmp_path / "job" / RUNNING).touch()
    assert state(later) == "gone"
    assert Local().cancel([later]) == [""]
    Local().preempt([later])
    assert sleeper.poll() is None


def test_a_job_on_another_machine_must_be_cancelled_there(tmp_path, sleeper):
    far = str(dataclasses.replace(Process.of(sleeper.pid), host="login2", boot="00000000"))
    running, queued = submission(far, tmp_path / "running"), submission(far, tmp_path / "queued")
    (tmp_path / "running" / RUNNING).touch()
    seen = Local().query([running, queued])
    assert [(s.state, s.engine) for s in seen] == [("running", "on login2"), ("queued", "on login2")]
    assert {s.reason for s in seen} == {"runs on login2; ask there"}
    assert not Local().ends_with_terminal(running)
    refused, cancelled = Local().cancel([running, queued])
    assert cancelled == "" and state(queued) == "gone", "a file cancels a queued job on any machine"
    assert f"job {far} runs on login2 and cannot be signalled from this machine. Run the command on login2" in refused
    assert not (tmp_path / "running" / CANCELLED).exists()
    with pytest.raises(
        SubmitError, match=r"Run the command on login2; if that machine no longer exists, remove .*/running first"
    ):
        Local().preempt([running])
    assert sleeper.poll() is None and state(running) == "running"


def test_only_another_machine_knows_of_its_job_without_a_shared_folder(tmp_path):
    run = make_run(tmp_path / "runs")
    unseen = submission(f"login2-{UNSEEN_PID}-5-00000000", tmp_path / "job")
    run.add_submission(unseen)
    assert state(unseen) == "queued"
    (tmp_path / "job").rmdir()
    (status,) = read_status([run])
    assert (status.state, status.cause) == ("unknown", "runs on login2; ask there")
    for act in (actions.cancel, actions.preempt):
        with pytest.raises(
            SubmitError, match=r"runs on login2 .* Run the command on login2; .* submit the run again\."
        ):
            act([run])
    attempt = {"number": 1, "job_id": unseen.job_id, "world_size": 1, "hosts": ("login2",), "started": 1}
    run.write_attempt(Attempt(**attempt, start_step=0, cause="stopped"))
    assert read_status([run])[0].state == "stopped", "the run's folder says that it is over"


def test_a_job_that_an_earlier_version_recorded_by_its_pid_is_still_found(tmp_path):
    folder = tmp_path / "job"
    command = [sys.executable, "-c", "import time; time.sleep(60)", "rsb_cluster.local_controller", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            old = submission(str(process.pid), folder)
            assert poll(lambda: state(old) == "queued"), "the kernel shows its words a moment after the start"
            assert Local().ends_with_terminal(old)
            assert state(submission(str(process.pid), tmp_path / "another")) == "gone"
            (folder / RUNNING).touch()
            (folder / f"{process.pid}_0_log.out").write_text("step 1\n")
            assert state(old) == "running" and log(old) == ["step 1"]
            assert Local().cancel([old]) == [""]
            assert process.wait(GUARD_S) and state(old) == "gone"
        finally:
            process.kill()


def test_the_command_for_unrecorded_jobs_cancels_them(launch):
    one, other = launch(2)
    assert poll(lambda: log(one))
    subprocess.run(["bash", "-c", Local().cancel_command([one, other])], check=True)
    assert poll(lambda: [state(one), state(other)] == ["gone", "gone"])
    assert not log(other)


def test_ctrl_c_stops_a_run_on_this_machine(launch, tmp_path):
    run = make_run(tmp_path / "runs")
    (sent,) = launch(1)
    run.add_submission(sent)
    assert poll(lambda: log(sent))
    screen = Presser(f"{run.run_id}: starting")
    ended = follow([run], Console(file=screen))
    assert ended is not None and [status.state for status in ended] == ["cancelled"]
    assert "Saving and stopping; press Ctrl-C again to kill the runs.\n" in screen.getvalue()
    assert run.is_cancelled(sent.job_id) and state(sent) == "gone"


def test_ctrl_c_stops_only_the_display_of_a_run_on_another_machine(tmp_path):
    run = make_run(tmp_path / "runs")
    run.add_submission(submission(f"login2-{UNSEEN_PID}-5-00000000", tmp_path / "job"))
    assert follow([run], Console(file=Presser(f"{run.run_id}: queued"))) is None
    assert not run.cancelled() and not (tmp_path / "job" / CANCELLED).exists()


# --- GPUs -----------------------------------------------------------------------------------------------------------


def gpus(number: int) -> list[str]:
    return _gpus(load_job("local", "tasks_per_node=0", f"gpus_per_node={number}"))


@pytest.mark.parametrize(
    ("said", "number", "taken"),
    [
        (None, 2, ["0", "1"]),
        (None, 0, []),
        ("3", 1, ["3"]),
        ("3,1,2", 2, ["3", "1"]),
        (" 5 , 7", 2, ["5", "7"]),
        ("GPU-8932f937-d72c,GPU-1,0", 2, ["GPU-8932f937-d72c", "GPU-1"]),
        ("MIG-GPU-8932f937/1/0,MIG-2", 1, ["MIG-GPU-8932f937/1/0"]),
        ("3", 0, []),
        ("", 0, []),
    ],
)
def test_the_first_of_the_gpus_that_the_shell_may_use_are_taken(monkeypatch, said, number, taken):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if said is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    assert gpus(number) == taken


@pytest.mark.parametrize(
    ("said", "number", "visible"),
    [("3", 2, "1"), ("", 1, "none"), ("-1", 1, "none"), ("NoDevFiles", 1, "none"), ("0,-1,1", 2, "1"), ("2,", 2, "1")],
)
def test_more_gpus_than_the_shell_may_use_are_refused_before_anything_starts(
    monkeypatch, tmp_path, said, number, visible
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    job: Job = load_job("local", "tasks_per_node=0", f"gpus_per_node={number}")
    message = f"gpus_per_node = {number}, but with CUDA_VISIBLE_DEVICES='{said}' this shell may use {visible}\\."
    for ask in (Local().script, Local().submit):  # the dry run says it, too
        with pytest.raises(ConfigError, match=message):
            ask(job, [RANK], tmp_path / "queue", "x")
    assert not list(tmp_path.iterdir())


def test_the_ranks_get_the_gpus_of_the_shell(monkeypatch, launch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    (sent,) = launch(1, "gpus_per_node=1")
    assert poll(lambda: "CUDA_VISIBLE_DEVICES=3" in log(sent))
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in log(sent), "the numbers are those of nvidia-smi"


def test_two_submits_queue_for_a_gpu_and_others_do_not(monkeypatch, launch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    first, second, third = (launch(1, "gpus_per_node=1")[0] for _ in range(3))
    assert poll(lambda: [state(first), state(second), state(third)].count("running") == 1)
    active = [sent for sent in (first, second, third) if state(sent) == "running"]
    waiting = [sent for sent in (first, second, third) if sent not in active]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    others = [*launch(1, "gpus_per_node=1"), *launch(1)]
    assert poll(lambda: all(map(log, others))), "another GPU, and none"

    run = make_run(tmp_path / "runs")
    run.add_submission(waiting[0])
    expected = ("queued", "waits for GPU 0, in use by digits-s0")
    assert poll(lambda: (status := read_status([run])[0]) and (status.state, status.cause) == expected)
    assert not log(waiting[0])
    assert Local().cancel(waiting[:1]) == [""] and state(waiting[0]) == "gone"
    cancelled = Process.parse(waiting[0].job_id)
    assert poll(lambda: not cancelled.is_alive), "it waits no longer"

    os.kill(Process.parse(active[0].job_id).pid, signal.SIGKILL)
    assert poll(lambda: state(waiting[1]) == "running"), "the kernel has released the lock"


def test_ctrl_c_ends_a_run_that_waits_for_a_gpu(monkeypatch, launch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (first,) = launch(1, "gpus_per_node=1")
    assert poll(lambda: state(first) == "running")
    (second,) = launch(1, "gpus_per_node=1")
    run = make_run(tmp_path / "runs")
    run.add_submission(second)
    ended = follow([run], Console(file=Presser(f"{run.run_id}: queued")))
    assert ended is not None and [status.state for status in ended] == ["cancelled"]
    process = Process.parse(second.job_id)
    assert poll(lambda: not process.is_alive) and state(first) == "running"
