"""What can be wrong with S3 is named, and no secret is shown."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import quote

import botocore.session
import pytest

from rsb_cluster.storage.s3 import list_folder, list_objects
from tests.command import ROOT

PROGRAM = """
import os, sys
from rsb_cluster.errors import RsbError
from rsb_cluster.storage import file_systems
from rsb_cluster.storage.store import Store
if "ATTEMPTS" in os.environ:
    file_systems.S3_CLIENT["retries"] = {"total_max_attempts": int(os.environ["ATTEMPTS"])}
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
    for action, line in zip(("read_bytes", "write_bytes", "check_writable", "names", "exists"), said, strict=True):
        assert line.startswith(f"{action} MissingError there is nothing at s3://no-such-bucket-here/x"), line
        assert line.endswith("check its name and AWS_ENDPOINT_URL."), line
        assert f"There is no bucket 'no-such-bucket-here' at {s3.endpoint}: create it" in line


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


PAGE = """<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult{namespace}><Name>b</Name><Prefix>x/</Prefix><MaxKeys>1000</MaxKeys>{encoding}<IsTruncated>false</IsTruncated>
{files}<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes></ListBucketResult>"""
FILE = """<Contents><Key>{key}</Key><LastModified>2026-11-30T23:00:00.000Z</LastModified><ETag>&quot;{tag}&quot;</ETag>
<Size>1</Size><StorageClass>STANDARD</StorageClass><Owner><ID>me</ID></Owner></Contents>"""
KEYS = ("x/", "x/a", "x/rün 1", "x/a+b%20c", "x/new\nline")


@pytest.mark.parametrize("namespace", ["", ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'])
@pytest.mark.parametrize("is_encoded", [True, False])
def test_a_page_of_a_listing_is_read_as_botocore_reads_it(namespace, is_encoded, monkeypatch):
    """Names and tags are taken from it before botocore's parser, which takes five times as long, sees the rest."""
    encode = quote if is_encoded else str
    content = PAGE.format(
        namespace=namespace,
        encoding="<EncodingType>url</EncodingType>" if is_encoded else "",
        files="".join(FILE.format(key=encode(key), tag=number) for number, key in enumerate(KEYS)),
        folder=encode("x/dür/"),
    ).encode()

    class Listing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Listing) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in (keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}).items():
            monkeypatch.setenv(name, value)
        theirs = botocore.session.Session().create_client("s3").list_objects_v2(Bucket="b")
        assert list_objects("b", "x/") == {file["Key"]: file["ETag"] for file in theirs["Contents"]}
        assert list(list_objects("b", "x/")) == list(KEYS)
        assert list_folder("b", "x/") == [("dür", False), *((key[2:], True) for key in KEYS)]
        server.shutdown()
