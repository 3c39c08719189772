"""Listing many folders of a bucket together; what else is done there is in test_store.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from rsb_cluster.storage.store import Store


@pytest.mark.s3
def test_folders_that_are_listed_together_are_listed_as_each_by_itself(s3, s3_bucket, monkeypatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    folder = Store(f"s3://{s3_bucket}/a folder")
    names = ["run", "run-1", "run-10", "run.1", "run1", "rün 1&<", "z"]
    written = [f"{name}/{file}" for name in names for file in ("spec.json", "x/1", "x/2")]
    # Before the first, behind the last, and in between: what takes several pages, and a file of a folder's name.
    written += [
        "a",
        "run-1.json",
        "zz/1",
        *(f"run-1x/{i:02}" for i in range(12)),
        *(f"run-10/y/{i:02}" for i in range(12)),
    ]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda path: folder.write_bytes(path, path.encode()), written))
    asked = [*reversed(names), "missing", "run-0"]
    expected = {name: folder.child(name).list_tags() for name in asked}
    assert [len(expected[name]) for name in ("run", "run-10", "missing")] == [3, 15, 0]
    for page_keys, together in ((1000, 100), (1000, 3), (4, 100), (1, 4)):
        monkeypatch.setattr("rsb_cluster.storage.s3.PAGE_KEYS", page_keys)
        monkeypatch.setattr("rsb_cluster.storage.bucket_files.FOLDERS_TOGETHER", together)
        assert folder.list_tags_of(asked) == expected
