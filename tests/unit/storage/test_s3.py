"""What can be wrong with S3 is named, and no secret is shown."""

import os
import subprocess
import sys

import pytest

from tests.command import ROOT

PROGRAM = """
import os, sys
from rsb_cluster.errors import RsbError
from rsb_cluster.storage import store
from rsb_cluster.storage.store import Store
if "ATTEMPTS" in os.environ:
    store.S3_CLIENT["retries"] = {"total_max_attempts": int(os.environ["ATTEMPTS"])}
for action in sys.argv[2:]:
    try:
        result = getattr(Store(sys.argv[1]), action)(*{"write_bytes": ("f", b""), "read_bytes": ("f",)}.get(action, ()))
        print(action, "gave", result)
    except RsbError as error:
        print(action, type(error).__name__, error)
"""


def s3_script(env: dict[str, str], url: str, *actions: str) -> list[str]:
    """Run it in a process of its own, as a client keeps the credentials that it was made with."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, url, *actions], cwd=ROOT, env=os.environ | env, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines()


@pytest.mark.s3
def test_a_bucket_that_is_not_there_is_missing(s3):
    said = s3_script(
        s3.env, "s3://no-such-bucket-here/x", "read_bytes", "write_bytes", "check_writable", "names", "exists"
    )
    read, write, check, names, exists = said
    assert read.startswith("read_bytes MissingError there is nothing at s3://no-such-bucket-here/x/f. Check the path")
    assert write.startswith("write_bytes MissingError there is nothing at s3://no-such-bucket-here/x/f.")
    assert check.startswith("check_writable MissingError")
    assert names == "names gave []"
    assert exists == "exists gave False"


@pytest.mark.s3
@pytest.mark.parametrize("wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_named_and_not_shown(s3, s3_bucket, wrong):
    env = s3.env | {wrong: "wrongXYZZY"}
    said = s3_script(env, f"s3://{s3_bucket}/x", "read_bytes", "write_bytes", "check_writable", "exists", "names")
    for line in said:
        assert f" AccessError not allowed to use s3://{s3_bucket}/x" in line, line
        assert line.endswith("Check AWS_PROFILE, whether the credentials have expired, and the bucket's policy.")
    text = "\n".join(said)
    assert env["AWS_SECRET_ACCESS_KEY"] not in text and "Signature=" not in text


@pytest.mark.s3
def test_no_credentials_are_named(s3, s3_bucket):
    env = {k: v for k, v in s3.env.items() if "KEY" not in k}
    (said,) = s3_script(env, f"s3://{s3_bucket}/x", "write_bytes")
    assert "StorageError" in said and "redentials" in said


@pytest.mark.s3
def test_a_server_that_does_not_answer_is_named(s3):
    env = s3.env | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "ATTEMPTS": "2"}
    (said,) = s3_script(env, "s3://b/x", "read_bytes")
    assert "StorageError cannot use s3://b/x/f: Could not connect" in said
    assert said.endswith("Check AWS_ENDPOINT_URL, the credentials and the network.")
