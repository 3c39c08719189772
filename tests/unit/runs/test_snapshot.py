"""A run that has a summary shows what it shows without, however old the summary is, by two requests where it is not."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from rsb_cluster.errors import AccessError
from rsb_cluster.monitor.status import find_status, read_status
from rsb_cluster.runs.lease import Lease
from rsb_cluster.runs.metrics import MetricsWriter
from rsb_cluster.runs.run import Attempt, Run, Submission
from rsb_cluster.runs.snapshot import FEW_RUNS, SUMMARY, Snapshot, write_summary
from rsb_cluster.storage.store import Store
from tests.servers.daemons import poll
from tests.servers.proxy import FaultyProxy
from tests.unit.new_runs import make_run

pytestmark = pytest.mark.s3


def attempt(number: int, start: int = 0, cause: str = "", message: str = "") -> Attempt:
    return Attempt(
        number=number, job_id="1", world_size=1, hosts=("h",), started=1, start_step=start, cause=cause, message=message
    )  # type: ignore[arg-type]


def log(run: Run, number: int, *steps: int, kind: str = "train") -> None:
    writer = MetricsWriter(run.store, number)
    for step in steps:
        row = {"kind": kind, "step": step, "epoch": step / 22, "loss": 0.5, "images_per_s": 100.0, "top1": step / 10}
        writer.add(row)
    writer.flush()


@pytest.fixture
def runs_url(s3, s3_bucket, monkeypatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_bucket}/runs"


@pytest.fixture
def run(runs_url):
    """A run of two attempts."""
    run = make_run(runs_url)
    run.add_submission(Submission(backend="local", job_id="1", folder="/nowhere", shape="1x1", time=1.0))
    run.write_attempt(attempt(1, 0, "preempted"))
    run.write_attempt(attempt(2, 30, "failed", "out of memory"))
    log(run, 1, 30, 40)
    log(run, 2, 31, 32)
    return run


def result(run: Run) -> None:
    values = {"top1": 80.4, "attempts": 2, "epochs": 25, "steps": 550, "images_per_s": 1e3}
    run.store.write_json("result.json", values)


CHANGES = {
    "nothing": lambda run: None,
    "an attempt": lambda run: run.write_attempt(attempt(3, 20)),
    "an attempt's end": lambda run: run.write_attempt(attempt(2, 30, "crashed", "other")),
    "an attempt is gone": lambda run: run.store.delete("attempts/0002.json"),
    "rows": lambda run: log(run, 2, 31, 32, 33),
    "another chunk": lambda run: log(run, 3, 34, kind="eval"),
    "rows are gone": lambda run: run.store.delete("metrics/0002-000000.jsonl"),
    "a submission": lambda run: run.add_submission(
        Submission(backend="local", job_id="2", folder="/nowhere", shape="1x1", time=2.0)
    ),
    "a failed start": lambda run: run.store.write_json(
        "attempts/start-1-0001.json", {"job_id": "1", "restart": 1, "host": "h", "time": 1.0, "message": "no torch"}
    ),
    "its result": result,
    "a damaged recipe": lambda run: run.store.write_bytes("recipe.json", b"{"),
    "its spec is gone": lambda run: run.store.delete("spec.json"),
    "a damaged summary": lambda run: run.store.write_bytes(SUMMARY, b'{"format": 1, "tags": 5}'),
    "a summary of a later version": lambda run: run.store.write_json(SUMMARY, {"format": 2}),
    "no summary": lambda run: run.store.delete(SUMMARY),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_summary_is_never_believed_where_it_is_old(run, change):
    write_summary(run)
    CHANGES[change](run)
    shown = read_status([run])
    run.store.delete(SUMMARY)
    assert shown == read_status([run])
    assert Snapshot.of(run).store.names("attempts") == run.store.names("attempts")


def test_a_current_summary_costs_two_requests_and_a_folder_that_is_no_run_one(run, runs_url, s3, monkeypatch):
    write_summary(run)
    run.store.write_bytes("logs/0001-rank00000.log", b"")
    without = make_run(runs_url, seed=1)
    without.store.child("x").write_bytes("y", b"")
    Run.at(runs_url, "notes").store.write_bytes("text", b"")
    with FaultyProxy(s3.plain_endpoint, certificate=s3.certificate) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        found, shown = find_status(runs_url, ())
    assert [(one.run_id, status.state, status.step) for one, status in zip(found, shown, strict=True)] == [
        ("digits-s0", "failed", 32), ("digits-s1", "never started", 0),
    ]  # fmt: skip
    asked = [request.path for request in proxy.requests]
    assert [len([path for path in asked if name in path]) for name in ("digits-s0", "digits-s1", "notes")] == [2, 2, 1]
    assert len(asked) == 7, "and the lists of the runs and of the evaluations"


def test_many_runs_are_listed_by_one_request(run, runs_url, s3, monkeypatch):
    with ThreadPoolExecutor(16) as pool:
        others = list(pool.map(lambda seed: make_run(runs_url, seed=seed), range(1, 2 * FEW_RUNS)))
        list(pool.map(write_summary, [run, *others]))
    with FaultyProxy(s3.plain_endpoint, certificate=s3.certificate) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        shown = find_status(runs_url, ())[1]
    assert [(one.run_id, one.state) for one in shown] == sorted(
        [("digits-s0", "failed"), *((one.run_id, "never started") for one in others)]
    )
    summaries = [request.path for request in proxy.requests if SUMMARY in request.path]
    assert len(set(summaries)) == len(summaries) == len(shown)
    assert len(proxy.requests) == len(shown) + 3, "the lists of the runs, of their files, and of the evaluations"


def test_runs_that_cannot_be_listed_together_are_listed_one_by_one(run, runs_url, monkeypatch):
    others = [make_run(runs_url, seed=seed) for seed in range(1, FEW_RUNS)]
    expected = read_status([run, *others])
    # What stands in a bucket's policy may be that each user lists the own runs.
    monkeypatch.setattr(Store, "list_tags_of", refuse)
    assert read_status([run, *others]) == expected


def refuse(*_):
    raise AccessError("not allowed")


def test_a_folder_on_a_disk_has_none(tmp_path):
    run = make_run(tmp_path)
    write_summary(run)
    assert Snapshot.of(run) is run
    assert SUMMARY not in run.store.names()


def test_an_attempt_keeps_it_up_to_date(run, monkeypatch):
    monkeypatch.setattr("rsb_cluster.runs.lease.HEARTBEAT_S", 0.01)
    lease = Lease(run, attempt(3, 32), [])
    run.write_attempt(lease.record)
    lease.keep_alive(lambda: 32, lambda: None)
    try:
        poll(lambda: run.store.exists(SUMMARY))
        log(run, 3, 33)
        poll(lambda: "metrics/0003-000000.jsonl" in run.store.read_json(SUMMARY)["tags"])
    finally:
        lease.release()
    assert run.store.read_json(SUMMARY)["last_rows"]["train"]["step"] == 33


def test_a_summary_that_cannot_be_made_ends_no_heartbeat(run, monkeypatch):
    monkeypatch.setattr("rsb_cluster.runs.lease.HEARTBEAT_S", 0.01)
    run.store.write_bytes("metrics/0002-000000.jsonl", b"{")
    lease = Lease(run, attempt(2, 30), [])
    lease.keep_alive(lambda: 32, lambda: None)
    try:
        poll(lambda: (beat := run.heartbeat(2)) is not None and beat.beats > 7)
    finally:
        lease.release()
    assert json.loads(run.store.read_bytes("attempts/0002-alive.json"))["beats"] > 7
