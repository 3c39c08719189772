"""Shards in Google's and in Azure's buckets, from an index to a training; emulators are in their place.

``make other-stores`` installs what this needs. Hubs are in tests/unit/storage/test_data_urls.py.
"""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from rsb_cluster.data.index import load_index
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.location import PACKAGES
from rsb_cluster.storage.store import Store
from tests.command import RsbCluster
from tests.conftest import skip_without
from tests.equality import rows_of
from tests.servers.buckets import AzureContainers, GoogleBuckets

pytestmark = pytest.mark.long
FEW = ("--model", "test_resnet", "--set", "schedule.epochs=3", "--set", "job.tasks_per_node=1", "--job", "local")


@pytest.fixture(params=[AzureContainers, GoogleBuckets])
def url(request: pytest.FixtureRequest, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket's URL with the digits; this process reaches it, and what it starts."""
    kind = request.param
    package = PACKAGES[kind.SCHEME]
    missing = [kind.PROGRAM] if shutil.which(kind.PROGRAM) is None else []
    skip_without(kind.SCHEME, missing + ([package] if importlib.util.find_spec(package) is None else []))
    with kind() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        files = fsspec.filesystem(kind.SCHEME, skip_instance_cache=True)
        files.mkdir("bucket")
        files.put(f"{digits}/", f"{kind.SCHEME}://bucket/a set/", recursive=True)
        yield f"{kind.SCHEME}://bucket/a set"


def test_shards_are_indexed_verified_and_trained_on(url: str, digits: Path, rsb: RsbCluster) -> None:
    assert "cannot keep an index at" in rsb.error("shards", "index", url)
    assert "there are no *.tar files" in rsb.error("shards", "index", f"{url}/none", "-o", "none", code=1)
    rsb("shards", "index", url, "-o", "./index")
    for part in ("train", "val"):
        assert load_index(Store(rsb.cwd / "index" / part)).digest == load_index(Store(digits / part)).digest
    for folder in (f"{url}/val", "./index/train"):
        done = rsb.run("shards", "verify", folder, "--decode")
        assert "0 problems" in done.stdout
        assert "redentials" not in done.stderr, "gcsfs has not looked for any"
    assert f"{url} (found)" in rsb("submit", "--recipe", "digits", *FEW, "--data", url, "--dry-run")
    made = [
        Run.at(
            rsb.cwd / name,
            rsb("submit", "--recipe", "digits", *FEW, "--data", data, "--runs", name, "--wait").split()[-1],
        )
        for name, data in (("theirs", url), ("ours", str(digits)))
    ]
    theirs, ours = made
    assert theirs.run_id == ours.run_id
    assert theirs.result() is not None
    assert rows_of(theirs) == rows_of(ours), "the same images, in the same order"
