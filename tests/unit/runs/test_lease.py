"""A run belongs to one attempt at a time: which one claims it, waits for it, or is fenced off."""

import queue
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rsb_cluster.config.job import Job
from rsb_cluster.runs import lease
from rsb_cluster.runs.checkpoint import CheckpointId, list_checkpoints, read_latest, write
from rsb_cluster.runs.lease import EndedError, HistoryError, LeaseHeldError, SupersededError
from rsb_cluster.runs.run import Attempt, Heartbeat, Run
from tests.servers.daemons import GUARD_S
from tests.unit.late_listing import LateStore


def test_a_stop_request_reaches_rank_0_with_its_next_heartbeat_and_once(tmp_path, monkeypatch):
    run = Run.at(tmp_path, "run")
    run.store.write_json("spec.json", {})
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    held = lease.acquire(
        run, Attempt(number=0, job_id="7", world_size=1, hosts=("n",), started=time.time(), start_step=0)
    )
    try:
        held.keep_alive(lambda: 1, lambda: None)
        time.sleep(0.3)
        assert not heard
        run.request_stop(1)
        deadline = time.monotonic() + 10
        while not heard and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        assert heard == [signal.SIGTERM]
    finally:
        held.release()
        signal.signal(signal.SIGTERM, before)


JOB = Job(name="test", backend="local")


def draft(job_id="7"):
    return Attempt(number=0, job_id=job_id, world_size=1, hosts=("n1",), started=time.time(), start_step=0)


def end(run, claimed, cause="preempted", **update):
    run.write_attempt(claimed.record.model_copy(update={"cause": cause, **update}))


@pytest.fixture
def run(anywhere):
    anywhere.write_json("spec.json", {})
    return Run(anywhere, "run")


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(lease, "STALE_S", 2.0)


def test_attempts_are_numbered_and_start_at_the_newest_checkpoint(run):
    first = lease.acquire(run, draft())
    assert (first.record.number, first.record.start_step, first.starts) == (1, 0, {})
    write(run.store.child("checkpoints"), CheckpointId(12, 1), {"x": b"x"}, before_manifest=first.check)
    end(run, first)
    second = lease.acquire(run, draft())
    assert (second.record.number, second.record.start_step, second.starts) == (2, 12, {1: 0})
    # What the first saved after the second began is not the run's.
    write(run.store.child("checkpoints"), CheckpointId(20, 1), {"x": b"x"}, before_manifest=lambda: None)
    assert lease.acquire(run, draft()).record.start_step == 12


def test_of_many_that_claim_at_once_each_gets_a_number_of_its_own(run):
    with ThreadPoolExecutor(8) as pool:
        taken = [c.record.number for c in pool.map(lambda _: lease.acquire(run, draft()), range(8))]
    assert sorted(taken) == list(range(1, 9))
    assert run.attempt_numbers() == list(range(1, 9))


def test_another_job_gives_up_where_the_holder_is_alive(run, fast):
    first = lease.acquire(run, draft("7"))
    first.keep_alive(lambda: 41, lambda: None)
    try:
        with pytest.raises(LeaseHeldError, match=r"job 7 is running this run \(attempt 1 on n1, step 41\)"):
            lease.acquire(run, draft("8"))
    finally:
        first.release()
    assert run.attempt_numbers() == [1]


def test_another_job_takes_over_from_one_that_is_silent(run, fast):
    first = lease.acquire(run, draft("7"))
    first.keep_alive(lambda: 41, lambda: None)
    first.release()
    started = time.monotonic()
    assert lease.acquire(run, draft("8")).record.number == 2
    assert time.monotonic() - started >= 2.0


def test_what_has_ended_is_not_waited_for(run, monkeypatch):
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: pytest.fail("waits"))
    first = lease.acquire(run, draft("7"))
    run.write_heartbeat(1, Heartbeat(beats=3, step=5, time=time.time()))
    end(run, first)
    assert lease.acquire(run, draft("8")).record.number == 2


@pytest.mark.parametrize("ahead_s", [-86_400.0, 86_400.0], ids=["a day behind", "a day ahead"])
def test_a_holder_whose_clock_is_wrong_is_alive_all_the_same(run, fast, ahead_s):
    """Its heartbeat is a day old, or of tomorrow; but it moves."""
    holder = draft("7").model_copy(update={"started": time.time() + ahead_s})
    assert lease.acquire(run, holder).record.number == 1
    stopped = threading.Event()

    def beat() -> None:
        beats = 0
        while not stopped.wait(0.05):
            beats += 1
            run.write_heartbeat(1, Heartbeat(beats=beats, step=41, time=time.time() + ahead_s))

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(LeaseHeldError, match=r"job 7 is running this run \(attempt 1 on n1, step 41\)"):
            lease.acquire(run, draft("8"))
    finally:
        stopped.set()
        beating.join()


