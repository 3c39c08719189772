"""The findings of doctor on this machine, in a bucket and for a cloud."""

import json

import pytest

from rsb_cluster.backends.skypilot import engine
from rsb_cluster.checks.doctor import run_checks
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.errors import SubmitError
from rsb_cluster.storage.store import Store


def findings(job, **options):
    return {finding.what: finding for finding in run_checks(job, **options)}


def test_doctor_finds_no_problem_on_this_machine(tmp_path, digits):
    found = findings("local", runs=str(tmp_path / "runs"), data=str(digits))
    assert all(finding.is_ok for finding in found.values()), found
    assert "1,438 training images" in found["data"].found
    assert not list((tmp_path / "runs").iterdir())


def test_doctor_finds_what_a_cloud_run_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr("rsb_cluster.backends.skypilot.doctor_checks._answers", lambda url: False)
    monkeypatch.setattr(
        engine, "check_installed", lambda: (_ for _ in ()).throw(SubmitError("it is not here. Get it."))
    )
    found = findings("cloud-spot", runs=str(tmp_path), overrides=parse_overrides(("cloud.secrets=['NOT_SET']",)))
    wrong = {what for what, finding in found.items() if not finding.is_ok}
    assert wrong == {f"runs in {tmp_path}", "secrets", "SkyPilot", "API server", "clouds", "network"}
    assert found["SkyPilot"].advice == "Get it."
    assert "packages pinned" in found["code"].found


@pytest.mark.s3
def test_doctor_checks_a_bucket(s3, s3_bucket, monkeypatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{s3_bucket}/runs"
    found = findings("local", runs=url)[f"runs in {url}"]
    assert found.is_ok and "created exclusively" in found.found
    assert Store(url).names() == []
    for_cloud = findings("cloud", runs=url)[f"runs in {url}"]
    assert "writable, but only from this machine" in for_cloud.found, "nodes cannot reach a loopback address"


def test_doctor_prints_json(rsb, tmp_path):
    done = rsb.run("doctor", "--job", "local", "--runs", str(tmp_path / "runs"), "--json")
    assert all(finding["ok"] for finding in json.loads(done.stdout))
    assert not list((tmp_path / "runs").iterdir())
