"""Shards made directly in a real S3 server (by https), by several processes, one of which is killed."""

import signal
import subprocess
import sys
import time

import pytest

from rsb_cluster.data.indexing import build_index
from rsb_cluster.data.make import make_set, plan_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.data.verify import verify
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.file_systems import file_system
from rsb_cluster.storage.store import Store
from tests.command import RsbCluster
from tests.unit import formats
from tests.unit.samples import some

pytestmark = pytest.mark.s3


def test_a_killed_make_into_s3_has_the_same_result_as_one_on_disk(s3, s3_bucket, tmp_path, monkeypatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    for part, count in (("train", 60), ("val", 2)):
        formats.class_folders(tmp_path / "in" / part, ("cat", "dog"), count, seed=count, suffix="png")
    rsb = RsbCluster(tmp_path, s3.env)
    dest = Store(f"s3://{s3_bucket}/a set")
    command = [sys.executable, "-m", "rsb_cluster", "shards", "make", "./in", dest.url]
    options = ["--shard-samples", "1", "--workers", "2"]
    process = subprocess.Popen([*command, *options], cwd=tmp_path, env=rsb.env)
    while len(dest.names("train")) < 9 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not dest.exists("train/index.npz")
    sources = open_set(f"{tmp_path}/in")
    made = make_set(sources, dest, shard_samples=1)
    assert {part: index.num_samples for part, index in made.items()} == {"train": 120, "val": 4}
    local = Store(tmp_path / "out")
    make_set(sources, local, shard_samples=1)
    assert {name: dest.read_bytes(name) for name in dest.files()} == {n: local.read_bytes(n) for n in local.files()}
    assert verify(dest.child("val"), decode=True).problems == []


def test_files_of_others_in_a_bucket_are_kept(s3, s3_bucket, monkeypatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    bucket = Store(f"s3://{s3_bucket}")
    theirs = {
        f"mine/{name}": b"x" for name in ("train/own-0.tar", "train/notes.txt", "train/own-0.tar.d/a", "train2/a")
    }
    for name, content in theirs.items():
        bucket.write_bytes(name, content)
    dest, sources = bucket.child("mine"), {"train": some(3)}

    def there():
        return {name: bucket.read_bytes(name) for name in bucket.files() if name in theirs}

    for how in ({}, {"remake": True}):
        with pytest.raises(ConfigError, match="mine is not empty: it holds train2"):
            make_set(sources, dest, **how)
    with pytest.raises(ConfigError, match=r"own-0\.tar in s3://.*mine/train\. Add --yes"):
        make_set(sources, dest, overwrite=True)
    assert there() == theirs
    plan_set(sources, dest, overwrite=True).make()
    assert theirs.items() - there().items() == {("mine/train/own-0.tar", b"x")}
    with pytest.raises(ConfigError, match="samples was 3, is 4"):
        make_set({"train": some(4)}, dest)
    assert make_set({"train": some(4)}, dest, remake=True)["train"].num_samples == 4
    assert make_set({"train": some(4), "val": some(2)}, dest)["val"].num_samples == 2
    assert theirs.items() - there().items() == {("mine/train/own-0.tar", b"x")}
    assert build_index(dest.child("val")).num_samples == 2  # over an index of ours
    for key in ("marked/", "marked/train/"):  # as consoles mark a folder
        file_system(bucket.url).call_s3("put_object", Bucket=s3_bucket, Key=key, Body=b"")
    assert make_set(sources, bucket.child("marked"))["train"].num_samples == 3