def test_a_process_that_was_stopped_while_it_listened_looks_again_before_it_takes_over(run, monkeypatch):
    """To be stopped for an hour after the first look is no hour of listening."""
    monkeypatch.setattr(lease, "HEARTBEAT_S", 4.0)
    monkeypatch.setattr(lease, "STALE_S", 5.0)
    now = [1000.0]
    sleeps = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        now[0] += seconds + 3600  # stopped, and continued
        if len(sleeps) == 3:
            run.write_heartbeat(1, Heartbeat(beats=2, step=5, time=0.0))

    first = lease.acquire(run, draft("7"))
    run.write_heartbeat(first.record.number, Heartbeat(beats=1, step=5, time=0.0))
    monkeypatch.setattr(lease.time, "sleep", sleep)
    monkeypatch.setattr(lease.time, "monotonic", lambda: now[0])
    with pytest.raises(LeaseHeldError, match="step 5"):
        lease.acquire(run, draft("8"))
    assert sleeps == [1.0, 1.0, 1.0]


def test_a_job_that_is_restarted_takes_over_at_once_and_the_old_attempt_is_fenced_off(run, fast):
    superseded = threading.Event()
    first = lease.acquire(run, draft("7"))
    first.keep_alive(lambda: 41, superseded.set)
    first.check()
    second = lease.acquire(run, draft("7"))
    assert second.record.number == 2
    assert superseded.wait(5.0)
    with pytest.raises(SupersededError, match="attempt 2 has taken this run over; attempt 1 is fenced off"):
        first.check()
    second.check()


def test_heartbeats_do_not_make_a_deleted_run_again_and_say_that_it_is_gone(run, fast):
    gone: queue.Queue[str] = queue.Queue()
    held = lease.acquire(run, draft("7"))
    held.keep_alive(lambda: 41, lambda: None, gone.put)
    run.store.delete("spec.json")
    assert "no longer exists, so nothing can be saved" in gone.get(timeout=GUARD_S)
    run.store.delete("attempts")
    time.sleep(4 * lease.HEARTBEAT_S)
    held.release()
    assert not run.store.exists("attempts") and gone.empty(), "it is told once"


def history(run, *causes, steps=(0,), job_id="7"):
    """Write attempts that ended so, and claim another."""
    for number, cause in enumerate(causes, 1):
        step = steps[min(number, len(steps)) - 1]
        attempt = draft(job_id).model_copy(update={"number": number, "start_step": step, "cause": cause})
        assert run.claim_attempt(attempt.model_copy(update={"message": f"attempt {number}"}))
    return lease.acquire(run, draft("7"))


@pytest.mark.parametrize(
    ("causes", "refused"),
    [
        (("crashed",), ""),
        (("crashed", "crashed"), "the last 2 attempts crashed without a new checkpoint after step 0 (attempt 2)"),
        (("stuck", "crashed"), "the last 2 attempts crashed"),
        (("lost peer",) * 4, ""),  # hosts die, and more than one before the first checkpoint is no sign of a loop
        (("lost peer",) * 5, "the last 5 attempts were killed (out of memory?"),
        (("crashed", "lost peer"), ""),
        (("crashed", "preempted"), ""),
        (("crashed", "failed"), ""),  # the user knows; submitted again, it may try
        (("crashed", "crashed", "timed out"), ""),
        (("",) * 4, ""),
        (("",) * 5, "the last 5 attempts were killed (out of memory?"),
        (("crashed", *("",) * 4), "the last 5 attempts crashed or were killed"),
        (("crashed", "lost peer", "crashed", "", "stuck"), "the last 5 attempts crashed or were killed"),
    ],
)
def test_crashes_in_a_row_end_a_run_and_preemptions_do_not(tmp_path, causes, refused):
    claimed = history(Run.at(tmp_path, "run"), *causes)
    if refused:
        with pytest.raises(HistoryError) as caught:
            lease.check_history(claimed, JOB)
        assert str(caught.value).startswith(refused)
    else:
        lease.check_history(claimed, JOB)


def test_crashes_between_which_there_was_progress_are_no_loop(tmp_path):
    run = Run.at(tmp_path, "run")
    checkpoints = run.store.child("checkpoints")
    write(checkpoints, CheckpointId(30, 1), {"x": b"x"}, before_manifest=lambda: None)
    lease.check_history(history(run, "crashed", "crashed", steps=(0, 30)), JOB)


