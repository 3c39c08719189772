"""A run whose shards, checkpoints and records are on S3 (by https), while S3 fails. One process, in this one.

What one read does about each fault, one by one, is in tests/integration/test_s3_reading.py.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rsb_cluster.errors import AccessError, StorageError
from rsb_cluster.runs.run import Run
from rsb_cluster.storage import file_systems
from rsb_cluster.storage import s3 as s3_client
from tests.equality import assert_bit_equal, final_state, rows_of
from tests.faults.lab import STEPS, AtStep, Lab
from tests.servers.proxy import Fault, FaultyProxy
from tests.servers.s3 import S3Server

pytestmark = pytest.mark.s3
EVERYTHING = ("GET", "PUT", "HEAD", "POST", "DELETE")


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What this process talks to instead of the server."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    with FaultyProxy(s3.plain_endpoint, methods=EVERYTHING, certificate=s3.certificate) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def lab(s3: S3Server, proxy: FaultyProxy, s3_bucket: str, tiny_digits: Path) -> Lab:
    data = f"s3://{s3_bucket}/data"
    s3.upload(tiny_digits, data)
    return Lab(f"s3://{s3_bucket}/runs/run", data)


def assert_nothing_was_lost(lab: Lab, unbroken: Run) -> None:
    (attempt,) = lab.run.attempts()
    assert (attempt.cause, attempt.end_step) == ("finished", STEPS)
    assert rows_of(lab.run) == rows_of(unbroken)
    assert_bit_equal(final_state(lab.run), final_state(unbroken))


def test_errors_slowness_and_broken_connections_cost_only_time(
    lab: Lab, proxy: FaultyProxy, tiny_unbroken: Run
) -> None:
    """Of all requests of the run, one in twelve is answered by 500 or 503, late, or by half a body."""
    draw = random.Random(0)
    kinds = [
        Fault(status=500, code="InternalError"), Fault(status=503), Fault(wait_s=0.3), Fault(cut=100),
        Fault(cut=2000, reset=True),
    ]  # fmt: skip
    proxy.break_next(*(draw.choice(kinds) if draw.random() < 1 / 12 else Fault() for _ in range(5000)))
    lab.attempt()
    proxy.faults.clear()
    assert_nothing_was_lost(lab, tiny_unbroken)


@pytest.mark.parametrize("gone_s", [5, pytest.param(60, marks=pytest.mark.long)])
def test_a_server_that_is_gone_for_a_while_is_waited_for(
    lab: Lab, proxy: FaultyProxy, tiny_unbroken: Run, gone_s: float
) -> None:
    """Goes while steps are made: reading shards and saving both meet it."""

    def go() -> None:
        proxy.refuse()
        threading.Timer(gone_s, proxy.accept_again).start()

    begun = time.monotonic()
    lab.attempt(AtStep({4: go}))
    assert time.monotonic() - begun > gone_s, "it was over before the server had come back"
    assert_nothing_was_lost(lab, tiny_unbroken)


def test_a_server_that_is_gone_for_long_ends_the_attempt_and_the_next_one_says_so(
    lab: Lab,
    proxy: FaultyProxy,
    tiny_unbroken: Run,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For longer than any timeout, which is shorter than usual here. The run resumes when it is submitted again."""
    monkeypatch.setattr(s3_client, "MAX_ATTEMPTS", 3)
    monkeypatch.setitem(file_systems.S3_CLIENT, "retries", {"total_max_attempts": 1})
    file_systems.open_file_system.cache_clear()
    with pytest.raises(StorageError):  # its end cannot be recorded
        lab.attempt(AtStep({8: proxy.refuse}))
    assert "crashed: cannot use s3://" in capfd.readouterr().err, "the scheduler is asked for another attempt"
    lab.job = lab.job.model_copy(update={"rendezvous_s": 2})
    with pytest.raises(StorageError):
        lab.attempt()
    said = capfd.readouterr().err
    assert "failed: the run's folder could not be read for 2 s: cannot use s3://" in said
    assert "Submit the run again when it is readable." in said
    proxy.accept_again()
    attempt = lab.attempt()
    assert attempt.cause == "finished"
    assert attempt.start_step in (3, 6)  # the save of step 6 may have been under way
    assert rows_of(lab.run) == rows_of(tiny_unbroken)
    assert_bit_equal(final_state(lab.run), final_state(tiny_unbroken))


def test_credentials_that_expire_end_the_run_with_a_message(
    lab: Lab, proxy: FaultyProxy, tiny_unbroken: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another attempt would have the same ones: the run stops, and resumes when it is submitted with others."""

    def expire() -> None:
        proxy.always = Fault(status=400, code="ExpiredToken")

    with pytest.raises(AccessError):  # its end cannot be recorded either, as the run's folder is unreachable
        lab.attempt(AtStep({8: expire}))
    said = capfd.readouterr().err
    assert "failed: not allowed to use s3://" in said and "the credentials have expired. Renew them" in said
    with pytest.raises(AccessError):
        lab.attempt()
    assert "failed: not allowed to use s3://" in capfd.readouterr().err, "it does not ask for another attempt"
    proxy.always = Fault()
    attempt = lab.attempt()
    assert attempt.cause == "finished"
    assert attempt.start_step in (3, 6)  # the save of step 6 may have been under way
    assert rows_of(lab.run) == rows_of(tiny_unbroken)
    assert_bit_equal(final_state(lab.run), final_state(tiny_unbroken))