def test_preemptions_are_unlimited_unless_the_job_says_otherwise(tmp_path):
    claimed = history(Run.at(tmp_path, "run"), *("preempted",) * 20)
    lease.check_history(claimed, JOB)
    lease.check_history(claimed, JOB.model_copy(update={"max_preemptions": 20}))
    with pytest.raises(HistoryError, match=r"job 7 was preempted 20 times, job\.max_preemptions allows 19"):
        lease.check_history(claimed, JOB.model_copy(update={"max_preemptions": 19}))


def test_preemptions_of_earlier_jobs_do_not_count(tmp_path):
    claimed = history(Run.at(tmp_path, "run"), "preempted", "preempted", job_id="6")
    lease.check_history(claimed, JOB.model_copy(update={"max_preemptions": 1}))


# --- a job whose last attempt ended permanently -----------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["failed", "stopped"])
def test_a_job_does_not_train_again_after_an_attempt_that_ended_permanently(run, cause):
    """Whatever exit code the scheduler reports; another job may."""
    end(run, lease.acquire(run, draft()), "preempted")
    lease.check_not_ended(run, "7", 1)
    end(run, lease.acquire(run, draft()), cause, message="a shard was replaced")
    with pytest.raises(
        EndedError, match=f"attempt 2 of this job ended the run .{cause}: a shard was replaced"
    ) as caught:
        lease.check_not_ended(run, "7", 2)
    assert caught.value.cause == cause
    lease.check_not_ended(run, "8", 0)
    end(run, lease.acquire(run, draft("8")), "preempted")
    lease.check_not_ended(run, "8", 1)
    with pytest.raises(EndedError):
        lease.check_not_ended(run, "7", 3)


def test_the_failure_of_another_rank_counts_where_rank_0_was_killed(run):
    lease.acquire(run, draft())
    run.write_rank_failure(1, 2, {"cause": "stuck", "message": "rank 2 is slow", "host": "n1"})
    lease.check_not_ended(run, "7", 1)
    run.write_rank_failure(1, 3, {"cause": "failed", "message": "rank 3: a shard was replaced", "host": "n1"})
    with pytest.raises(EndedError, match="rank 3: a shard was replaced"):
        lease.check_not_ended(run, "7", 1)


def test_attempts_that_finish_without_a_result_are_limited(run):
    """Killed between the attempt's record and result.json, some times in a row."""
    for _ in range(lease.KILLS_IN_A_ROW):
        last = lease.acquire(run, draft())
        lease.check_history(last, JOB)
        end(run, last, "finished")
    with pytest.raises(HistoryError, match="the last 5 attempts were killed"):
        lease.check_history(lease.acquire(run, draft()), JOB)


# --- another machine's listing of the folder is late, as on NFS -------------------------------------------------------


def save(store, step, attempt):
    write(store.child("checkpoints"), CheckpointId(step, attempt), {"x": b"%d" % step}, before_manifest=lambda: None)


def test_the_next_attempt_is_claimed_although_the_last_is_not_listed_yet(tmp_path):
    """It resumes from what the last one saved; neither claim meets a taken number for a minute, nor is work lost."""
    run = Run.at(tmp_path, "run")
    run.store.write_bytes("recipe.json", b"{}")
    elsewhere = Run(LateStore(run.url), "run")
    first = lease.acquire(run, draft())
    save(run.store, 10, 1)
    save(run.store, 20, 1)
    end(run, first)
    assert elsewhere.store.files("attempts") == elsewhere.store.names("checkpoints") == []
    second = lease.acquire(elsewhere, draft())
    assert (second.record.number, second.record.start_step) == (2, 20)
    found = read_latest(elsewhere.store.child("checkpoints"), second.starts)
    assert found is not None and found.files == {"x": b"20"}


def test_an_attempt_is_fenced_off_at_once_although_the_later_one_is_not_listed_yet(tmp_path, fast):
    run = Run.at(tmp_path, "run")
    elsewhere = Run(LateStore(run.url), "run")
    first = lease.acquire(elsewhere, draft())
    first.check()
    lease.acquire(run, draft("8"))
    with pytest.raises(SupersededError, match="attempt 2 has taken this run over"):
        first.check()


def test_a_checkpoint_that_is_gone_or_superseded_is_not_found_by_its_name(tmp_path):
    run = Run.at(tmp_path, "run")
    for number, (start, steps) in {1: (0, (10, 20)), 2: (10, (15,))}.items():
        run.write_attempt(draft().model_copy(update={"number": number, "start_step": start, "cause": "preempted"}))
        for step in steps:
            save(run.store, step, number)
    checkpoints, starts = run.store.child("checkpoints"), {1: 0, 2: 10}
    assert [saved.step for saved in list_checkpoints(checkpoints, starts)] == [10, 15]
    checkpoints.delete("step-00000015-a0002")
    assert [saved.step for saved in list_checkpoints(checkpoints, starts)] == [10]
